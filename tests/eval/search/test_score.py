"""A table of scores holds the cosine of each image and its caption, under the keys by which a build chooses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_dataset import PAIR_FEATURES, pair_columns, write_dataset
from small_encoder import small_run

import clipkit
from clipkit.cli.main import main
from clipkit.cli.search import open_pictures
from clipkit.errors import UserError
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.eval.search.score import score
from clipkit.formats.dataset import open_dataset
from clipkit.tfrecord_tools.build.command import build_tfds

RECORDS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), seed=3)


def records(**changes):
    return [pair_columns(number, txt=f"a caption {number * 7}", **changes) for number in range(RECORDS)]


@pytest.fixture
def data(tmp_path) -> Path:
    """Pairs in two shards."""
    return write_dataset(tmp_path / "pairs" / "1.0.0", {"train": [records()[:17], records()[17:]]})


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_the_best_by_a_model_are_kept(model, data, tmp_path):
    done = run("score", data, "--ckpt", model, "--device", "cpu", "--precision", "float32", "--batch-size", 7, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    table = data / "clipkit" / "scores-train.parquet"
    assert (told["path"], told["records"], told["scored"]) == (str(table), RECORDS, RECORDS)
    loaded = clipkit.load(model, device="cpu")
    image_NE = loaded.encode_image([record["jpg"] for record in records()])
    cosine_N = (image_NE * loaded.encode_text([record["txt"] for record in records()])).sum(axis=1)
    rows = pq.read_table(table)
    np.testing.assert_allclose(rows["similarity"], cosine_N, atol=1e-5)
    assert rows["key"].to_pylist() == [f"{number:09d}" for number in range(RECORDS)]
    assert rows["problem"].null_count == RECORDS and told["mean"] == pytest.approx(cosine_N.mean(), abs=1e-5)
    build_tfds(data, tmp_path / "out", "best", keep_best=0.3, by=str(table), progress=lambda _: None)
    best = open_dataset(tmp_path / "out")
    kept = sorted(int(best.example(place)["key"]) for place in range(len(best)))
    assert kept == sorted(np.argsort(-np.asarray(rows["similarity"]), kind="stable")[:9].tolist())


def test_records_without_keys_are_named_as_a_build_names_them(model, tmp_path):
    features = {name: feature for name, feature in PAIR_FEATURES.items() if name != "key"}
    unnamed = [{name: value for name, value in record.items() if name != "key"} for record in records()]
    data = write_dataset(tmp_path / "pairs" / "1.0.0", {"train": [unnamed[:11], unnamed[11:]]}, features)
    summary = score(open_pictures(str(data), "train", None), None, model, device="cpu")
    built = build_tfds(data, tmp_path / "out", "best", keep_best=0.5, by=str(summary.path), progress=lambda _: None)
    assert built.records == 15


def test_single_records_without_a_key_have_one_too(model, tmp_path):
    """As a build names them, and not all of them alike."""
    named = records()
    del named[3]["key"], named[8]["key"]
    named[5]["key"] = named[9]["key"] = []
    data = write_dataset(tmp_path / "pairs" / "1.0.0", {"train": [named]})
    summary = score(open_pictures(str(data), "train", None), None, model, device="cpu")
    build_tfds(data, tmp_path / "out", "best", keep_best=0.99, by=str(summary.path), progress=lambda _: None)
    best = open_dataset(tmp_path / "out")
    assert [best.example(place)["key"] for place in range(len(best))] == pq.read_table(summary.path)["key"].to_pylist()
    assert len(best) == RECORDS


def test_a_run_that_was_stopped_goes_on(model, data):
    pictures = open_pictures(str(data), "train", None)
    how = {"device": "cpu", "batch_size": 4, "part_rows": 8}
    path = score(pictures, None, model, **how).path
    whole = path.read_bytes()
    path.unlink()

    def broken(first):
        for place, picture in enumerate(pictures.read(first), first):
            if place == 20:
                raise KeyboardInterrupt
            yield picture

    with pytest.raises(KeyboardInterrupt):
        score(dataclasses.replace(pictures, read=broken), None, model, **how)
    assert not path.exists()
    score(pictures, None, model, **how)
    assert path.read_bytes() == whole
    assert score(pictures, None, model, **how).scored == RECORDS
    other = run("score", data, "--ckpt", small_run(data.parent / "other", seed=9), "--device", "cpu")
    assert other.exit_code == 2 and "exists and has scores of another model: remove it" in other.stderr


def test_what_has_no_score_is_a_row_with_its_reason(model, tmp_path):
    images = [record["jpg"] for record in records()]

    def pictures(captions, bad=None):
        def read(first):
            return (
                Picture(b"no image" if place == bad else images[place % RECORDS], captions(place))
                for place in range(first, 120)
            )

        return Pictures(Path("set"), 120, str, read, "identity", captioned=True)

    out = tmp_path / "out.parquet"
    score(pictures(lambda place: () if place == 3 else ("a cat",), bad=5), out, model, device="cpu")
    rows = pq.read_table(out).to_pylist()
    assert [place for place, row in enumerate(rows) if row["similarity"] is None] == [3, 5]
    assert rows[3]["problem"] == "no caption" and rows[5]["problem"]
    with pytest.raises(UserError, match="7 has 2 captions, and a score is of one"):
        several = pictures(lambda place: ("a", "b") if place == 7 else ("a",))
        score(several, tmp_path / "several.parquet", model, device="cpu")
    with pytest.raises(UserError, match="say with --out where to write"):
        score(pictures(lambda place: ("a",)), None, model, device="cpu")
    with pytest.raises(UserError, match="has no captions to compare its images with"):
        labelled = dataclasses.replace(pictures(lambda place: ()), captioned=False)
        score(labelled, out, model, device="cpu")
