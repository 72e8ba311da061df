"""Token ids and word classes are read only where the manifest says that clipkit computed them."""

import json
from pathlib import Path

import pytest
from image_shards import pair, write_tar

from clipkit.formats.dataset import open_dataset
from clipkit.formats.manifest import manifest_path, precomputed_columns
from clipkit.text.tokenizer import Tokenizer
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.train.sources.open import open_source

OWN = [{"tokens": 6, "syntax": 1}, {"tokens": [6, 7], "syntax": [0, 0]}, {"tokens": "six", "syntax": "none"}]


@pytest.fixture(params=OWN, ids=["numbers", "lists", "text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Tars whose metadata have columns called as the options of --precompute."""
    write_tar(tmp_path / "in" / "0.tar", [pair(i, txt=f"thing {i}", json=request.param) for i in range(3)])
    return tmp_path / "in"


def ids_of(data: Path) -> list[list[int] | None]:
    source = open_source(data).source(precomputed=True)
    return [found.ids for found in source.pairs(range(source.num_records))]


def test_a_tables_own_columns_are_not_believed(folder: Path, tmp_path: Path) -> None:
    summary = build_tfds(folder, tmp_path / "out", "x", progress=lambda _: None)
    assert ids_of(summary.path) == ids_of(folder) == [None] * 3


@pytest.mark.parametrize("wanted", [["tokens"], ["tokens", "syntax"]])
def test_what_was_precomputed_stands_beside_them(wanted: list[str], folder: Path, tmp_path: Path) -> None:
    plain = open_dataset(build_tfds(folder, tmp_path / "plain", "x", progress=lambda _: None).path)
    summary = build_tfds(folder, tmp_path / "out", "x", precompute=wanted, progress=lambda _: None)
    assert ids_of(summary.path) == Tokenizer().encode([f"thing {i}" for i in range(3)])
    dataset = open_dataset(summary.path)
    for i in range(3):
        assert {name: dataset.example(i)[name] for name in ("tokens", "syntax")} == {
            name: plain.example(i)[name] for name in ("tokens", "syntax")
        }
    source = open_source(summary.path).source(precomputed=True)
    priorities = [found.priorities for found in source.pairs(range(3))]
    assert (priorities == [None] * 3) == ("syntax" not in wanted)


def test_a_dataset_of_an_older_clipkit_is_believed_by_its_manifest(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", [pair(0, json={"tokens": [320]})])
    summary = build_tfds(tmp_path / "in", tmp_path / "out", "x", progress=lambda _: None)
    manifest = json.loads(manifest_path(summary.path).read_text())
    manifest["splits"]["train"]["options"] = {"precompute": ["tokens"]}
    manifest_path(summary.path).write_text(json.dumps(manifest))
    assert ids_of(summary.path) == [[320]]
    assert precomputed_columns({"precompute": ["tokens", "syntax"]}, ["tokens", "clipkit_syntax"]) == {
        "tokens": "tokens",
        "syntax": "clipkit_syntax",
    }
    assert precomputed_columns({}, ["clipkit_tokens"]) == {}
