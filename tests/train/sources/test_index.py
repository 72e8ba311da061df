"""Where each pair lies in tars, parquet and tables is found out once, kept, and found anew when files change."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import pair, picture, tar_of_odd_names, write_tar
from source_kinds import TOTAL, caption, check_pairs, jpg, tars
from source_kinds import own_places as own_places
from source_kinds import written as written

from clipkit.errors import UserError
from clipkit.formats.tar import read_headers
from clipkit.train.sources.open import open_source
from clipkit.train.sources.source import Pair


def test_tars_are_gone_through_once_and_again_where_they_change(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkit.train.sources import tars as tar_source

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
    from clipkit.train.sources import index as source_index

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
        {"__key__": "0004", "txt": "no-image"},
    ]
    write_tar(tmp_path / "data" / "0.tar", samples)
    found = list(open_source(tmp_path / "data").source().pairs(range(5)))
    assert [each.caption for each in found[:4] if isinstance(each, Pair)] == ["long", "from json", "", "nan"]
    assert isinstance(found[1], Pair)
    assert bytes(found[1].image) == picture(2, "PNG")
    assert str(found[4]) == "the sample has no image"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_stand_where_the_standard_library_finds_them(form: int, tmp_path: Path) -> None:
    path = tar_of_odd_names(tmp_path / "x.tar", form)
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
        {"file_name": "Q" * 9_000, "text": ""},  # an image as base64
    ]
    (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(open_source(place).source().pairs(range(4)))
    assert str(found[0]) == "the row names no image"
    assert isinstance(found[1], Pair)
    assert found[1].caption == ""
    assert str(found[2]) == f"the image {place}/no doesn't exist"
    assert str(found[3]) == f"the image {place}/{'Q' * 200} doesn't exist"
