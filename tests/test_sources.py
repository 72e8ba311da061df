"""Each kind of source gives the same pairs at any place, on a disk and in a store, and faults end as promised."""

import csv
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import img2dataset_writer, pair, picture, write_tar
from object_store import s3 as s3
from object_store import s3_server as s3_server
from small_dataset import pair_columns, write_dataset

from clipkit import block_cache, range_reader
from clipkit.block_cache import BlockCache
from clipkit.dataset import open_dataset
from clipkit.errors import UserError
from clipkit.features import Feature
from clipkit.files import as_path
from clipkit.records import RecordError
from clipkit.tar import read_headers
from clipkit.train import ahead_source
from clipkit.train import open_source as opening
from clipkit.train.data import LoaderConfig, batches
from clipkit.train.open_source import open_source, parse_data
from clipkit.train.sources import Pair, Source

COUNTS = (70, 0, 50, 40)
TOTAL = sum(COUNTS)
CONFIG = LoaderConfig(image_size=16, context_length=8, batch_size=40, block_size=8)


def jpg(number: int) -> bytes:
    """A different one for each number below 400."""
    return picture(number % 20 * 12, size=16 + number // 20)


def caption(number: int) -> str:
    return f"picture number {number}"


# ---- The kinds, each written as its own tools do ---------------------------------------------------------------------


def dataset(folder: Path) -> Path:
    first, parts = 0, []
    for count in COUNTS:
        parts.append([pair_columns(first + i, jpg=jpg(first + i)) for i in range(count)])
        first += count
    return write_dataset(folder, {"train": parts})


def tars(folder: Path) -> Path:
    first = 0
    for shard, count in enumerate(COUNTS):
        write_tar(folder / f"{shard:05d}.tar", [pair(first + i, jpg=jpg(first + i)) for i in range(count)])
        first += count
    return folder


def parquet(folder: Path) -> Path:
    """Through img2dataset's own writer, in row groups of 20."""
    folder.mkdir(parents=True, exist_ok=True)
    writer_module = img2dataset_writer()
    schema = pa.schema([("caption", pa.string()), ("key", pa.string())])
    first = 0
    for shard, count in enumerate(COUNTS):
        writer = writer_module.ParquetSampleWriter(shard, str(folder), True, 5, schema, "jpg")
        writer.buffered_parquet_writer.buffer_size = 20
        for number in range(first, first + count):
            writer.write(jpg(number), f"{number:09d}", caption(number), {"caption": caption(number), "key": "k"})
        writer.close()
        first += count
    return folder


def image_folder(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number in range(TOTAL):
            (folder / "images" / f"{number}.jpg").write_bytes(jpg(number))
            table.writerow([f"images/{number}.jpg", caption(number)])
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "dataset": dataset,
    "tars": tars,
    "parquet": parquet,
    "folder": image_folder,
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: write(folder / name) for name, write in KINDS.items()}


@pytest.fixture
def place(kind: str, written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one kind, to be spoilt."""
    return Path(shutil.copytree(written[kind], tmp_path / kind))


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Scratch and the user's cache in the test's own folder; no scratch is left at the end."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return scratch


def upload(folder: Path, target: str) -> str:
    """Copy a folder into a store, without what clipkit keeps beside an index."""
    fs, root = fsspec.core.url_to_fs(target)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            name = f"{root}/{file.relative_to(folder).as_posix()}"
            if target.startswith("memory:"):
                fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(name, file.read_bytes())
    return target


def check_pairs(source: Source) -> None:
    """All pairs, in any order, and what the loader needs besides."""
    assert source.num_records == TOTAL
    order = np.random.default_rng(1).permutation(TOTAL).tolist()
    for number, found in zip(order, source.pairs(order), strict=True):
        assert isinstance(found, Pair)
        assert (bytes(found.image), found.caption) == (jpg(number), caption(number))
    assert len({source.key(number) for number in range(TOTAL)}) == TOTAL
    for number in (0, 69, 70, TOTAL - 1):
        assert number in source.block(number, 8)
        assert all(0 <= other < TOTAL for other in source.block(number, 8))


def test_every_pair_at_any_place(place: Path) -> None:
    source = open_source(place, block_size=8).source()
    check_pairs(source)
    check_pairs(pickle.loads(pickle.dumps(source)))


def test_through_a_cache_too(place: Path, tmp_path: Path) -> None:
    source = open_source(place, cache=tmp_path / "cache", cache_gb=0.01, block_size=8).source()
    check_pairs(source)
    check_pairs(source)
    assert BlockCache(tmp_path / "cache", 10_000_000).stored() > 0


def test_in_a_store(kind: str, written: dict[str, Path], s3: str, own_places: Path) -> None:
    source = open_source(upload(written[kind], f"{s3}/data"), block_size=8).source()
    check_pairs(source)
    check_pairs(pickle.loads(pickle.dumps(source)))
    assert list(own_places.glob("clipkit-blocks-*"))
    del source
    deadline = time.monotonic() + 60
    while list(own_places.glob("clipkit-blocks-*")) and time.monotonic() < deadline:
        time.sleep(0.01)  # threads that read ahead end one after the other
    assert not list(own_places.glob("clipkit-blocks-*"))


def test_the_loader_gives_the_same_with_processes_and_threads(kind: str, written: dict[str, Path]) -> None:
    seen = []
    for workers, processes in ((0, False), (2, True)):
        source = open_source(upload(written[kind], f"memory://loader/{kind}") if not processes else written[kind])
        found = list(batches(source.source(), CONFIG, 0, 200, workers=workers, processes=processes))
        seen.append([(batch.records_B.tolist(), batch.image_BHWC.tobytes()) for batch in found])
    assert seen[0] == seen[1]


# ---- Faults ----------------------------------------------------------------------------------------------------------


def spoil(kind: str, place: Path, number: int) -> None:
    """Overwrite a piece in the middle of one record's image."""
    if kind == "folder":
        (place / "images" / f"{number}.jpg").write_bytes(b"no image")
        return
    image = jpg(number)
    for file in sorted(place.iterdir()):
        if file.is_file() and (at := file.read_bytes().find(image)) >= 0:
            with file.open("r+b") as opened:
                opened.seek(at)
                opened.write(b"\0" * len(image))
            return
    raise AssertionError("not found")


def test_a_corrupted_record_is_replaced_and_counted(kind: str, place: Path) -> None:
    if kind == "parquet":  # snappy leaves no image as it is
        rewrite_plain(place)
    spoil(kind, place, 33)
    told: list[str] = []
    found = list(batches(open_source(place).source(), CONFIG, 0, TOTAL, workers=1, warn=told.append))
    assert sum(batch.bad for batch in found) == 1
    records = np.concatenate([batch.records_B for batch in found])
    counts = np.bincount(records, minlength=TOTAL)
    assert counts[33] == 0
    assert sorted(counts) == [0, *[1] * (TOTAL - 2), 2]
    assert len(told) == 1
    assert "33" in told[0]


def rewrite_plain(place: Path) -> None:
    for file in place.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table, file, row_group_size=20, compression="none", use_dictionary=False)


def test_a_row_group_that_can_not_be_decoded_is_replaced(written: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(written["parquet"], tmp_path / "data"))
    file = sorted(place.glob("*.parquet"))[0]
    chunk = pq.read_metadata(file).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(b"\xff" * chunk.total_compressed_size)
    told: list[str] = []
    config = replace(CONFIG, max_bad=0.1)
    found = list(batches(open_source(place).source(), config, 0, TOTAL, workers=1, warn=told.append))
    records = np.concatenate([batch.records_B for batch in found])
    assert sum(batch.bad for batch in found) == 20
    assert not set(records.tolist()) & set(range(20, 40))
    assert len(told) == 20
    assert all("row group 1 of" in line and "can't be decoded" in line and "\n" not in line for line in told)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_vanishes_ends_the_run_with_one_line(
    kind: str, place: Path, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_source(place, cache=tmp_path / "cache" if cached else None, block_size=8)
    monkeypatch.setattr(opening.AheadSource, "_wish", lambda *_: None)  # else all may be there before it goes
    loader = batches(data.source(), CONFIG, 0, TOTAL, workers=1, prefetch=1)
    if kind == "folder":
        shutil.rmtree(place)
    else:
        shards = [
            file for file in sorted(place.iterdir()) if file.suffix in (".tar", ".parquet") or "record" in file.name
        ]
        shards[-1].unlink()
    with pytest.raises(UserError, match="is gone: put the") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["tars", "dataset"])
def test_a_store_without_the_shard_any_more(where: str, written: dict[str, Path], s3: str) -> None:
    target = upload(written[where], f"{s3}/data")
    source = open_source(target, block_size=8).source()
    name = "00003.tar" if where == "tars" else "pairs-train.tfrecord-00003-of-00004"
    fsspec.core.url_to_fs(target)[0].rm(f"{target}/{name}")
    with pytest.raises(UserError, match="is gone: put the shard back"):
        list(source.pairs(range(TOTAL - 5, TOTAL)))


def test_a_damaged_cache_is_refetched_even_behind_the_checksum(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_dataset(written["dataset"], cache=BlockCache(tmp_path / "cache", 10_000_000), block_records=8)
    good = [found.read(i) for i in range(TOTAL)]
    for entry in (tmp_path / "cache").glob("??/*"):
        entry.write_bytes(bytes(entry.stat().st_size))
    # This process has checked them already, and holds them open: the record's own checksum finds it.
    assert [found.read(i) for i in range(TOTAL)] == good
    monkeypatch.setattr(block_cache, "_MAX_KNOWN", 0)
    path = written["dataset"] / found.shards[0].file
    assert path.exists()


def test_a_record_damaged_at_its_source_is_told_with_a_cache_too(written: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(written["dataset"], tmp_path / "data"))
    spoil("dataset", place, 5)
    found = open_dataset(place, cache=BlockCache(tmp_path / "cache", 10_000_000), block_records=8)
    with pytest.raises(RecordError, match="checksum"):
        found.read(5)
    assert found.read(4)


# ---- Indexes ---------------------------------------------------------------------------------------------------------


def test_tars_are_gone_through_once_and_again_where_they_change(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkit.train import tar_source

    place = tars(tmp_path / "data")
    looked_at = []
    real = tar_source.index_tar
    monkeypatch.setattr(
        tar_source, "index_tar", lambda read, path, size: looked_at.append(path.name) or real(read, path, size)
    )
    open_source(place)
    assert looked_at == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    looked_at.clear()
    open_source(place)
    assert looked_at == []
    write_tar(place / "00002.tar", [pair(500)])
    write_tar(place / "00004.tar", [pair(501), pair(502)])
    source = open_source(place).source()
    assert looked_at == ["00002.tar", "00004.tar"]
    assert source.num_records == 70 + 1 + 40 + 2
    assert [found.caption for found in source.pairs([70, 71, 111, 112]) if isinstance(found, Pair)] == [
        caption(500),
        caption(120),
        caption(501),
        caption(502),
    ]


@pytest.mark.parametrize("where", ["tars", "parquet", "folder"])
def test_the_index_of_a_read_only_folder_lies_in_the_users_cache(
    where: str, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkit.train import source_index

    place = Path(shutil.copytree(written[where], tmp_path / "data", ignore=shutil.ignore_patterns("clipkit")))
    real = source_index.require_writable

    def refuse(folder: Path) -> Path:  # root may write anywhere
        if place in folder.parents:
            raise UserError("read-only")
        return real(folder)

    monkeypatch.setattr(source_index, "require_writable", refuse)
    check_pairs(open_source(place).source())
    assert not (place / "clipkit").exists()
    assert list((tmp_path / "xdg" / "clipkit").glob("index-*/*"))


def test_a_tar_that_is_cut_off_is_named(tmp_path: Path) -> None:
    place = tars(tmp_path / "data")
    tar = place / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:30_000])
    with pytest.raises(UserError, match=r"00002\.tar: damaged tar at byte \d+, it ends"):
        open_source(place)


def test_tars_of_other_writers(tmp_path: Path) -> None:
    """Long names, folders, upper case, PNG, no txt, no image, a caption that is null."""
    samples = [
        {"__key__": "a" * 150, "jpg": picture(1), "txt": "long"},
        {"__key__": "part/0001", "png": picture(2, "PNG"), "json": {"caption": "from json"}},
        {"__key__": "0002", "jpg": picture(3), "txt": "nan", "json": {"caption": None}},
        {"__key__": "0003", "jpg": picture(3), "txt": "nan", "json": {"caption": "nan"}},
        {"__key__": "0004", "txt": "no image"},
    ]
    write_tar(tmp_path / "data" / "0.tar", samples)
    found = list(open_source(tmp_path / "data").source().pairs(range(5)))
    assert [each.caption for each in found[:4] if isinstance(each, Pair)] == ["long", "from json", "", "nan"]
    assert isinstance(found[1], Pair)
    assert bytes(found[1].image) == picture(2, "PNG")
    assert str(found[4]) == "the sample has no image"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_stand_where_the_standard_library_finds_them(form: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    names = ["a.jpg", "part/b.JPG", "x" * 90 + "/" + "y" * 60 + ".txt", "c.json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".jpg", "é.txt"]
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 300 * number
            tar.addfile(info, io.BytesIO(bytes(300 * number)))
    data = path.read_bytes()
    found = read_headers(lambda start, length: data[start : start + length], path)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert [(member.name, member.start, member.size) for member in found] == expected


@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "parquet"])
def test_tables_of_other_kinds(written: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    place = Path(
        shutil.copytree(written["folder"], tmp_path / "data", ignore=shutil.ignore_patterns("*.csv", "clipkit"))
    )
    rows = [{"file_name": f"images/{n}.jpg", "text": caption(n)} for n in range(TOTAL)]
    table = place / f"metadata.{suffix}"
    if suffix == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "tsv":
        table.write_text("file_name\ttext\n" + "".join(f"{row['file_name']}\t{row['text']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    check_pairs(open_source(place).source())
    table.unlink()
    changed = place / "metadata.jsonl"
    changed.write_text(json.dumps({"file_name": "images/7.jpg", "text": "another"}) + "\n")
    os.utime(changed, (1, 1))
    [found] = open_source(place).source().pairs([0])
    assert isinstance(found, Pair)
    assert (bytes(found.image), found.caption) == (jpg(7), "another")


def test_missing_images_and_captions_of_a_folder(written: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(written["folder"], tmp_path / "data", ignore=shutil.ignore_patterns("clipkit")))
    (place / "metadata.csv").unlink()
    rows = [
        {"file_name": None, "text": "x"},
        {"file_name": "images/0.jpg", "text": None},
        {"file_name": "no", "text": ""},
    ]
    (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(open_source(place).source().pairs(range(3)))
    assert str(found[0]) == "the row names no image"
    assert isinstance(found[1], Pair)
    assert found[1].caption == ""
    assert "there is no image" in str(found[2])


# ---- Labelled images -------------------------------------------------------------------------------------------------


def test_imagenets_classes_become_captions(tmp_path: Path) -> None:
    features = {"image": Feature("image"), "label": Feature("label", num_classes=1000), "file_name": Feature("text")}
    records = [{"image": jpg(n), "label": label, "file_name": f"{n}.JPEG"} for n, label in enumerate([0, 1, 999, 7000])]
    folder = write_dataset(tmp_path / "i", {"train": [records]}, features, name="imagenet2012", image="image")
    source = open_source(folder).source()
    found = list(source.pairs(range(4)))
    assert [each.caption for each in found[:3] if isinstance(each, Pair)] == [
        "a photo of a tench",
        "a photo of a goldfish",
        "a photo of a toilet paper",
    ]
    assert "no known class" in str(found[3])
    (folder / "label.labels.txt").write_text("red_panda\ncat\n")
    found = list(open_source(folder).source().pairs([0, 1]))
    assert [each.caption for each in found if isinstance(each, Pair)] == ["a photo of a red panda", "a photo of a cat"]


# ---- What --data says ------------------------------------------------------------------------------------------------


def test_mixtures_by_weight_and_by_size(written: dict[str, Path]) -> None:
    mixed = open_source([f"{written['tars']}=0.75", f"{written['dataset']}=0.25"])
    records = mixed.source().records_at(np.arange(400, dtype=np.uint64), 0, 8)
    assert (records < TOTAL).sum() == 300
    assert mixed.identity()["mixture"][0]["weight"] == "3/4"
    other = open_source([f"{written['tars']}=0.7", f"{written['dataset']}=0.3"])
    assert other.identity() != mixed.identity()
    by_size = open_source([str(written["tars"]), str(written["folder"])])
    assert [str(weight) for weight in by_size.weights] == ["160", "160"]
    check = list(by_size.source().pairs([0, TOTAL]))
    assert [found.caption for found in check if isinstance(found, Pair)] == [caption(0), caption(0)]
    assert by_size.source().key(TOTAL).startswith("folder: metadata.csv:0")


def test_the_identity_of_a_dataset_is_as_checkpoints_have_it(written: dict[str, Path]) -> None:
    data = open_source(written["dataset"])
    assert data.identity() == {"name": "pairs", "split": "train", "records": TOTAL}
    assert data.places() == str(written["dataset"])


def test_a_weight_is_told_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "a=3").mkdir()
    assert parse_data(f"{tmp_path}/a=3") == opening.Wanted(tmp_path / "a=3", None)
    assert parse_data("data=0.7") == opening.Wanted(Path("data"), opening.Fraction(7, 10))
    assert parse_data("s3://bucket/x=2").weight == 2
    for wrong in ("data=0", "data=-1", "data=x", "data=nan", "data=1/0"):
        with pytest.raises(UserError, match="no number above 0"):
            parse_data(wrong)


def nothing(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def two_tables(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("file_name,text\nx,y\n")
    return tmp_path / "two"


def no_caption(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "t.csv").write_text("file_name,similarity\nx,1\n")
    return tmp_path / "t.csv"


REFUSED: dict[str, Callable[[Path, dict[str, Path]], Any]] = {
    "isn't a dataset, and holds nothing else to train on": nothing,
    "holds several tables": two_tables,
    "has no column with captions": no_caption,
    "doesn't exist: check the path": lambda tmp_path, written: tmp_path / "none",
    "some --data have a weight and some none": lambda _, written: [f"{written['tars']}=1", str(written["folder"])],
    "no --data given": lambda *_: [],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_not_be_trained_on_is_one_line(message: str, tmp_path: Path, written: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_source(REFUSED[message](tmp_path, written))
    assert "\n" not in str(caught.value)


# ---- How much is asked of a store ------------------------------------------------------------------------------------


def count_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from fsspec.implementations.memory import MemoryFileSystem

    asked: list[str] = []
    for name in ("cat_file", "info", "ls", "_open"):
        real = getattr(MemoryFileSystem, name)

        def counted(self: Any, *arguments: Any, _name: str = name, _real: Any = real, **named: Any) -> Any:
            asked.append(_name)
            return _real(self, *arguments, **named)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    return asked


def test_each_block_is_asked_for_once_whoever_reads(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = upload(written["tars"], "memory://blocks/tars")
    sources = [open_source(target, cache=tmp_path / "cache", block_size=10).source() for _ in range(2)]
    asked = count_requests(monkeypatch)
    for source in sources:
        list(batches(source, CONFIG, 0, 2 * TOTAL, workers=2))
    assert asked.count("cat_file") == TOTAL // 10
    asked.clear()
    list(batches(open_source(target, cache=tmp_path / "cache", block_size=10).source(), CONFIG, 0, TOTAL, workers=2))
    assert asked.count("cat_file") == 0


def test_the_order_alone_brings_the_next_windows_blocks_near(
    kind: str, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_source, "WINDOW_BLOCKS", 4)
    source = open_source(
        upload(written[kind], f"memory://ahead/{kind}"), cache=tmp_path / "cache", block_size=8
    ).source()
    monkeypatch.undo()
    asked = count_requests(monkeypatch)
    positions = np.arange(TOTAL, dtype=np.uint64)  # an epoch: all blocks
    source.records_at(positions, 0, 8)
    deadline = time.monotonic() + 60
    entries = {"dataset": 21, "tars": 21, "parquet": 9, "folder": TOTAL}[kind]  # blocks are cut where a shard ends
    while len(list((tmp_path / "cache").glob("??/[0-9a-f]*"))) < entries + (kind == "dataset"):  # and its index
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked.clear()
    check_pairs(source)
    assert "cat_file" not in asked


def test_a_store_that_stalls_is_asked_again_and_told(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    source = open_source(upload(written["dataset"], "memory://stalls/dataset"), block_size=8).source()
    expected = [batch.image_BHWC.tobytes() for batch in batches(source, CONFIG, 0, 80, workers=0)]
    monkeypatch.setattr(range_reader, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(opening.AheadSource, "_wish", lambda *_: None)
    real, calls, go = MemoryFileSystem.cat_file, [], threading.Event()

    def stalled(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 4):
            go.wait(60)
        return real(self, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", stalled)
    other = open_source("memory://stalls/dataset", cache=tmp_path / "cache", block_size=8)
    found = [batch.image_BHWC.tobytes() for batch in batches(other.source(), CONFIG, 0, 80, workers=1)]
    go.set()
    assert found == expected
    assert "no answer in time; asked again" in capfd.readouterr().err


def test_ten_million_records_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up index: 1,000 shards of 10,000 records, each shard a sparse file."""
    folder = write_dataset(tmp_path / "data", {"train": [[pair_columns(0)] for _ in range(2)]})
    record = (folder / "pairs-train.tfrecord-00000-of-00002").read_bytes()
    info = json.loads((folder / "dataset_info.json").read_text())
    manifest = json.loads((folder / "clipkit" / "manifest.json").read_text())
    count, each = 1000, 10_000
    step = -(-len(record) // 512) * 512
    shard = manifest["splits"]["train"]["shards"][0]
    names = [f"pairs-train.tfrecord-{number:05d}-of-{count:05d}" for number in range(count)]
    info["splits"][0]["shardLengths"] = [str(each)] * count
    manifest["splits"]["train"]["shards"] = [
        {**shard, "file": name, "records": each, "bytes": step * each} for name in names
    ]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(step * each)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "clipkit" / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "clipkit" / "index-train.npy", np.tile(np.arange(each, dtype=np.uint64) * np.uint64(step), count))

    began = time.process_time()
    source = open_source(folder).source()
    order = source.records_at(np.arange(256, dtype=np.uint64), 0, 64)
    found = list(source.pairs(order[:8].tolist()))
    assert time.process_time() - began < 3
    assert source.num_records == count * each
    assert all(isinstance(each_, RecordError) for each_ in found)  # the shards are empty: the places were read

    target = upload_metadata(folder, names, step * each)
    asked = count_requests(monkeypatch)
    began = time.process_time()
    source = open_source(target).source()
    assert time.process_time() - began < 3
    assert source.num_records == count * each
    assert len(asked) < 100


def upload_metadata(folder: Path, names: list[str], size: int) -> str:
    """The dataset in a store whose shards are only said to be there."""
    from fsspec.implementations.memory import MemoryFileSystem

    target = upload_small(folder, "memory://ten-million")
    real = MemoryFileSystem.ls

    def with_shards(self: Any, path: str, detail: bool = True, **named: Any) -> Any:
        found = real(self, path, detail=detail, **named)
        if detail and path.rstrip("/").endswith("ten-million"):
            found = [*found, *({"name": f"{path}/{name}", "size": size, "type": "file"} for name in names)]
        return found

    MemoryFileSystem.ls = with_shards  # count_requests puts its own over it, and pytest puts this back
    return target


def upload_small(folder: Path, target: str) -> str:
    for name in ("dataset_info.json", "features.json", "clipkit/manifest.json", "clipkit/index-train.npy"):
        path = as_path(f"{target}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / name).read_bytes())
    return target


# ---- Training ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_data_and_weights_alone(written: dict[str, Path]) -> None:
    from clipkit.config import to_json
    from clipkit.train.loop import refuse_another_run
    from clipkit.train.recipes import debug

    tar, other = str(written["tars"]), str(written["folder"])
    identity = open_source([f"{tar}=0.75", f"{other}=0.25"]).identity()
    state = {"dataset": json.loads(json.dumps(identity))}
    start: Any = SimpleNamespace(path=Path("run"), config={"recipe": to_json(debug())}, state=state)
    refuse_another_run(start, debug(), open_source([f"{tar}=3", f"{other}=1"]))  # the same weights, written otherwise
    for data in ([f"{tar}=0.5", f"{other}=0.5"], [tar], [f"{other}=0.75", f"{tar}=0.25"]):
        with pytest.raises(UserError, match="was trained on another dataset"):
            refuse_another_run(start, debug(), open_source(data))


def test_the_command_hands_over_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from clipkit.cli import main
    from clipkit.train import loop

    told: dict[str, Any] = {}

    def train(recipe: Any, data: Any, out: Path, **options: Any) -> Any:
        told.update(options, data=data)
        return loop.Summary(out, None, 0, 0.0, 0.0, True, False)

    monkeypatch.setattr(loop, "train", train)
    arguments = ["train", "--recipe", "debug", "--out", str(tmp_path), "--data", "a=0.7", "--data", "s3://b/c=0.3"]
    result = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "c"), "--cache-gb", "2.5"])
    assert result.exit_code == 0, result.output
    assert (told["data"], told["cache"], told["cache_gb"]) == (("a=0.7", "s3://b/c=0.3"), tmp_path / "c", 2.5)
