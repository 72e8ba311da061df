"""Tables of labels as spreadsheets, pandas and Kaggle write them: names are matched to files, or refused."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from image_shards import picture
from labelled_sources import write_heap

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.labelled.imagenet import build_imagenet
from clipkit.tfrecord_tools.labelled.labels import label_images
from clipkit.tfrecord_tools.labelled.listing import Image

CLASSES = {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "cat"}
IMAGES = [Image("heap", name, -1, 1, "") for name in CLASSES]
SAME = list(CLASSES.values())


def labels(folder: Path, text: str | bytes, images=IMAGES) -> list[str]:
    file = folder / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [image.label for image in label_images(images, [], folder, file)[0]]


@pytest.mark.parametrize(
    "text",
    [
        '"1.jpg","cat"\n"2.jpg","dog"\n"3.jpg","cat"\n',
        b"\xef\xbb\xbf1.jpg,cat\r\n2.jpg,dog\r\n3.jpg,cat\r\n",
        b"\xef\xbb\xbf" + b'"1.jpg";"cat"\n"2.jpg";"dog"\n"3.jpg";"cat"\n',
        "1.jpg;cat\n3.jpg;cat\n2.jpg;dog\n",
        "1.jpg\tcat\n2.jpg\tdog\n3.jpg\tcat",
        "1.jpg cat\n2.jpg dog\n3.jpg cat",
        "cat,1.jpg\ndog,2.jpg\ncat,3.jpg\n",
        "cat\t3.jpg\ndog\t2.jpg\ncat\t1.jpg\n",
        "1.png,cat\n2.png,dog\n3.png,cat\n",
        "1,cat\n2,dog\n3,cat\n",
        "1.JPG,cat\n2.JPG,dog\n3.JPG,cat\n",
        "images/1.jpg,cat\nimages\\2.jpg,dog\n/data/3.jpg,cat\n",
        "file_name,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n",
        "id,breed\n1,cat\n2,dog\n3,cat\n",
        ",file,label\n0,1.jpg,cat\n1,2.jpg,dog\n2,3.jpg,cat\n",
        "filename,label,split\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,cat,train\n",
        "label,filename,width\ncat,1.jpg,7\ndog,2.jpg,8\ncat,3.jpg,9\n",
        "cat\ndog\ncat\n",
        '"cat"\r\n"dog"\r\n"cat"\r\n',
        b"\xef\xbb\xbfcat\ndog\ncat",
    ],
)
def test_tables_of_labels(tmp_path, text) -> None:
    assert labels(tmp_path, text) == SAME


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,cat,test\n", r"has 3 columns, and beside .*\('cat', 'test'\)"),
        ("file,label,split\n1.jpg,cat,train\n2.jpg,dog,test\n3.jpg,cat,test\n", r"several splits \(test, train\)"),
        ("a.jpg,cat\nb.jpg,dog\nc.jpg,cat\n", r"names 'a\.jpg', which isn't an image there; one is called 1\.jpg"),
        ("a.jpg;cat\nb.jpg;dog\nc.jpg;cat\n", r"names 'a\.jpg'"),
        ("a.jpg cat\nb.jpg dog\nc.jpg cat\n", r"names 'a\.jpg'"),
        ("img_1 cat\nimg_2 dog\nimg_3 cat\n", r"names 'img_1'"),
        ("a,cat\nb,dog\nc,cat\n", r"names 'a', which isn't an image"),
        ("1.jpg\n2.jpg\n3.jpg\n", r"names '1\.jpg'"),
        ("1.jpg,cat\n2.jpg,dog\n", "has no class for 3.jpg"),
        ("1.jpg,cat\n2.jpg,dog\n3.jpg,\n", "has no class for 3.jpg"),
        ("1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n4.jpg,cat\n", r"names '4\.jpg', which isn't an image there"),
        ("1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n1.jpg,dog\n", r"gives 1\.jpg two classes, 'cat' and 'dog'"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('"cat\ndog\ncat\n', "quotes that aren't closed"),
        ("cat\ndog\n", "has 2 labels for 3 images"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_an_example(tmp_path, text, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        labels(tmp_path, text)
    assert "\n" not in str(caught.value)


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text == text.strip())


@given(
    st.lists(TEXTS, min_size=2, max_size=5),
    st.sampled_from(",;\t"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    st.booleans(),
    st.booleans(),
)
@example([";", ";"], "\t", csv.QUOTE_MINIMAL, False, True)
@example([";", ";"], "\t", csv.QUOTE_MINIMAL, False, False)
@example([";", ";"], "\t", csv.QUOTE_MINIMAL, True, True)
@example([";", ";"], "\t", csv.QUOTE_MINIMAL, True, False)
@example([",", ","], ";", csv.QUOTE_MINIMAL, True, False)
def test_what_csv_writes_reads_back_equal(tmp_path_factory, names, delimiter, quoting, header, first) -> None:
    images = [Image("heap", f"picture {number}.jpg", -1, 1, "") for number in range(len(names))]
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting)
    rows = [(image.name, name) for image, name in zip(images, names, strict=True)]
    writer.writerows(row if first else row[::-1] for row in [("file_name", "label")] * header + rows)
    assert labels(tmp_path_factory.mktemp("labels"), written.getvalue(), images) == names


def test_the_class_names_of_a_dataset_come_from_the_table(tmp_path) -> None:
    write_heap(tmp_path / "heap", {name: picture(number) for number, name in enumerate(CLASSES)})
    (tmp_path / "quoted.csv").write_text('"1.jpg","cat"\n"2.jpg","dog"\n"3.jpg","cat"\n')
    path = build_imagenet(tmp_path / "heap", tmp_path / "out", name="x", labels=tmp_path / "quoted.csv").path
    dataset = open_dataset(path)
    assert dataset.label_names() == ["cat", "dog"]
    assert {row["file_name"]: row["label"] for row in map(dataset.example, range(3))} == {
        "1.jpg": 0,
        "2.jpg": 1,
        "3.jpg": 0,
    }


def test_lines_of_classes_are_refused_where_the_order_of_the_names_isnt_sure(tmp_path):
    images = [Image("heap", f"{number}.jpg", -1, 1, "") for number in range(1, 12)]
    with pytest.raises(UserError, match=r"that of 2\.jpg depends on whether 10 comes before 2"):
        labels(tmp_path, "cat\n" * 2 + "dog\n" * 9, images)
    assert labels(tmp_path, "cat\n" + "dog\n" * 10, images) == ["cat", *["dog"] * 10]
    padded = [image._replace(name=image.name.zfill(6)) for image in images]
    assert labels(tmp_path, "cat\n" * 2 + "dog\n" * 9, padded) == [*["cat"] * 2, *["dog"] * 9]


def test_labels_of_images_in_class_folders_are_refused(tmp_path):
    """A heap may lie in numbered folders: their names would be the classes, and the labels forgotten."""
    for number in range(2):
        write_heap(tmp_path / "heap" / f"{number:03d}", {f"{number}.jpg": picture(number)})
    (tmp_path / "labels.csv").write_text("0.jpg,cat\n1.jpg,dog\n")
    with pytest.raises(UserError, match=r"is for images in one heap, and those of .* lie in folders"):
        build_imagenet(tmp_path / "heap", tmp_path / "out", name="pets", labels=tmp_path / "labels.csv")
    write_heap(tmp_path / "both" / "train" / "cat", {"1.jpg": picture(1)})
    write_heap(tmp_path / "both" / "val", {"0.jpg": picture(0), "1.jpg": picture(1)})
    summary = build_imagenet(tmp_path / "both", tmp_path / "out", name="pets", labels=tmp_path / "labels.csv")
    assert [split.records for split in summary.splits] == [1, 2]


def test_labels_that_were_mended_are_not_taken_for_the_old_ones(tmp_path):
    write_heap(tmp_path / "heap", {name: picture(1) for name in CLASSES})
    (tmp_path / "labels.csv").write_text("1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n")

    def build():
        return build_imagenet(tmp_path / "heap", tmp_path / "out", name="pets", labels=tmp_path / "labels.csv")

    assert build().splits[0].built
    assert not build().splits[0].built
    (tmp_path / "labels.csv").write_text("1.jpg,dog\n2.jpg,cat\n3.jpg,dog\n")
    with pytest.raises(UserError, match="already holds a split 'train' made from other images or labels: remove it"):
        build()
    # An older clipkit didn't keep the labels.
    manifest = tmp_path / "out" / "pets" / "1.0.0" / "clipkit" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"images":', '"older":'))
    assert not build().splits[0].built
