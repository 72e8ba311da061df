"""Labels of any type that people's tables have: whole numbers are numbers, bytes are texts, the rest is refused."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.eval.classification.labelled import open_labelled
from clipkit.eval.classification.labels import MOST_CLASSES, enumerate_labels

NUMBERS = [12, 0, 3, 10, 2, 3]
SPELLINGS = {
    "int": lambda number: number,
    "float": float,
    "float32": lambda number: float(np.float32(number)),
    "decimal": lambda number: Decimal(f"{number}.00"),
    "text": str,
    "text of a float": lambda number: f"{number}.0",
    "bytes": lambda number: str(number).encode(),
    "bytes of a float": lambda number: f"{number}.0".encode(),
    "list of one": lambda number: [number],
    "padded": lambda number: f" {number}\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_whole_numbers_are_numbers_whatever_their_type(spelling: str) -> None:
    labels = enumerate_labels([SPELLINGS[spelling](number) for number in NUMBERS], "here")
    assert labels.labels_N.tolist() == NUMBERS
    assert (labels.names, labels.named) == (tuple(map(str, range(13))), False)


@given(st.lists(st.integers(0, 9_999), min_size=1), st.sampled_from(sorted(SPELLINGS)))
def test_every_number_keeps_its_value(numbers: list[int], spelling: str) -> None:
    assert enumerate_labels([SPELLINGS[spelling](number) for number in numbers], "here").labels_N.tolist() == numbers


@pytest.mark.parametrize("change", [str, str.encode, lambda text: [text]], ids=["text", "bytes", "list of one"])
def test_texts_are_sorted(change) -> None:
    labels = enumerate_labels([change(text) for text in ("zebra", "ant", "café", "3", "ant")], "here")
    assert labels.names == ("3", "ant", "café", "zebra")
    assert labels.labels_N.tolist() == [3, 1, 2, 0, 1]
    assert labels.named


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"name": "cat", "id": 3}, "is a struct of name, id, neither"),
        ([1, 2], "is a list of 2, neither"),
        ([], "is a list of 0, neither"),
        ([[1]], "is a list of 1, neither"),
        (0.5, "0.5 is of type float"),
        (float("inf"), "inf is of type float"),
        (Decimal("1.5"), "is of type Decimal"),
        (b"\xff\xfe", "isn't UTF-8 text"),
        (-1, "-1 is negative"),
        ("-1", "-1 is negative"),
        (4_000_000_000, "4,000,000,001 classes are more than the 1,000,000"),
        ("99999999999999999999999", "are more than the 1,000,000"),
        ("01", "labels '01' and '1' are one number"),
    ],
)
def test_what_is_no_class_is_refused_with_its_type(value: object, says: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{says}") as caught:
        enumerate_labels([1, value], "here")
    assert "\n" not in str(caught.value)


def test_as_many_texts_as_rows_are_ids() -> None:
    with pytest.raises(UserError, match="so these are ids: choose the column of classes with --label"):
        enumerate_labels([f"id-{number}" for number in range(MOST_CLASSES + 1)], "here")


ARROW = {
    "int64": pa.int64(),
    "int8": pa.int8(),
    "uint16": pa.uint16(),
    "float64": pa.float64(),
    "float32": pa.float32(),
    "float16": pa.float16(),
    "decimal": pa.decimal128(9, 2),
    "list": pa.list_(pa.int64()),
    "large list": pa.large_list(pa.float32()),
    "fixed list": pa.list_(pa.int32(), 1),
    "string": pa.string(),
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
}


@pytest.mark.parametrize("kind", ARROW)
def test_labels_of_parquet(tmp_path: Path, kind: str) -> None:
    made: list[object] = list(NUMBERS)
    if "list" in kind:
        made = [[number] for number in NUMBERS]
    elif kind in ("string", "dictionary"):
        made = [str(number) for number in NUMBERS]
    elif "binary" in kind:
        made = [str(number).encode() for number in NUMBERS]
    elif kind == "float16":
        made = [np.float16(number) for number in NUMBERS]
    table = {"image": pa.array([b"x"] * len(NUMBERS), pa.binary()), "label": pa.array(made, ARROW[kind])}
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    images = open_labelled(tmp_path / "d.parquet")
    assert images.labels_N.tolist() == NUMBERS
    assert not images.named


@pytest.mark.parametrize(
    "labels", [["a", None], ["a", ""], ["a", "  "], [1.0, float("nan")], [b"a", b""], [[1], [None]]], ids=str
)
def test_rows_without_a_label_are_named(tmp_path: Path, labels: list[object]) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": labels}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet row 1 has no 'label'"):
        open_labelled(tmp_path / "d.parquet")
