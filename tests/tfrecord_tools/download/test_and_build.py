"""A dataset made straight from URLs is the one that building from downloaded tars gives."""

from pathlib import Path

import pyarrow.parquet as pq
from download_site import examples, fetch, site, table

from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.build.command import build_tfds


def test_dataset_is_what_building_from_tars_gives(tmp_path: Path) -> None:
    with site() as base_url:
        pq.write_table(table(base_url), tmp_path / "urls.parquet")
        straight = fetch(tmp_path / "urls.parquet", tmp_path / "straight", preset="laion400m").out
        fetch(tmp_path / "urls.parquet", tmp_path / "tars", preset="laion400m", format="webdataset")
    built = build_tfds(tmp_path / "tars", tmp_path / "built", "laion400m").path
    assert examples(straight) == examples(built) and len(examples(built)) == 3
    assert open_dataset(straight).features == open_dataset(built).features
    assert (straight / "features.json").read_bytes() == (built / "features.json").read_bytes()
