import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipkit.errors import UserError
from clipkit.storage import files
from clipkit.storage.files import (
    WRITTEN_BESIDE,
    append_json_line,
    clear_leftovers,
    disk_message,
    lock,
    read_json,
    read_json_lines,
    require_dir,
    require_file,
    require_writable,
    write_beside,
    write_json,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file"
    with pytest.raises(RuntimeError), write_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with write_beside(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path):
    with write_beside(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("x")
    assert (tmp_path / "folder" / "file").read_text() == "x"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    # /dev/full refuses every write as a full disk does.
    with (
        pytest.raises(UserError, match=r"the disk is full while writing .*: free some space"),
        write_beside(tmp_path / "file") as temporary,
    ):
        temporary.write_bytes(b"")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_unchanged():
    assert disk_message(OSError(errno.EIO, "io"), "x") is None


def test_json_errors_name_the_file(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json doesn't exist"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"x\.json isn't valid JSON"):
        read_json(path)
    write_json(path, {"ü": 1})
    assert read_json(path) == {"ü": 1}


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    append_json_line(path, {"a": 2})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    values = [{"caption": "one\u2028two"}, {"caption": "a\x85b\x0c"}]
    for value in values:
        append_json_line(path, value)
    assert read_json_lines(path) == values


def test_paths_of_the_wrong_kind_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=f"data {file} is a file, not a folder"):
        require_dir(file, "data")
    with pytest.raises(UserError, match=f"data {tmp_path} is a folder"):
        require_file(tmp_path, "data")
    with pytest.raises(UserError, match="doesn't exist"):
        require_dir(tmp_path / "none", "data")
    with pytest.raises(UserError, match="file stands where a folder is needed"):
        require_writable(file)
    with pytest.raises(UserError, match="file stands where a folder is needed"):
        require_writable(file / "below")


def test_an_output_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match="can't write /proc/clipkit"):
        require_writable(Path("/proc/clipkit"))


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from clipkit.storage.files import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another clipkit \(process {other.pid}\)"), lock(tmp_path):
            pass
        other.kill()
        other.wait()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_two_writers_of_one_file_never_share_a_temporary(tmp_path):
    """Process ids come twice in a cluster; here even the process is the same."""
    path = tmp_path / "file"
    with write_beside(path) as one:
        one.write_text("one")
        with write_beside(path) as other:
            other.write_text("other")
            assert one != other and one.parent == other.parent == tmp_path
            assert WRITTEN_BESIDE.fullmatch(one.name) and WRITTEN_BESIDE.fullmatch(other.name)
        assert path.read_text() == "other"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_goes_and_no_other_hidden_file(tmp_path):
    kept = [".backup.20261101/part", ".hidden.1.txt", ".lock", "shard.123"]
    for name in (*kept, f".shard.tar.{1 << 59}/part", f".shard-00001.{1 << 42}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_leftovers(tmp_path, tmp_path / "none")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == kept


def test_a_worker_that_lives_on_leaves_no_half_file(tmp_path):
    with pytest.raises(FileNotFoundError), write_beside(tmp_path / "x") as temporary, temporary.open("w") as file:
        file.write("x")
        clear_leftovers(tmp_path)
        file.write("y")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_lives_on_leaves_no_half_folder(tmp_path, monkeypatch):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError), write_beside(path) as temporary:
        temporary.mkdir()
        (temporary / "first").write_text("x")
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", lambda folder: (folder / "first").unlink())  # half done
            clear_leftovers(tmp_path)
        (temporary / "second").write_text("x")
    assert not path.exists()
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
