"""Captioned images of every kind are the same images with the same captions; bad input gets its one line."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import UserError
from clipkit.eval.retrieval.captioned import CaptionedImages, open_captioned
from clipkit.formats.records import RecordWriter, encode_example

FILES = {"a.jpg": ["two dogs run", "dogs, running"], "b.jpg": ["a cat"], "c.jpg": ["3 birds", 'a "red" bird', "birds"]}


def picture(name: str) -> bytes:
    return f"picture {name}".encode()


def found(images: CaptionedImages) -> list[tuple[bytes, list[str]]]:
    assert len(images.keys) == len(images.captions)
    return list(zip(images.read(), images.captions, strict=True))


EXPECTED = [(picture(name), captions) for name, captions in FILES.items()]


def write_images(folder: Path, names: Any = FILES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(picture(name))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tfds(folder: Path, rows: list[dict[str, Any]], split: str = "test", lists: bool = False) -> Path:
    folder = folder / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    with RecordWriter(folder / f"pairs-{split}.tfrecord-00000-of-00001") as writer:
        for row in rows:
            writer.write(encode_example(row))
    package = "tensorflow_datasets.core.features."
    text: dict[str, Any] = {"pythonClassName": f"{package}text_feature.Text", "text": {}}
    if lists:
        text = {"pythonClassName": f"{package}sequence_feature.Sequence", "sequence": {"feature": text, "length": "-1"}}
    features = {"jpg": {"pythonClassName": f"{package}image_feature.Image", "image": {}}, "txt": text}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    splits = [{"name": split, "shardLengths": [str(len(rows))]}]
    (folder / "dataset_info.json").write_text(json.dumps({"name": "pairs", "splits": splits}))
    return folder.parent


# ---- Files that name the images --------------------------------------------------------------------------------------


def karpathy(others: bool = True) -> dict[str, Any]:
    entries = [
        {"filepath": "val2014", "filename": name, "split": "test", "sentences": [{"raw": text} for text in captions]}
        for name, captions in FILES.items()
    ]
    more = {"filepath": "train2014", "filename": "x.jpg", "split": "restval", "sentences": [{"raw": "an x"}]}
    return {"dataset": "coco", "images": [more, *entries] if others else entries}


LAYOUTS: dict[str, Any] = {
    "karpathy.json": karpathy(others=False),
    "captions_val.json": {
        "images": [{"id": 7 + place, "file_name": name} for place, name in enumerate(FILES)],
        "annotations": [
            {"image_id": 7 + place, "caption": text} for place, texts in enumerate(FILES.values()) for text in texts
        ],
    },
    "lavis.json": [{"image": f"val2014/{name}", "caption": captions} for name, captions in FILES.items()],
    "xtd.json": {"image_paths": [f"old/place/{name}" for name in FILES], "annotations": list(FILES.values())},
    "rows.jsonl": "\n".join(json.dumps({"file_name": n, "caption": each}) for n, c in FILES.items() for each in c),
    "lists.jsonl": "\n".join(json.dumps({"file_name": n, "captions": c}) for n, c in FILES.items()),
    "results.token": "".join(f"{n}#{i}\t{each}\n" for n, c in FILES.items() for i, each in enumerate(c)),
    "results.csv": "image_name| comment_number| comment\n"
    + "".join(f"{n}| {i}| {each}\n" for n, c in FILES.items() for i, each in enumerate(c)),
    "test_karpathy.txt": "image,caption\n" + "".join(f"{n},{each}\n" for n, c in FILES.items() for each in c),
    "quoted.csv": "image,caption\n"
    + "".join(f'{n},"{each.replace(chr(34), chr(34) * 2)}"\n' for n, c in FILES.items() for each in c),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("place", ["", "images"])
def test_layouts_of_files(tmp_path: Path, name: str, place: str) -> None:
    content = LAYOUTS[name]
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    write_images(tmp_path / place)
    images = open_captioned(tmp_path / name)
    assert found(images) == EXPECTED
    assert images.name == (f"{Path(name).stem}-test" if name == "karpathy.json" else Path(name).stem)
    assert found(open_captioned(tmp_path)) == EXPECTED
    if place:
        assert found(open_captioned(tmp_path / name, images=tmp_path / place)) == EXPECTED


def test_a_lost_bar_in_flickrs_own_csv(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\na.jpg| 0| a dog\na.jpg| 4   A dog runs\n"
    )
    write_images(tmp_path, ["a.jpg"])
    assert open_captioned(tmp_path).captions == [["a dog", "A dog runs"]]


def test_the_splits_of_karpathy(tmp_path: Path) -> None:
    (tmp_path / "dataset_coco.json").write_text(json.dumps(karpathy()))
    write_images(tmp_path / "val2014")
    write_images(tmp_path / "train2014", ["x.jpg"])
    images = open_captioned(tmp_path / "dataset_coco.json")
    assert (images.name, found(images)) == ("dataset_coco-test", EXPECTED)
    assert images.notes[0].endswith("reading the split test; left aside: restval 1")
    restval = open_captioned(tmp_path / "dataset_coco.json", split="restval")
    assert (restval.name, restval.captions) == ("dataset_coco-restval", [["an x"]])
    with pytest.raises(UserError, match=r"has no split 'val': it has restval, test \(option --split\)"):
        open_captioned(tmp_path / "dataset_coco.json", split="val")


# ---- Datasets, tars and parquet --------------------------------------------------------------------------------------

ROWS = [(picture(name), text) for name, captions in FILES.items() for text in captions]


def test_records_of_build_tfds(tmp_path: Path) -> None:
    images = open_captioned(write_tfds(tmp_path, [{"jpg": image, "txt": text} for image, text in ROWS]))
    assert (images.name, found(images)) == ("pairs-test", EXPECTED)
    assert images.notes[0].endswith("6 captions of 3 images: equal images are one with several captions")


def test_records_with_lists(tmp_path: Path) -> None:
    rows = [{"jpg": image, "txt": captions} for image, captions in [*EXPECTED, EXPECTED[0]]]
    images = open_captioned(write_tfds(tmp_path, rows, lists=True))
    assert (found(images), images.notes) == ([*EXPECTED, EXPECTED[0]], ())  # each record is an image


@pytest.mark.parametrize("kind", ["txt", "list", "object"])
def test_tars_of_clip_benchmark(tmp_path: Path, kind: str) -> None:
    members: dict[str, bytes] = {}
    for place, (image, captions) in enumerate(EXPECTED):
        members[f"s{place}.webp"] = image
        if kind == "txt":
            members[f"s{place}.txt"] = "\n".join(captions).encode()
        else:
            members[f"s{place}.json"] = json.dumps(captions if kind == "list" else {"caption": captions}).encode()
    first, second = dict(list(members.items())[:4]), dict(list(members.items())[4:])
    write_tar(tmp_path / "coco" / "test" / "0.tar", first)
    write_tar(tmp_path / "coco" / "test" / "1.tar", second)
    (tmp_path / "coco" / "test" / "nshards.txt").write_text("2")
    (tmp_path / "coco" / "dataset_type.txt").write_text("retrieval")
    images = open_captioned(tmp_path / "coco")
    assert (images.name, images.keys, found(images)) == ("coco-test", ["0.tar:s0", "0.tar:s1", "1.tar:s2"], EXPECTED)
    with pytest.raises(UserError, match="has no split 'train'"):
        open_captioned(tmp_path / "coco", split="train")


def as_parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_a_row_a_caption(tmp_path: Path) -> None:
    order = [5, 0, 2, 3, 4, 1]  # the captions of an image needn't stand together
    struct = [{"bytes": ROWS[place][0], "path": None} for place in order]
    path = as_parquet(tmp_path / "pairs.parquet", image=struct, caption=[ROWS[place][1] for place in order])
    images = open_captioned(path)
    assert found(images) == [
        (picture("c.jpg"), ["birds", "3 birds", 'a "red" bird']),
        (picture("a.jpg"), ["two dogs run", "dogs, running"]),
        (picture("b.jpg"), ["a cat"]),
    ]


def test_parquet_with_lists_and_a_column_of_splits(tmp_path: Path) -> None:
    captions = [captions for _, captions in EXPECTED]
    images = [image for image, _ in EXPECTED]
    for number, splits in enumerate((["test", "train", "test"], ["train", "test", "val"])):
        as_parquet(tmp_path / "f" / f"{number}.parquet", image=images, captions=captions, split=splits)
    both = open_captioned(tmp_path / "f")
    assert (both.name, both.keys) == ("f-test", ["0.parquet:0", "0.parquet:2", "1.parquet:1"])
    assert found(both) == [EXPECTED[0], EXPECTED[2], EXPECTED[1]]
    assert found(open_captioned(tmp_path / "f", split="validation")) == [EXPECTED[2]]


def test_parquet_in_files_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        as_parquet(tmp_path / "f" / f"{split}-00000-of-00001.parquet", image=[split.encode()], caption=[["a dog"]])
    assert open_captioned(tmp_path / "f").name == "f-test"
    train = open_captioned(tmp_path / "f", split="train")
    assert (train.name, found(train)) == ("f-train", [(b"train", ["a dog"])])


# ---- Bad input -------------------------------------------------------------------------------------------------------


def refused(data: Path, says: str, **options: Any) -> None:
    with pytest.raises(UserError, match=says) as caught:
        list(open_captioned(data, **options).read())
    assert "\n" not in str(caught.value)


def test_images_that_are_missing_or_in_two_places(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"image": name, "caption": captions} for name, captions in FILES.items()]))
    refused(file, r"names images, such as a\.jpg, that aren't in .*: name their folder by --images")
    write_images(tmp_path / "one", ["a.jpg", "b.jpg"])
    refused(file, r"names 1 of 3 images that aren't in .*one, such as c\.jpg: put them there")
    write_images(tmp_path / "two")
    refused(file, "say which folder to take with --images")
    refused(file, "isn't a folder: give the folder with the images", images=tmp_path / "three")
    refused(file, "--split can't be heeded: .* names no splits", split="test")


@pytest.mark.parametrize("name", ["results.token", "results.csv", "test_karpathy.txt", "quoted.csv", "rows.jsonl"])
@pytest.mark.parametrize("place", ["", "images"])
@pytest.mark.parametrize("missing", [0, 40])
def test_no_image_is_left_out(tmp_path: Path, name: str, place: str, missing: int) -> None:
    """Fewer candidates make a better number. Folders are found by the first images, of which one may be missing."""
    form = {
        "results.token": "{0}#{1}\ta dog {1}",
        "results.csv": "{0}| {1}| a dog",
        "rows.jsonl": '{{"file_name": "{0}", "caption": "a dog {1}"}}',
    }.get(name, "{0},a dog {1}")
    head = {"results.csv": "image_name| comment_number| comment\n", "rows.jsonl": "", "results.token": ""}
    lines = [form.format(f"{image}.jpg", number) for image in range(50) for number in range(2)]
    (tmp_path / name).write_text(head.get(name, "image,caption\n") + "\n".join(lines))
    write_images(tmp_path / place, [f"{image}.jpg" for image in range(50) if image != missing])
    says = rf"names 1 of 50 images that aren't in .*, such as {missing}\.jpg: put them there"
    refused(tmp_path / name, says)
    refused(tmp_path, says)
    refused(tmp_path / name, says, images=tmp_path / place)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"image": "a.jpg", "caption": []}], r"the image a\.jpg has no caption"),
        ([{"image": "a.jpg", "caption": None}], r"the image a\.jpg has no caption"),
        ([{"image": "a.jpg", "caption": ["a dog", " "]}], "entry 0 has an empty caption"),
        ([{"image": "a.jpg"}], r"entry 0 has no image and caption \(image\)"),
        ([{"image": "a.jpg", "caption": {"en": "x"}}], "holds structs of en, not captions"),
        ([], "names no image"),
        ([3], "is of no layout that clipkit knows"),
        ({"a": 3}, "is of no layout that clipkit knows"),
        ({"image_paths": ["a.jpg"], "annotations": []}, "is of no layout that clipkit knows"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "b"}]},
            "has a caption of an image 2 that it doesn't name",
        ),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, r"the image a\.jpg has no caption"),
        (
            [{"image": "a.jpg", "caption": "x", "split": each} for each in ("test", "val")],
            r"the image a\.jpg is in two splits, 'test' and 'val'",
        ),
    ],
)
def test_bad_json(tmp_path: Path, content: object, says: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    write_images(tmp_path, ["a.jpg"])
    refused(tmp_path / "a.json", says)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "image,caption\na.jpg,x\nhello\n", "line 3 isn't an image's name and a caption: 'hello'"),
        ("a.txt", "b.jpg#0 a cat\na.jpg#0\tx\n", "line 1 isn't an image's name and a caption: 'b.jpg#0 a cat'"),
        ("a.token", "b#0\ta cat\na.jpg#0\tx\n", "line 1 isn't an image's name and a caption"),
        ("a.txt", "b.svg,a cat\na.jpg,x\n", "line 1 isn't an image's name and a caption: 'b.svg,a cat'"),
        ("a.txt", "image,caption\na.jpg,\n", "line 2 has an empty caption"),
        ("a.csv", "image,text2\na.jpg,x\n", r"has no column with captions \(image, text2\)"),
        ("a.xml", "<a/>", "can't tell what .* is: give a TFDS directory"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    write_images(tmp_path, ["a.jpg"])
    refused(tmp_path / name, says)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a.jpg": b"x"}, r"sample a has no caption \(\.txt or \.json\)"),
        ({"a.txt": b"x"}, "sample a has no image"),
        ({"a.jpg": b"x", "a.txt": b""}, "sample a has no caption"),
        ({"a.jpg": b"x", "a.txt": b"x\n\ny"}, "sample a has an empty caption"),
        ({"a.jpg": b"x", "a.json": b"{"}, r"sample a has a \.json that can't be read"),
        ({"a.jpg": b"x", "a.json": b'{"width": 3}'}, "sample a has no caption"),
        ({"a.md": b"x"}, "holds no sample of an image"),
    ],
)
def test_bad_tars(tmp_path: Path, members: dict[str, bytes], says: str) -> None:
    refused(write_tar(tmp_path / "0.tar", members), says)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [b"x", None], "caption": ["a", "b"]}, "row 1 has a caption without an image"),
        ({"image": [b"x"], "caption": pa.array([None], pa.string())}, "row 0 has an image without a caption"),
        ({"image": [b"x"], "caption": [["a", ""]]}, "row 0 has an empty caption"),
        ({"image": [b"x"], "words": ["a"]}, r"has no column with captions \(image, words\)"),
        ({"image": [b"x"], "caption": [{"en": "a"}]}, "holds structs of en, not captions"),
        ({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    refused(as_parquet(tmp_path / "a.parquet", **columns), says)


def test_what_holds_no_captions(tmp_path: Path) -> None:
    refused(tmp_path / "none", "doesn't exist")
    refused(tmp_path, "holds no images with captions")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    refused(tmp_path, r"several files that may name images \(a\.json, b\.json\)")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.tfrecord").write_bytes(b"")
    refused(tmp_path / "records", r"TFRecords without a dataset_info\.json")
    tfds = write_tfds(tmp_path / "tfds", [{"jpg": b"x", "txt": "a dog"}])
    refused(tfds, "--images can't be heeded", images=tmp_path)
    refused(tfds, "has no split 'train'", split="train")
    refused(write_tfds(tmp_path / "blank", [{"jpg": b"x", "txt": " "}]), "has an empty caption")
    refused(write_tfds(tmp_path / "no", [{"txt": "a"}]), "has a caption without an image")
    refused(write_tfds(tmp_path / "empty", []), "has no records")
