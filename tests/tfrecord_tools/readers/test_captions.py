"""Captions of every kind people have, in every kind of file: stored as meant, or refused by the option that decides."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import pair, picture, write_tar

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.records import RecordWriter, encode_example
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.train.sources.open import open_source

IMAGES = pa.array([{"bytes": picture(i), "path": None} for i in range(3)])
SEVERAL = [["a cat", "two cats"], ["a dog"], ["a bird", " ", "", "birds"]]
KINDS = ["parquet", "img2dataset's parquet", "tar", "img2dataset's tar", "tfrecord", "json lines", "parquet table"]


def write_several(folder: Path, kind: str, captions: list[Any] = SEVERAL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.table({"image": IMAGES, "text": captions}), folder / "0.parquet")
    elif kind == "img2dataset's parquet":
        columns = {"jpg": [picture(i) for i in range(3)], "txt": [str(each) for each in captions], "caption": captions}
        pq.write_table(pa.table(columns), folder / "0.parquet")
    elif kind == "tar":
        write_tar(folder / "0.tar", [pair(i, txt=None, json={"caption": captions[i]}) for i in range(3)])
    elif kind == "img2dataset's tar":
        write_tar(folder / "0.tar", [pair(i, txt=str(captions[i]), json={"caption": captions[i]}) for i in range(3)])
    elif kind == "tfrecord":
        with RecordWriter(folder / "0.tfrecord") as writer:
            for i, found in enumerate(captions):
                writer.write(encode_example({"key": str(i), "jpg": picture(i), "txt": str(found), "caption": found}))
    else:
        for i in range(3):
            (folder / f"{i}.jpg").write_bytes(picture(i))
        names = [f"{i}.jpg" for i in range(3)]
        if kind == "json lines":
            rows = zip(names, [captions[0], "a dog", captions[2]], strict=True)  # one of them isn't a list
            lines = [json.dumps({"file_name": name, "text": found}) for name, found in rows]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        else:
            pq.write_table(pa.table({"file_name": names, "text": captions}), folder / "metadata.parquet")
    return folder


def texts(folder: Path, out: Path, **options: Any) -> list[str]:
    summary = build_tfds(folder, out, "pairs", progress=lambda _: None, **options)
    dataset = open_dataset(summary.path)
    return [dataset.example(i)["txt"] for i in range(len(dataset))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_captions_is_stored_as_was_asked(kind, tmp_path):
    folder = write_several(tmp_path / "in", kind)
    with pytest.raises(UserError, match=r"has 2 captions for .*: choose --captions first, random, or each"):
        build_tfds(folder, tmp_path / "out", "pairs", progress=lambda _: None)
    # The same output again, now with the option.
    assert texts(folder, tmp_path / "out", captions="first") == ["a cat", "a dog", "a bird"]
    assert texts(folder, tmp_path / "each", captions="each") == ["a cat", "two cats", "a dog", "a bird", "birds"]
    drawn = texts(folder, tmp_path / "random", captions="random")
    assert drawn == texts(folder, tmp_path / "again", captions="random")
    assert drawn[0] in SEVERAL[0] and drawn[1] == "a dog" and drawn[2] in ("a bird", "birds")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tfrecord"])
def test_training_draws_one_of_several_captions(kind, tmp_path):
    folder = write_several(tmp_path / "in", kind)
    found = [pair.caption for pair in open_source(folder).source().pairs(range(3))]
    assert list(found[0]) == ["a cat", "two cats"]
    assert found[1] == "a dog"
    assert [caption for caption in found[2] if caption.strip()] == ["a bird", "birds"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_and_captions_in_columns_of_any_kind_of_bytes(kind, tmp_path):
    (tmp_path / "in").mkdir()
    columns = {"image": pa.array([picture(1)], kind), "caption": pa.array(["ein Käfer".encode()], kind)}
    pq.write_table(pa.table(columns), tmp_path / "in" / "0.parquet")
    assert texts(tmp_path / "in", tmp_path / "out") == ["ein Käfer"]
    (found,) = open_source(tmp_path / "in").source().pairs([0])
    assert (bytes(found.image), found.caption) == (picture(1), "ein Käfer")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [pair(0, txt="\ufeffa cat", json=None)])
    assert texts(tmp_path / "in", tmp_path / "out") == ["a cat"]
    assert [found.caption for found in open_source(tmp_path / "in").source().pairs([0])] == ["a cat"]


def test_bytes_are_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    captions = ["ein Käfer".encode(), b"caf\xe9", b"a bird"]
    pq.write_table(pa.table({"photo": IMAGES, "caption": captions}), tmp_path / "in" / "0.parquet")
    assert texts(tmp_path / "in", tmp_path / "out") == ["ein Käfer", "a bird"]
    found = [pair.caption for pair in open_source(tmp_path / "in").source().pairs(range(3))]
    assert found == ["ein Käfer", "caf�", "a bird"]


@pytest.mark.parametrize("captions", [{"raw": "a", "lang": "en"}, [{"raw": "a", "lang": "en"}]])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tfrecord"])
def test_structs_are_refused_with_their_fields(kind, captions, tmp_path):
    folder = write_several(tmp_path / "in", kind, [captions] * 3)
    if kind == "json lines":
        lines = [json.dumps({"file_name": f"{i}.jpg", "text": captions}) for i in range(3)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="structs of raw, lang, not captions: put the text into a column of its own"):
        build_tfds(folder, tmp_path / "out", "pairs", progress=lambda _: None)
    with pytest.raises(UserError, match="structs of raw, lang"):
        list(open_source(folder).source().pairs(range(3)))


def test_a_column_called_caption_that_differs_from_txt_stays(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [pair(0, txt="synthetic", json={"caption": "alt text"})])
    summary = build_tfds(tmp_path / "in", tmp_path / "out", "pairs", progress=lambda _: None)
    example = open_dataset(summary.path).example(0)
    assert (example["txt"], example["caption"]) == ("synthetic", "alt text")


def test_each_caption_and_one_image_are_not_both_kept(tmp_path):
    write_several(tmp_path / "in", "tar")
    arguments = ["--name", "pairs", "--captions", "each", "--dedup", "sha256"]
    result = CliRunner().invoke(main, ["build-tfds", str(tmp_path / "in"), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert "--captions each makes several records of an image, and --dedup sha256 keeps one" in result.stderr
