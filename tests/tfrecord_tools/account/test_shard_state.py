"""A shard takes the place of another whole, from whatever point it is gone on with."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.account.shard_state import DownloadFiles, DownloadLayout, commit, new_folder, recover
from clipkit.tfrecord_tools.download.shard import Spool


def every(files: DownloadFiles) -> list[Path]:
    return [*files.written().values(), files.state]


def write(files: DownloadFiles, text: str) -> None:
    for path in every(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} {path.suffix}")


@pytest.mark.parametrize("format", ["tfds", "webdataset", "parquet"])
@given(moved=st.integers(0, 4))
def test_recovery_finishes_what_was_whole(tmp_path_factory: pytest.TempPathFactory, format: str, moved: int) -> None:
    """However many files had been moved when it was killed; shards of another number stay for another time."""
    layout = DownloadLayout(tmp_path_factory.mktemp("out"), format, "name" if format == "tfds" else "", 3)
    final = layout.files(1)
    write(final, "old")
    folder = new_folder(layout, 1)
    write(final.inside(folder), "new")
    half = new_folder(layout, 1)
    half.mkdir()
    (half / final.data.name).write_text("half")
    for source, target in list(zip(every(final.inside(folder)), every(final), strict=True))[:moved]:
        source.replace(target)
    recover(layout, 2)
    assert folder.exists() and half.exists()
    recover(layout, 1)
    assert [path.read_text().split()[0] for path in every(final)] == ["new"] * len(every(final))
    assert list(layout.pending.iterdir()) == []
    shutil.rmtree(layout.root)


def test_in_a_store() -> None:
    layout = DownloadLayout(as_path("memory://replace/out"), "webdataset", "", 1)
    final = layout.files(0)
    for files, text in ((final, "old"), (final.inside(folder := new_folder(layout, 0)), "new")):
        for path in every(files):
            path.write_text(text)
    commit(folder, final)
    assert {path.read_text() for path in every(final)} == {"new"}
    assert not folder.exists()


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_spool_keeps_bytes_at_their_places(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder)
    places = [spool.append(part) for part in parts]
    assert [spool.read(place, len(part)) for place, part in zip(places, parts, strict=True)] == parts
    assert list(folder.iterdir()) == []
