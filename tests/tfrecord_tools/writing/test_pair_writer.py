"""No value of a user's table is lost to another column of the same stored name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import picture

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.build.command import build_tfds


def build(folder: Path, **columns: str) -> Path:
    pairs = pa.table({"image": [picture(1)], "caption": ["a dog"], **{name: [each] for name, each in columns.items()}})
    pq.write_table(pairs, folder / "pairs.parquet")
    return build_tfds(folder / "pairs.parquet", folder / "out", name="pairs", caption_column="caption").path


def test_a_column_that_gives_way_keeps_its_value(tmp_path: Path) -> None:
    dataset = open_dataset(build(tmp_path, txt="beside"))
    assert (dataset.example(0)["txt"], dataset.example(0)["table_txt"]) == ("a dog", "beside")


def test_a_column_of_the_stored_name_stays(tmp_path: Path) -> None:
    assert open_dataset(build(tmp_path, table_txt="mine")).example(0)["table_txt"] == "mine"


def test_two_columns_of_one_stored_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'txt' is stored as 'table_txt', which is there too: rename one"):
        build(tmp_path, txt="beside", table_txt="mine")


NUMBERS = {
    "ids of pandas beside a gap": ([2741800501.0, None, 12.0], ["2741800501", None, "12"], "text"),
    "times": ([1700000000.5, None, None], ["1700000000.5", None, None], "text"),
    "too large for a float32": ([1e300, None, None], [str(10**300 + (int(1e300) - 10**300)), None, None], "text"),
    "sizes that float32 holds": ([16777216.0, 2.0**40, None], [16777216.0, 2.0**40, None], "float"),
    "lists of ids and fractions": ([[2741800501.0, 0.5], None, [2]], [["2741800501", "0.5"], None, ["2"]], "text"),
    "lists that float32 holds": ([[16777216.0, -0.5], None, [2]], [[16777216.0, -0.5], None, [2.0]], "float"),
    "similarities": ([0.25, None, 0.5], [0.25, None, 0.5], "float"),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("stretches", [1, 3])
def test_a_number_is_never_another_in_the_record(tmp_path: Path, name: str, stretches: int) -> None:
    """Records have no fractions but float32, which makes 2741800448 of 2741800501."""
    given, stored, kind = NUMBERS[name]
    (tmp_path / "in").mkdir()
    for number in range(stretches):
        rows = slice(None) if stretches == 1 else slice(number, number + 1)
        table = {"image": [picture(1)] * 3, "caption": ["a dog"] * 3, "id": pa.array(given)}
        pq.write_table(pa.table(table)[rows], tmp_path / "in" / f"{number}.parquet")
    dataset = open_dataset(build_tfds(tmp_path / "in", tmp_path / "out", name="pairs").path)
    assert [dataset.example(place).get("id") for place in range(3)] == stored
    assert dataset.features["id"].kind == kind


def test_whole_numbers_beside_fractions_of_another_shard_stay(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, value in enumerate([2741800501, 0.5]):
        table = pa.table({"image": [picture(1)], "caption": ["a dog"], "value": [value]})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    dataset = open_dataset(build_tfds(tmp_path / "in", tmp_path / "out", name="pairs").path)
    assert [dataset.example(place)["value"] for place in range(2)] == ["2741800501", "0.5"]
