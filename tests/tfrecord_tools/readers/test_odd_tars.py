"""Tars as people make them: joined by cat, with bytes behind the end, members apart, keys with dots, odd metadata."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import picture, write_tar

from clipkit.errors import UserError
from clipkit.tfrecord_tools.readers.shards import read_shard
from clipkit.tfrecord_tools.verify.command import verify
from clipkit.train.sources.open import open_source


def tar(path: Path, *names: str, joined: bool = False) -> Path:
    """A tar with a member for each name: a picture, or the name itself as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            data = picture(1) if name.lower().endswith((".jpg", ".png")) else name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes((path.read_bytes() if joined else b"") + stream.getvalue())
    return path


def read_both(path: Path) -> list[tuple[str, str | None]]:
    """Keys and captions as building reads them; training must find the same captions."""
    samples = list(read_shard(path))
    trained = [getattr(pair, "caption", None) for pair in open_source(path).source().pairs(range(len(samples)))]
    assert trained == [sample.caption if sample.image else None for sample in samples]
    return [(sample.key, sample.caption) for sample in samples]


def test_joined_tars_are_read_to_the_end(tmp_path):
    path = tar(tmp_path / "0.tar", "a.jpg", "a.txt")
    tar(path, "b.jpg", "b.txt", joined=True)
    tar(path, "a.jpg", "a.txt", joined=True)
    assert read_both(path) == [("a", "a.txt"), ("b", "b.txt"), ("a", "a.txt")]
    assert not verify(tmp_path).problems


@pytest.mark.parametrize("zeros", [0, 1, 512, 700, 100_000])
def test_zeros_behind_the_end_are_nothing(zeros, tmp_path):
    path = tar(tmp_path / "0.tar", "a.jpg", "a.txt")
    path.write_bytes(path.read_bytes() + bytes(zeros))
    assert read_both(path) == [("a", "a.txt")]


@pytest.mark.parametrize("garbage", [b"x", b"<html>" * 200, bytes(600) + b"\1", bytes(512) + b"PK\3\4" * 300])
def test_garbage_behind_the_end_is_told(garbage, tmp_path):
    path = tar(tmp_path / "0.tar", "a.jpg", "a.txt")
    path.write_bytes(path.read_bytes() + garbage)
    with pytest.raises(UserError, match=r"0\.tar: damaged tar at byte \d+, what follows its end mark is not"):
        list(read_shard(path))
    with pytest.raises(UserError, match="what follows its end mark is not another tar"):
        open_source(tmp_path)
    assert any("follows its end mark" in str(problem) for problem in verify(tmp_path).problems)


@pytest.mark.parametrize(
    "names",
    [
        ["0.jpg", "1.jpg", "0.txt", "1.txt"],
        ["0.txt", "1.txt", "0.jpg", "1.jpg"],
        ["0.jpg", "0.txt", "1.jpg", "1.txt", "0.json"],
        ["images/0.jpg", "images/1.jpg", "images/0.txt", "images/1.txt"],
        ["St. A 1.0.jpg", "St. B.jpg", "St. A 1.0.txt", "St. B.txt"],
    ],
)
def test_members_apart_are_refused_with_the_remedy(names, tmp_path):
    path = tar(tmp_path / "0.tar", *names)
    message = r"0\.tar: the members of sample .* don't stand beside each other: sort the tar by name"
    with pytest.raises(UserError, match=message):
        list(read_shard(path))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_a_sample_without_an_image_is_not_members_apart(tmp_path):
    path = tar(tmp_path / "0.tar", "0.jpg", "0.txt", "1.txt", "2.jpg", "2.txt", "1.txt")
    assert [key for key, _ in read_both(path)] == ["0", "1", "2", "1"]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (
            ["St. Anna 0.0.jpg", "St. Anna 0.0.txt", "St. Anna 0.1.jpg", "St. Anna 0.1.txt"],
            ["St. Anna 0.0", "St. Anna 0.1"],
        ),
        (["v1.2/1.5 t.JPG", "v1.2/1.5 t.txt", "v1.2/x.jpg", "v1.2/x.txt"], ["v1.2/1.5 t", "v1.2/x"]),
        (["7.jpg", "7.seg.png", "7.txt", "8.jpg", "8.seg.png", "8.txt"], ["7", "8"]),
        (["1.jpg", "1.txt", "1.5.jpg", "1.5.txt"], ["1", "1.5"]),
    ],
)
def test_keys_with_dots(names, keys, tmp_path):
    path = tar(tmp_path / "0.tar", *names)
    texts = [name for name in names if name.endswith(".txt")]
    assert read_both(path) == list(zip(keys, texts, strict=True))
    size = path.stat().st_size
    for cut in range(0, size, 512):  # wherever a build cuts it, every part goes by the same rule
        parts = [*read_shard(path, 0, cut), *read_shard(path, cut)]
        assert [sample.key for sample in parts] == keys


NAMES = st.text(st.sampled_from("ab. 1é-"), min_size=1, max_size=8).filter(lambda name: not name.startswith("."))


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True))
def test_pairs_of_any_names_are_read_or_refused(tmp_path_factory, stems):
    """Image and text of one stem side by side: each is a sample with its own caption, whatever dots there are."""
    path = tar(
        tmp_path_factory.mktemp("tar") / "0.tar", *(f"{stem}{end}" for stem in stems for end in (".jpg", ".txt"))
    )
    assert read_both(path) == [(stem, f"{stem}.txt") for stem in stems]


def test_metadata_nested_too_deep_is_a_bad_sample(tmp_path):
    deep = b'{"a":' * 3_000 + b"1" + b"}" * 3_000
    write_tar(
        tmp_path / "0.tar",
        [
            {"__key__": "0", "jpg": picture(0), "txt": "a", "json": deep},
            {"__key__": "1", "jpg": picture(1), "txt": "b"},
        ],
    )
    one, two = read_shard(tmp_path / "0.tar")
    assert (one.problem, two.problem, two.caption) == ("metadata-not-json", None, "b")
