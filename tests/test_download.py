"""Every row is an image or a failure with its reason, whatever is killed or changed on the way."""

import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit import jobs
from clipkit.errors import UserError
from clipkit.files import lock
from clipkit.image_server import Answer, serve
from clipkit.tfrecord_tools import download as download_module
from clipkit.tfrecord_tools import url_table
from clipkit.tfrecord_tools.download import DownloadSummary, download
from clipkit.tfrecord_tools.failures import REASONS, classify
from clipkit.tfrecord_tools.presets import fitting_presets
from clipkit.tfrecord_tools.truncation import is_truncated


def encoded(kind: str, mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG", quality=95)
# Path, caption, answer, and the reason to fail, if any.
ROWS: list[tuple[str, str | None, Answer, str | None]] = [
    ("/plain.jpg", "a plain one", Answer(JPEG), None),
    ("/progressive.jpg", "naïve “quotes”, 二つ", Answer(encoded("JPEG", progressive=True)), None),
    ("/alpha.png", None, Answer(encoded("PNG", "RGBA")), None),
    ("/some.webp", "  ", Answer(encoded("WEBP")), None),
    ("/grey.jpg", "grey", Answer(encoded("JPEG", "L")), None),
    ("/cut.jpg", "cut", Answer(JPEG[: len(JPEG) // 2]), "truncated"),
    ("/cut.png", "cut", Answer(encoded("PNG")[:-20]), "truncated"),
    ("/page.jpg", "a page", Answer(b"<html>no image</html>", "image/jpeg"), "not-an-image"),
    ("/empty.jpg", "empty", Answer(b""), "empty"),
    ("/gone.jpg", "gone", Answer(b"", status=HTTPStatus.GONE), "http-4xx"),
    ("/down.jpg", "down", Answer(b"", status=HTTPStatus.SERVICE_UNAVAILABLE), "http-5xx"),
]
OTHER_URLS = [
    ("file:///etc/passwd", "a file", "bad-url"),
    ("not a url", "nonsense", "bad-url"),
    (None, "null", "bad-url"),
    ("http://127.0.0.1:1/refused.jpg", "refused", "connect"),
]
COUNT = len(ROWS) + len(OTHER_URLS)
FAILED = sum(row[3] is not None for row in ROWS) + len(OTHER_URLS)
OPTIONS = {"image_size": 32, "samples_per_shard": 6, "processes": 1, "threads": 8, "timeout": 60.0}


def table(base_url: str) -> pa.Table:
    urls = [base_url + path for path, *_ in ROWS] + [url for url, *_ in OTHER_URLS]
    captions = [row[1] for row in ROWS] + [row[1] for row in OTHER_URLS]
    similarity = [i / 100 for i in range(COUNT)]
    licences = [None, *["CC0"] * (COUNT - 1)]
    return pa.table(
        {"URL": urls, "TEXT": captions, "similarity": similarity, "LICENSE": licences, "HEIGHT": [1] * COUNT}
    )


@contextlib.contextmanager
def site(extra: dict[str, Answer] | None = None) -> Iterator[str]:
    with serve({**{path: answer for path, _, answer, _ in ROWS}, **(extra or {})}) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, DownloadSummary]]:
    """A URL table, the shards made of it in one go, and the summary; for reading alone."""
    folder = tmp_path_factory.mktemp("download")
    with site() as base_url:
        pq.write_table(table(base_url), folder / "urls.parquet")
        summary = download(folder / "urls.parquet", folder / "out", preset="laion400m", **OPTIONS)
    yield folder / "urls.parquet", folder / "out", summary


def members(out: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return samples


def file_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted([*out.glob("*.tar"), *out.glob("*.parquet")])}


def test_counts_add_up(finished: tuple[Path, Path, DownloadSummary]) -> None:
    _, out, summary = finished
    expected: dict[str, int] = {}
    for reason in [row[3] for row in ROWS] + [row[2] for row in OTHER_URLS]:
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    assert (summary.rows, summary.downloaded, summary.failed) == (COUNT, COUNT - FAILED, expected)
    assert (summary.empty_captions, summary.shards) == (2, 3)
    told = json.loads((out / "clipkit" / "download.json").read_text())
    assert told["rows"] == told["downloaded"] + sum(told["failed"].values()) == COUNT
    stats = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert [each["count"] for each in stats] == [6, 6, 3]
    assert sum(each["successes"] for each in stats) == COUNT - FAILED


def test_images_and_texts(finished: tuple[Path, Path, DownloadSummary]) -> None:
    _, out, _ = finished
    samples = members(out)
    assert list(samples) == ["000000", "000001", "000002", "000003", "000004"]  # in the order of the rows
    assert [sample["txt"].decode() for sample in samples.values()] == [
        "a plain one",
        "naïve “quotes”, 二つ",
        "",
        "  ",
        "grey",
    ]
    for sample in samples.values():
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            image.load()
            assert image.format == "JPEG" and min(image.size) == 32
    columns = json.loads(samples["000001"]["json"])
    assert columns["LICENSE"] == "CC0" and columns["similarity"] == 0.01 and "HEIGHT" not in columns
    assert json.loads(samples["000000"]["json"])["LICENSE"] is None
    assert columns["original_width"] == 48 and columns["status"] == "success"
    rows = pq.read_table(out / "00000.parquet")
    assert rows["key"].to_pylist() == [f"{key:06d}" for key in range(6)]


def test_failures_name_row_and_reason(finished: tuple[Path, Path, DownloadSummary]) -> None:
    urls, out, _ = finished
    failures = pq.read_table(out / "clipkit" / "failures.parquet").to_pylist()
    table_rows = pq.read_table(urls).to_pylist()
    expected = [(number, row[3]) for number, row in enumerate(ROWS) if row[3]]
    expected += [(len(ROWS) + number, reason) for number, (_, _, reason) in enumerate(OTHER_URLS)]
    assert [(f["url"], f["caption"], f["reason"]) for f in failures] == [
        (table_rows[number]["URL"], table_rows[number]["TEXT"], reason) for number, reason in expected
    ]
    assert [(f["shard"], f["key"]) for f in failures] == [
        (f"{number // 6:05d}", f"{number // 6 * 10 + number % 6:06d}") for number, _ in expected
    ]
    assert all(f["message"] for f in failures)


def test_finished_download_does_nothing(
    finished: tuple[Path, Path, DownloadSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, out, summary = finished
    monkeypatch.setattr(jobs, "run", None)

    def changes() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    before = changes()
    assert download(urls, out, preset="laion400m", **OPTIONS) == summary
    assert changes() == before


def test_damaged_and_missing_shards_are_made_again(
    finished: tuple[Path, Path, DownloadSummary], tmp_path: Path
) -> None:
    """All three shards are fetched anew, and have the same bytes whatever order the answers came in."""
    urls, whole, summary = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    os.truncate(out / "00000.tar", 1000)
    (out / "00001_stats.json").unlink()
    (out / "00002_stats.json").write_text('{"count": ')
    (out / ".00002.tar.99999").write_bytes(b"left over")
    (out / "clipkit" / "work" / "00001.99999").mkdir(parents=True)
    (out / "clipkit" / "work" / "00001.99999" / "00001.tar").write_bytes(b"half")
    with serve({path: answer for path, _, answer, _ in ROWS}, port_of(urls)):
        again = download(urls, out, preset="laion400m", **OPTIONS)
    assert replace(again, out=whole) == summary
    assert file_bytes(out) == file_bytes(whole)
    assert not list(out.glob(".*")) and not (out / "clipkit" / "work").exists()


def test_a_server_that_says_nothing_is_a_timeout(tmp_path: Path) -> None:
    with serve({"/silent.jpg": Answer(None)}) as base_url:
        urls = write_urls(tmp_path / "u.parquet", url=[f"{base_url}/silent.jpg"], caption=["silent"])
        summary = download(urls, tmp_path / "out", **{**OPTIONS, "timeout": 0.2})
    assert (summary.downloaded, summary.failed) == (0, {"timeout": 1})


def port_of(urls: Path) -> int:
    return int(pq.read_table(urls)["URL"][0].as_py().split(":")[2].split("/")[0])


KILLED = """
import sys
from pathlib import Path
from clipkit.tfrecord_tools.download import download
if __name__ == "__main__":
    options = {"image_size": 32, "samples_per_shard": 2, "processes": 1, "threads": 2, "timeout": 600}
    download(Path(sys.argv[1]), Path(sys.argv[2]), **options)
"""


def test_killed_download_goes_on(tmp_path: Path) -> None:
    """The third shard holds a silent server: the run is killed in it for certain, with two shards done."""
    paths = [f"/{number}.jpg" for number in range(6)]
    good = {path: Answer(encoded("JPEG", seed=number)) for number, path in enumerate(paths)}
    urls, out = tmp_path / "urls.csv.gz", tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    with serve({**good, "/4.jpg": Answer(None)}) as base_url:
        port = int(base_url.rpartition(":")[2])
        lines = [f'{base_url}{path},"caption, {number}"' for number, path in enumerate(paths)]
        urls.write_bytes(gzip.compress("\n".join(["url,caption", *lines]).encode()))
        with subprocess.Popen(
            [sys.executable, tmp_path / "killed.py", urls, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            while not (out / "00001_stats.json").exists():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            process.stdout.read()  # ends when the last worker is gone
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    first = (out / "00000.tar").stat().st_mtime_ns
    with serve(good, port):
        summary = download(urls, out, image_size=32, samples_per_shard=2, processes=1, threads=2, timeout=60)
    assert (summary.rows, summary.downloaded, summary.failed, summary.shards) == (6, 6, {}, 3)
    assert (out / "00000.tar").stat().st_mtime_ns == first
    assert [sample["txt"].decode() for sample in members(out).values()] == [f"caption, {number}" for number in range(6)]


FULL_DISK = """
import sys
from pathlib import Path
from clipkit.errors import UserError
from clipkit.tfrecord_tools import fetch

parts = fetch.import_img2dataset()
begin = parts.writer.__init__

def begin_full(self, *arguments):
    begin(self, *arguments)
    self.tarwriter.tarstream.fileobj.fileobj = open("/dev/full", "wb", buffering=0)

parts.writer.__init__ = begin_full
output = fetch.Output("URL", "TEXT", (), 32, "keep_ratio", True, 95, 0, 4, 5)
shard = fetch.Shard(0, sys.argv[1], 0, 4)
out = Path(sys.argv[2])
try:
    fetch.fetch_shard(shard, out=out, work=out / "work", output=output, threads=2, timeout=60, retries=0)
except UserError as error:
    print(error)
"""


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """`/dev/full` stands for the tar: every write to it says that the disk is full."""
    (tmp_path / "full.py").write_text(FULL_DISK)
    with site() as base_url:
        pq.write_table(table(base_url).slice(0, 4), tmp_path / "urls.parquet")
        command = [sys.executable, tmp_path / "full.py", tmp_path / "urls.parquet", tmp_path / "out"]
        run = subprocess.run(command, capture_output=True, text=True)
    assert f"the disk is full while writing {tmp_path / 'out'}: free some space" in run.stdout
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "out").glob("*.*"))
    assert not list((tmp_path / "out" / "work").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything is fetched
# ---------------------------------------------------------------------------------------------------------------------


def write_urls(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns or {"url": ["http://127.0.0.1:1/a.jpg"], "caption": ["a"]}), path)
    return path


def test_missing_column_names_the_columns_and_a_preset(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet", URL=["http://x/a.jpg"], TEXT=["a"], similarity=[0.3])
    with pytest.raises(UserError, match=r"no URL column 'url'; it has URL, TEXT, similarity: --preset laion400m fits"):
        download(urls, tmp_path / "out")
    with pytest.raises(UserError, match=r"no caption column 'ALT'"):
        download(urls, tmp_path / "out", preset="laion400m", caption_column="ALT")
    with pytest.raises(UserError, match=r"no column 'hash' to keep"):
        download(urls, tmp_path / "out", preset="laion400m", keep_columns=["hash"])
    with pytest.raises(UserError, match="holds double, not text"):
        download(urls, tmp_path / "out", preset="laion400m", caption_column="similarity")
    odd = write_urls(tmp_path / "odd.parquet", a=["http://x/a.jpg"], b=["a"])
    with pytest.raises(UserError, match="it has a, b: name the columns with --url-column and --caption-column"):
        download(odd, tmp_path / "out")


def test_columns_that_cannot_be_kept(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet", url=["http://x/a.jpg"], caption=["a"], width=[1], raw=[b"bytes"])
    with pytest.raises(UserError, match=r"'width'.*the download makes one of that name"):
        download(urls, tmp_path / "out", keep_columns=["width"])
    with pytest.raises(UserError, match=r"'raw'.*it holds binary"):
        download(urls, tmp_path / "out", keep_columns=["raw"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.parquet", None, "missing.parquet doesn't exist"),
        ("urls.txt", b"http://x/a.jpg", "can't tell what .*urls.txt is"),
        ("bad.parquet", b"PAR1 nonsense", "bad.parquet can't be read as parquet"),
        ("bad.csv", b"url,caption\na,b\nc,d,e\n", "bad.csv can't be read as csv .*Expected 2 columns, got 3"),
        ("latin.csv", b"url,caption\na,\xe9t\xe9\n", "'caption' of .*latin.csv isn't UTF-8 text"),
        ("bad.tsv.gz", b"no gzip", "bad.tsv.gz can't be read as tsv.gz"),
        ("none.csv", b"url,caption\n", "none.csv holds no rows"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        download(tmp_path / name, tmp_path / "out")


def damaged_parquet(path: Path) -> Path:
    """A table whose metadata is whole and whose first page can't be unpacked."""
    pq.write_table(pa.table({"url": ["http://127.0.0.1:1/a.jpg"] * 50, "caption": ["a"] * 50}), path)
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)
    return path


def test_tables_that_are_damaged_further_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged_parquet(tmp_path / "page.parquet")
    with pytest.raises(UserError, match=r"page\.parquet can't be read as parquet") as caught:
        url_table.read_rows(path, 0, 50, ["url", "caption"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.parquet can't be read as parquet"):
        url_table.read_rows(tmp_path / "gone.parquet", 0, 1, ["url"])
    monkeypatch.setattr(url_table, "TEXT_BLOCK_BYTES", 1 << 16)
    noise = np.random.default_rng(0).integers(0, 10**12, 200_000).tolist()
    content = bytearray(gzip.compress("\n".join(["url,caption", *(f"u,{n}" for n in noise)]).encode()))
    content[-200_000:-100_000] = bytes(100_000)
    (tmp_path / "late.csv.gz").write_bytes(content)
    url_table.read_schema(tmp_path / "late.csv.gz")  # the damage lies beyond what this reads
    with pytest.raises(UserError, match=r"late\.csv\.gz can't be read as csv\.gz") as caught:
        url_table.count_rows(tmp_path / "late.csv.gz", tmp_path / "copy.parquet", ("url", "caption"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*copy*"))


def test_empty_tables_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no URL table in"):
        download(tmp_path, tmp_path / "out")
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="holds no rows"):
        download(tmp_path, tmp_path / "out")


def test_output_that_cannot_be_used(tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "u.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"):
        download(urls, tmp_path / "file")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="isn't from clipkit: choose an empty output"):
        download(urls, tmp_path / "strange")
    with (
        lock(tmp_path / "busy" / "clipkit"),
        pytest.raises(UserError, match="is being written by another clipkit"),
    ):
        download(urls, tmp_path / "busy")


def test_changed_table_or_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    urls = write_urls(tmp_path / "u.parquet")
    with pytest.raises(KeyboardInterrupt):
        download(urls, tmp_path / "out")
    with pytest.raises(UserError, match="begun with image_size 256, not 64"):
        download(urls, tmp_path / "out", image_size=64)
    urls.rename(tmp_path / "renamed.parquet")
    with pytest.raises(KeyboardInterrupt):  # the same table elsewhere is the same table
        download(tmp_path / "renamed.parquet", tmp_path / "out")
    write_urls(urls, url=["http://127.0.0.1:1/b.jpg"], caption=["a"])
    with pytest.raises(UserError, match=r"isn't the table that .*out was begun with"):
        download(urls, tmp_path / "out")


def test_summary_is_withdrawn_while_shards_are_missing(
    finished: tuple[Path, Path, DownloadSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, whole, _ = finished
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "00001_stats.json").unlink()
    monkeypatch.setattr(jobs, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        download(urls, tmp_path / "out", preset="laion400m", **OPTIONS)
    assert not (tmp_path / "out" / "clipkit" / "download.json").exists()


def test_img2dataset_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'clipkit\[download\]'"):
        download(write_urls(tmp_path / "u.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "laion4b"}, "unknown preset 'laion4b': choose one of laion400m"),
        ({"resize_mode": "squash"}, "unknown resize mode"),
        ({"quality": 0}, "JPEG quality"),
        ({"image_size": 0}, "image size must be at least 1"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        download(write_urls(tmp_path / "u.parquet"), tmp_path / "out", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Its parts
# ---------------------------------------------------------------------------------------------------------------------


def test_text_tables(tmp_path: Path) -> None:
    """CSV quotes, TSV doesn't; captions that look like numbers stay text; a column that changes its mind is text."""
    csv = tmp_path / "a.csv"
    csv.write_text('url,caption,score\nu0,007,1\nu1,"two\nlines, one comma",2\nu2,,\n')
    assert url_table.count_rows(csv, tmp_path / "a.parquet", ("url", "caption")) == 3
    rows = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert rows == {"url": ["u0", "u1", "u2"], "caption": ["007", "two\nlines, one comma", ""], "score": [1, 2, None]}
    tsv = tmp_path / "a.tsv"
    tsv.write_text('caption\turl\n"quote at the start\tu0\nplain\tu1\n')
    assert url_table.count_rows(tsv, tmp_path / "b.parquet", ("url", "caption")) == 2
    assert pq.read_table(tmp_path / "b.parquet")["caption"].to_pylist() == ['"quote at the start', "plain"]


def test_text_types_that_change_after_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_table, "TEXT_BLOCK_BYTES", 64)
    csv = tmp_path / "a.csv"
    csv.write_text("url,caption,score\n" + "u,c,1\n" * 40 + "u,c,high\n")
    assert url_table.count_rows(csv, tmp_path / "a.parquet", ("url", "caption")) == 41
    assert set(pq.read_table(tmp_path / "a.parquet")["score"].to_pylist()) == {"1", "high"}


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_rows_by_number(tmp_path: Path, group: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(20), "m": [[i] for i in range(20)]}), path, row_group_size=group)
    for start in range(20):
        for count in (1, 4, 20):
            got = url_table.read_rows(path, start, min(count, 20 - start), ["m", "n"])
            expected = list(range(start, min(start + count, 20)))
            assert got.column_names == ["m", "n"] and got["n"].to_pylist() == expected
    assert url_table.read_rows(path, 0, 0, ["n"]).num_rows == 0


def test_fingerprint_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_table, "WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr(url_table, "HASH_SAMPLE_BYTES", 50)
    path = tmp_path / "large"
    path.write_bytes(bytes(5000))
    first = url_table.fingerprint(path)
    path.write_bytes(bytes(4999) + b"x")
    second = url_table.fingerprint(path)
    path.write_bytes(bytes(5001))
    assert len({first, second, url_table.fingerprint(path)}) == 3


def test_a_folder_of_tables_is_cut_in_order() -> None:
    from clipkit.tfrecord_tools.download_plan import cut

    shards = cut([Path("a"), Path("b")], [5, 2], 2)
    assert [(s.number, s.rows_path, s.start, s.rows) for s in shards] == [
        (0, "a", 0, 2), (1, "a", 2, 2), (2, "a", 4, 1), (3, "b", 0, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno 111] Connection refused>", "connect"),
        ("[Errno 104] Connection reset by peer", "connect"),
        ("Remote end closed connection without response", "connect"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired>", "tls"),
        ("<urlopen error _ssl.c:983: The handshake operation timed out>", "timeout"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("HTTP Error 403: Forbidden", "http-4xx"),
        ("HTTP Error 502: Bad Gateway", "http-5xx"),
        ("HTTP Error 301: The HTTP server returned a redirect error that would lead to an infinite loop.", "http-3xx"),
        ("IncompleteRead(100 bytes read, 50 more expected)", "truncated"),
        ("Image decoding error", "not-an-image"),
        ("image too small", "too-small"),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed"),
        ("unknown url type: 'ftp'", "bad-url"),
        ("'ascii' codec can't encode character", "bad-url"),
        ("something new", "other"),
    ],
)
def test_reasons(message: str, reason: str) -> None:
    assert classify(message) == reason
    assert reason in REASONS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_every_cut_is_noticed(kind: str, share: float) -> None:
    data = encoded(kind)
    assert not is_truncated(data)
    assert is_truncated(data[: max(20, int(len(data) * share) - 1)])


def test_jpeg_oddities() -> None:
    thumbnail = encoded("JPEG", seed=1)
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = JPEG[:2] + exif + JPEG[2:]
    assert not is_truncated(with_thumbnail)
    assert is_truncated(with_thumbnail[: len(exif) + 600])  # the thumbnail's end marker is whole, the image isn't
    assert not is_truncated(JPEG + bytes(100)) and not is_truncated(encoded("PNG") + bytes(100))  # padding behind
    assert not is_truncated(with_thumbnail + b"a camera's own data")
    assert not is_truncated(encoded("JPEG", progressive=True, restart_marker_blocks=1))
    assert not is_truncated(b"GIF89a") and not is_truncated(b"\xff\xd8 text")


def test_presets() -> None:
    assert fitting_presets(["SAMPLE_ID", "URL", "TEXT"])[0] == "laion400m"
    assert fitting_presets(["uid", "url", "text", "clip_b32_similarity_score"])[0] == "datacomp"
    assert fitting_presets(["address"]) == []


def test_this_process_stays_clean(finished: tuple[Path, Path, DownloadSummary]) -> None:
    assert finished and "img2dataset" not in sys.modules and "albumentations" not in sys.modules
