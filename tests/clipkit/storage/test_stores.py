"""Files in stores: on fsspec's memory file system, and on an S3 server on loopback through real sockets."""

import errno
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from click.testing import CliRunner
from object_store import s3 as s3
from object_store import s3_server as s3_server

from clipkit.cli.main import main
from clipkit.errors import InternalError, UserError
from clipkit.storage import lease, stores
from clipkit.storage.files import (
    append_json_line,
    as_path,
    clear_leftovers,
    disk_errors,
    is_remote,
    local_copy,
    lock,
    make_folder,
    read_json,
    read_json_lines,
    remove,
    require_dir,
    require_file,
    require_writable,
    sync_file,
    write_beside,
    write_json,
)


@pytest.fixture(params=["memory", "s3"])
def store(request):
    """An empty folder of a store."""
    if request.param == "s3":
        return as_path(request.getfixturevalue("s3")) / "folder"
    return as_path(f"memory://{uuid.uuid4().hex}/folder")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.001)


@pytest.fixture
def scratch_disk(tmp_path, monkeypatch):
    """Where files on their way lie, to look into."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("text", ["/a/b", "a/b", "a b", "C:", "~/x", "odd:name", "odd:/name", "file:///a/b", ""])
def test_local_paths_stay_local(text):
    path = as_path(text)
    assert isinstance(path, Path) and not is_remote(path)
    assert path == Path(text.removeprefix("file://"))
    assert as_path(path) is path or as_path(path) == path


def test_urls_become_remote_paths_and_survive_pickling_and_text():
    for text in ("s3://bucket/a/b.tar", "gs://bucket/a/b.tar", "memory://x/a/b.tar", "hf://datasets/x/a/b.tar"):
        path = as_path(text)
        assert is_remote(path) and path.name == "b.tar" and str(path) == text
        assert str(path.parent / "c") == text.replace("b.tar", "c")
        for again in (as_path(path), as_path(str(path)), pickle.loads(pickle.dumps(path))):
            assert is_remote(again) and again == path


def test_what_pathlib_makes_of_a_url_is_mended():
    for path in (Path("s3://bucket/a"), Path("memory://x/a")):
        assert is_remote(as_path(path)) and str(as_path(path)) == str(path).replace(":/", "://")
    assert as_path(Path("file:///a/b")) == Path("/a/b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope://x/y", "nope://x/y: no file system is known for nope://; give a local path"),
        ("s3://", "s3://: .*bucket"),
    ],
)
def test_urls_that_nobody_knows_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        as_path(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "package", "remedy"),
    [
        ("s3://bucket/x", "s3fs", r"pip install 'clipkit\[s3\]'"),
        ("gs://bucket/x", "gcsfs", r"pip install 'clipkit\[gs\]'"),
        ("sftp://host/x", "paramiko", "paramiko"),
    ],
)
def test_a_missing_package_names_its_extra(text, package, remedy):
    # In a process of its own, because fsspec remembers what it found.
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from clipkit.errors import UserError; from clipkit.storage.files import as_path\n"
        "try: as_path(sys.argv[2])\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, package, text], capture_output=True, text=True, check=True)
    assert re.fullmatch(f"{text} needs a package that is missing: .*{remedy}.*\n", done.stdout)


def test_nothing_remote_is_loaded_for_local_work(tmp_path):
    code = (
        "import sys; from clipkit.storage.files import *; from clipkit.storage.files import as_path, write_json, lock\n"
        "folder = as_path(sys.argv[1])\n"
        "with lock(folder): write_json(folder / 'x.json', 1)\n"
        "print([name for name in ('fsspec', 'upath', 's3fs', 'aiohttp') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_an_object_appears_whole_or_not_at_all(store, scratch_disk):
    path = store / "a" / "file.bin"
    with pytest.raises(RuntimeError), write_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not path.exists()
    with write_beside(path) as temporary:
        assert isinstance(temporary, Path) and temporary.name == path.name
        temporary.write_bytes(b"whole")
        assert not path.exists() and names(store / "a") == []
    assert path.read_bytes() == b"whole" and names(store / "a") == ["file.bin"]
    with write_beside(path) as temporary:
        temporary.write_bytes(b"anew")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"anew"
    assert names(scratch_disk) == []


def test_a_folder_cannot_be_put_at_once(store, scratch_disk):
    with pytest.raises(InternalError, match="can't be written as a folder"), write_beside(store / "x") as temporary:
        temporary.mkdir()
    assert names(store) == names(scratch_disk) == []


def test_what_is_no_object_store_is_read_alone():
    for write in (require_writable, lambda path: write_json(path, 1)):
        with pytest.raises(UserError, match=r"can't write http://localhost/x: .* s3://"):
            write(as_path("http://localhost/x"))


def test_json_and_lines(store):
    path = store / "x.json"
    with pytest.raises(UserError, match=r"x\.json doesn't exist"):
        read_json(path)
    write_json(path, {"ü": 1})
    assert read_json(path) == {"ü": 1}
    lines = store / "x.jsonl"
    assert read_json_lines(lines) == []
    append_json_line(lines, {"a": 1})
    append_json_line(lines, {"a": 2})
    lines.write_bytes(lines.read_bytes() + b'{"a": ')
    append_json_line(lines, {"a": 3})
    assert read_json_lines(lines) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_kinds_of_paths(store):
    write_json(store / "a" / "file", 1)
    assert require_dir(store, "data") == store and require_file(store / "a" / "file", "data")
    with pytest.raises(UserError, match="is a file, not a folder"):
        require_dir(store / "a" / "file", "data")
    with pytest.raises(UserError, match="is a folder, not a file"):
        require_file(store / "a", "data")
    with pytest.raises(UserError, match="doesn't exist"):
        require_dir(store / "none", "data")


def test_removing(store):
    for name in ("a/x", "a/b/y", "ab"):
        write_json(store / name, 1)
    sync_file(store / "ab")
    remove(store / "none")
    remove(store / "a")
    assert names(store) == ["ab"]
    remove(store / "ab")
    assert names(store) == []
    with pytest.raises(InternalError, match="whole bucket"):
        remove(as_path("memory://" if store.protocol == "memory" else f"s3://{store.drive}"))


def test_a_writable_folder_is_left_empty(store):
    assert make_folder(store) == store
    assert require_writable(store) == store and names(store) == []
    clear_leftovers(store)


def test_other_processes_are_seen_at_once(s3):
    """A listing that is remembered would hide what workers write."""
    folder = as_path(s3) / "x"
    write_json(folder / "1", 1)
    assert names(folder) == ["1"]
    code = (
        "import sys; from clipkit.storage.files import as_path, write_json; write_json(as_path(sys.argv[1]) / '2', 2)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert names(folder) == ["1", "2"] and read_json(folder / "2") == 2


def test_a_local_copy_is_whole_and_goes(store, scratch_disk):
    path = store / "x.bin"
    with pytest.raises(UserError, match=r"x\.bin doesn't exist: check the path"), local_copy(path):
        pass
    path.write_bytes(b"x" * 100_000)
    with local_copy(path) as copy:
        assert isinstance(copy, Path) and copy.name == "x.bin" and copy.read_bytes() == b"x" * 100_000
    assert names(scratch_disk) == []
    with local_copy(Path(__file__)) as copy:
        assert copy == Path(__file__)


def test_transfers_that_fail_for_a_moment_are_tried_again(store, monkeypatch):
    failures = [TimeoutError("slow"), EndpointConnectionError(endpoint_url="x"), OSError(5, "io")]
    calls = []

    def failing(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) % 4:
                raise failures[len(calls) % 4 - 1]
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(store.fs, "get_file", failing(store.fs.get_file))
    monkeypatch.setattr(store.fs, "put_file", failing(store.fs.put_file))
    write_json(store / "x", 1)
    with local_copy(store / "x") as copy:
        assert read_json(copy) == 1
    assert len(calls) == (8 if store.protocol == "s3" else 4)


def test_a_short_copy_is_fetched_again(store, monkeypatch):
    get, calls = store.fs.get_file, []
    (store / "x").write_bytes(b"whole")

    def short(remote_name, local_name, **kwargs):
        calls.append(local_name)
        get(remote_name, local_name, **kwargs)
        if len(calls) == 1:
            os.truncate(local_name, 3)

    monkeypatch.setattr(store.fs, "get_file", short)
    with local_copy(store / "x") as copy:
        assert copy.read_bytes() == b"whole"
    assert len(calls) == 2


def test_a_missing_bucket_is_one_line(s3):
    folder = as_path(f"{s3}-none/x")
    for attempt in (require_writable, lambda path: write_json(path / "x", 1)):
        with pytest.raises(
            UserError, match=r"can't write .*-none.*: its bucket doesn't exist; make it or check the name"
        ):
            attempt(folder)
    with pytest.raises(UserError, match="doesn't exist: check the path"):
        require_dir(folder, "data")


def test_missing_credentials_are_one_line(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(as_path(s3).fs).clear_instance_cache()
    for attempt in (require_writable, lambda path: require_dir(path, "data"), lambda path: read_json(path / "x")):
        with pytest.raises(UserError, match=r"no credentials for s3://.*AWS_ACCESS_KEY_ID") as caught:
            attempt(as_path(s3) / "x")
        assert "\n" not in str(caught.value)
    type(as_path(s3).fs).clear_instance_cache()


def test_a_refused_connection_is_one_line(s3, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        type(as_path(s3).fs).clear_instance_cache()
        for attempt in (require_writable, lambda path: require_dir(path, "data")):
            with pytest.raises(UserError, match=r"can't reach s3://.*check the endpoint and the network"):
                attempt(as_path(s3) / "x")
    type(as_path(s3).fs).clear_instance_cache()


def test_refusals_of_the_store_are_lines_and_bugs_are_not():
    assert stores.store_message(NoCredentialsError(), "s3://x") is not None
    assert "check the credentials" in str(stores.store_message(PermissionError("Access\nDenied"), "s3://x"))
    assert stores.store_message(KeyError("x"), "s3://x") is None
    with pytest.raises(FileNotFoundError), disk_errors(as_path("memory://x")):
        Path("/none/none").read_bytes()


def test_what_killed_processes_left_on_the_way_goes(scratch_disk):
    code = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from clipkit.storage.stores import scratch\n"
        "with scratch() as folder:\n"
        "    (folder / 'x').write_text('x'); print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(scratch_disk)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive,
    ):
        assert killed.stdout is not None and alive.stdout is not None
        of_killed, of_alive = Path(killed.stdout.readline().strip()), Path(alive.stdout.readline().strip())
        killed.kill()
        killed.wait()
        with stores.scratch() as mine:
            assert sorted([mine, of_alive]) == sorted(scratch_disk.iterdir()) and of_killed != mine
        alive.communicate()
    assert names(scratch_disk) == []


def test_a_lease_keeps_others_away_and_goes_in_the_end(store):
    with lock(store):
        held = json.loads((store / ".lock").read_text())
        assert held["pid"] == os.getpid() and held["host"].startswith(socket.gethostname())
        with (
            pytest.raises(UserError, match=rf"another clipkit \(process {os.getpid()} on .*, seen \d+ s ago\)"),
            lock(store),
        ):
            pass
    assert names(store) == []


@pytest.mark.parametrize(
    ("host", "age", "free"), [("elsewhere", 0, False), ("elsewhere", 301, True), (lease.here(), 0, True)]
)
def test_the_lease_of_a_dead_holder_is_taken_over(store, host, age, free):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    write_json(store / ".lock", {"token": "x", "host": host, "pid": dead.pid, "seen": time.time() - age})
    if free:
        with lock(store):
            assert json.loads((store / ".lock").read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match=r"on elsewhere, seen .* free after 5 minutes"), lock(store):
            pass


def test_a_container_of_the_same_host_name_is_not_dead(store, monkeypatch):
    """With --net=host, and on Kubernetes with host networking, all containers of a machine have its name."""
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)  # one that this container hasn't
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    lease.here.cache_clear()
    (store / ".lock").write_bytes(lease._lease("x"))
    monkeypatch.undo()
    lease.here.cache_clear()
    with pytest.raises(UserError, match=rf"on {re.escape(socket.gethostname())} .*, seen "), lock(store):
        pass


def until(condition):
    """Wait for what another thread does."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it didn't happen in 30 s")


def test_a_lease_is_refreshed_and_its_loss_is_told(store, monkeypatch):
    monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"taken over by another clipkit \(process 7 on elsewhere\)"), lock(store):

        def seen():
            """As the lease itself reads: s3fs refuses a file that is written again between its two requests."""
            return json.loads(stores.retry((store / ".lock").read_bytes))["seen"]

        first = seen()
        until(lambda: seen() > first)
        # Written until it stays: the refresher may be between its look and its write.
        other = {"token": "x", "host": "elsewhere", "pid": 7, "seen": time.time()}
        until(lambda: write_json(store / ".lock", other) or refresher_ended())
    assert read_json(store / ".lock")["pid"] == 7


def refresher_ended():
    return not any(thread.name == "clipkit-lease" for thread in threading.enumerate())


def test_a_store_without_conditional_puts_still_locks(store, monkeypatch):
    put = lease.put_bytes

    def unconditional(data, path, mode="overwrite"):
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        put(data, path, mode)

    monkeypatch.setattr(lease, "put_bytes", unconditional)
    with lock(store), pytest.raises(UserError, match="another clipkit"), lock(store):
        pass
    assert names(store) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NoCredentialsError(), "no credentials for the store"),
        (EndpointConnectionError(endpoint_url="http://localhost:1"), "can't reach the store"),
        (FileNotFoundError("bucket/x"), None),
        (ConnectionResetError("not the store's"), None),
    ],
)
def test_what_a_stage_lets_through_is_one_line_of_the_command(monkeypatch, error, message):
    def examine():
        raise error

    monkeypatch.setattr("clipkit.cli.doctor.examine", examine)
    result = CliRunner().invoke(main, ["doctor"])
    if message:
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and message in result.stderr
    else:
        assert result.exception is error
