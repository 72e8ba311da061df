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
