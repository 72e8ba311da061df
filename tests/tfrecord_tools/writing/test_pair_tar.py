"""Our tars are those that webdataset's own writer makes, byte for byte but for the spaces in the JSON."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import InternalError
from clipkit.tfrecord_tools.readers.tar import read_tar
from clipkit.tfrecord_tools.writing.pair_tar import PairTar, header

PAIRS = st.lists(st.tuples(st.binary(max_size=1500), st.text(max_size=20)), max_size=5)


@given(PAIRS)
def test_tars_are_webdatasets(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[bytes, str]]) -> None:
    folder = tmp_path_factory.mktemp("tars")
    pairs = [(jpg, text.encode("utf-8", "replace").decode()) for jpg, text in pairs]
    theirs = io.BytesIO()
    with PairTar(folder / "ours.tar") as tar, webdataset.TarWriter(theirs, mtime=0) as peer:
        for number, (jpg, text) in enumerate(pairs):
            metadata = {"key": f"{number:06d}", "caption": text}
            tar.add(f"{number:06d}", jpg, text, metadata)
            peer.write(
                {"__key__": f"{number:06d}", "jpg": jpg, "json": json.dumps(metadata).encode(), "txt": text.encode()}
            )
    assert (folder / "ours.tar").read_bytes() == theirs.getvalue()
    assert [(sample.image, sample.caption) for sample in read_tar(folder / "ours.tar")] == pairs


def test_large_members_and_odd_names(tmp_path: Path) -> None:
    assert tarfile.TarInfo.frombuf(header("a.jpg", 8**11 - 1), "ascii", "strict").size == 8**11 - 1
    with pytest.raises(InternalError, match="doesn't fit a plain header"):
        header("a.jpg", 8**11)
    with pytest.raises(InternalError, match="doesn't fit"):
        header("k" * 100, 1)
