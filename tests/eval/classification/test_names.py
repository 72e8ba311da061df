"""Names of classes: one rule for folders, datasets and files of names; what may mean two things is told."""

import json
from pathlib import Path

import pytest

from clipkit.errors import UserError
from clipkit.eval.classification.labels import class_name, name_classes

HERE = Path("here")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dog_face", "dog face"),
        ("hot_dog__big", "hot dog big"),
        (" a  b\t", "a b"),
        ("dog face", "dog face"),
        ("_", "_"),
    ],
)
def test_one_rule_for_names(tmp_path: Path, text: str, name: str) -> None:
    assert class_name(text) == name
    assert name_classes([text], HERE).names == ((name,),)
    file = tmp_path / "names.json"
    for content in ([text], {"x": text}, {"x": [text, "other"]}):
        file.write_text(json.dumps(content), encoding="utf-8")
        assert name_classes(["x"], HERE, file).names[0][0] == name


@pytest.mark.parametrize(
    ("labels", "names", "unknown"),
    [
        (["n01440764", "n01443537"], ["tench", "goldfish"], []),
        (["n01440764", "n03613294"], ["tench", "n03613294"], ["n03613294"]),
        (["background", "n01440764"], ["background", "tench"], ["background"]),
        (["n02085620-Chihuahua", "n02091831-Saluki", "n99999999-big_dog"], ["Chihuahua", "Saluki", "big dog"], []),
        (["n01440764_tench", "n99999999"], ["tench", "n99999999"], ["n99999999"]),
        (["n99999998", "n99999999"], ["n99999998", "n99999999"], ["n99999998", "n99999999"]),
        (["nothing", "n1"], ["nothing", "n1"], []),
    ],
)
def test_known_wnids_keep_their_names_and_unknown_ones_are_told(labels, names, unknown) -> None:
    classes = name_classes(labels, HERE)
    assert [each[0] for each in classes.names] == names
    assert bool(classes.notes) == bool(unknown)
    if unknown:
        text = f"here: {len(unknown)} of {len(labels)} classes aren't among ImageNet's"
        assert classes.notes[0].startswith(text)
        assert f"({', '.join(unknown)}): name them with --classes" in classes.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
        "n01440764\nn01443537\n",
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
    ],
)
def test_wnids_are_no_names(tmp_path: Path, content: str) -> None:
    """As Keras' `imagenet_class_index.json` and the lists of synsets have them: half of a class's prompts, or all."""
    file = tmp_path / "names.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"names a class 'n01440764.*', a WordNet id, which no prompt can use"):
        name_classes(["0", "1"], HERE, file, numbers=True)


def test_imagenets_own_equal_names_are_a_remark_in_a_file_only(tmp_path: Path) -> None:
    from clipkit import embedded

    entries = embedded.imagenet_classes()
    wnids = [entry["wnid"] for entry in entries]
    assert name_classes(wnids, HERE).notes == ()
    (tmp_path / "names.json").write_text(json.dumps([entry["name"] for entry in entries]), encoding="utf-8")
    (note,) = name_classes(wnids, HERE, tmp_path / "names.json").notes
    assert "'missile' and 1 more names are of several classes" in note


@pytest.mark.parametrize("labels", [["dog face", "dog_face"], ["Rose", "rose"]])
def test_equal_names_are_told(labels: list[str]) -> None:
    (note,) = name_classes(labels, HERE).notes
    assert f"here: '{class_name(labels[0]).lower()}' is of several classes" in note


LISTS = {
    "names.txt": "red panda\ncat\n",
    "windows.txt": "\ufeffred_panda\r\ncat\r\n\r\n",
    "no suffix": "red panda\ncat",
    "names.json": '["red_panda", "cat"]',
    "bom.json": '\ufeff["red panda", "cat"]',
    "json.txt": ' ["red panda", ["cat"]]',
}


@pytest.mark.parametrize("file", LISTS)
def test_lists_of_names(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(LISTS[file].encode())
    # In label order for numbers, of which not all need to occur, and for labels that it doesn't list …
    for labels, numbers in ((["0", "1"], True), (["0"], True), (["x", "y"], False)):
        assert name_classes(labels, HERE, tmp_path / file, numbers=numbers).names == (("red panda",), ("cat",))
    # … and of the labels themselves, whatever their order.
    classes = name_classes(["cat", "red_panda"], HERE, tmp_path / file)
    assert (classes.labels, classes.names) == (("red_panda", "cat"), (("red panda",), ("cat",)))
    assert name_classes(["cat"], HERE, tmp_path / file).labels == ("red panda", "cat")
    with pytest.raises(UserError, match=r"lists some labels of here, such as 'cat', but not 'dog'"):
        name_classes(["cat", "dog"], HERE, tmp_path / file)
    with pytest.raises(UserError, match=r"names 2 classes, here has 3"):
        name_classes(["0", "1", "2"], HERE, tmp_path / file, numbers=True)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.json", '{"0": "dog", "1": "cat", "0": "pizza"}', "has the class '0' twice, as 'dog' and 'pizza'"),
        ("a.json", '{"0": "dog", "1": " "}', "class '1' has no name"),
        ("a.json", '{"0": "dog", "1": ["", "x"]}', "class '1' has no name"),
        ("a.json", '["dog", ""]', "place 2 has no name"),
        ("a.txt", "dog\n\ncat\n", "place 2 has no name"),
        ("a.txt", "\n", "place 1 has no name"),
        ("a.json", '{"0": "dog"', "isn't valid JSON"),
        ("a.json", "[" * 5000, "isn't valid JSON"),
        ("a.json", "3", "isn't a list of names or an object"),
        ("a.json", "[]", "isn't a list of names or an object"),
        ("a.txt", b"caf\xe9\ndog", "isn't UTF-8 text"),
    ],
)
def test_bad_files_of_names_get_one_line(tmp_path: Path, file: str, content: str | bytes, says: str) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as caught:
        name_classes(["0", "1"], HERE, tmp_path / file, numbers=True)
    assert "\n" not in str(caught.value)


def test_a_name_of_two_classes_in_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"0": ["crane", "bird"], "1": "Crane"}', encoding="utf-8")
    assert "'crane' is of several classes" in name_classes(["0", "1"], HERE, tmp_path / "a.json").notes[0]
    (tmp_path / "a.txt").write_text("cat\ncat\n", encoding="utf-8")
    assert "'cat' is of several classes" in name_classes(["0", "1"], HERE, tmp_path / "a.txt", numbers=True).notes[0]
    with pytest.raises(UserError, match="gives the class 'cat' twice"):
        name_classes(["cat"], HERE, tmp_path / "a.txt")


def test_two_labels_of_one_name_and_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("dog face\n", encoding="utf-8")
    with pytest.raises(UserError, match="lists some labels of here"):
        name_classes(["dog face", "dog_face"], HERE, tmp_path / "a.txt")


def test_many_classes_take_no_time(tmp_path: Path) -> None:
    labels = [f"class {number:06d}" for number in range(50_000)]
    (tmp_path / "a.json").write_text(json.dumps(dict.fromkeys(labels, "x")), encoding="utf-8")
    assert len(name_classes(labels, HERE, tmp_path / "a.json").names) == 50_000
