"""Each kind of source gives the same pairs at any place, and faults end as promised."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_dataset import write_dataset
from source_kinds import CONFIG, TOTAL, caption, check_pairs, jpg, upload
from source_kinds import kind as kind
from source_kinds import own_places as own_places
from source_kinds import place as place
from source_kinds import written as written

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.records import RecordError
from clipkit.storage import cache as block_cache
from clipkit.storage.cache import BlockCache
from clipkit.train.loader.loader import batches
from clipkit.train.sources import open as opening
from clipkit.train.sources.ahead import AheadSource
from clipkit.train.sources.open import open_source, parse_data
from clipkit.train.sources.source import Pair


def test_every_pair_at_any_place(place: Path) -> None:
    source = open_source(place, block_size=8).source()
    check_pairs(source)
    check_pairs(pickle.loads(pickle.dumps(source)))


def test_through_a_cache_too(place: Path, tmp_path: Path) -> None:
    source = open_source(place, cache=tmp_path / "cache", cache_gb=0.01, block_size=8).source()
    check_pairs(source)
    check_pairs(source)
    assert BlockCache(tmp_path / "cache", 10_000_000).stored() > 0


def test_the_loader_gives_the_same_with_processes_and_threads(kind: str, written: dict[str, Path]) -> None:
    seen = []
    for workers, processes in ((0, False), (2, True)):
        source = open_source(upload(written[kind], f"memory://loader/{kind}") if not processes else written[kind])
        found = list(batches(source.source(), CONFIG, 0, 200, workers=workers, processes=processes))
        seen.append([(batch.records_B.tolist(), batch.image_BHWC.tobytes()) for batch in found])
    assert seen[0] == seen[1]


# ---- Faults ----------------------------------------------------------------------------------------------------------


def spoil(kind: str, place: Path, number: int) -> None:
    """Overwrite a piece in the middle of one record's image."""
    if kind == "folder":
        (place / "images" / f"{number}.jpg").write_bytes(b"no-image")
        return
    image = jpg(number)
    for file in sorted(place.iterdir()):
        if file.is_file() and (at := file.read_bytes().find(image)) >= 0:
            with file.open("r+b") as opened:
                opened.seek(at)
                opened.write(b"\0" * len(image))
            return
    raise AssertionError("not found")


def test_a_corrupted_record_is_replaced_and_counted(kind: str, place: Path) -> None:
    if kind == "parquet":  # snappy leaves no image as it is
        rewrite_plain(place)
    spoil(kind, place, 33)
    told: list[str] = []
    found = list(batches(open_source(place).source(), CONFIG, 0, TOTAL, workers=1, warn=told.append))
    assert sum(batch.bad for batch in found) == 1
    records = np.concatenate([batch.records_B for batch in found])
    counts = np.bincount(records, minlength=TOTAL)
    assert counts[33] == 0
    assert sorted(counts) == [0, *[1] * (TOTAL - 2), 2]
    assert len(told) == 1
    assert "33" in told[0]


def rewrite_plain(place: Path) -> None:
    for file in place.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table, file, row_group_size=20, compression="none", use_dictionary=False)


def test_a_row_group_that_can_not_be_decoded_is_replaced(written: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(written["parquet"], tmp_path / "data"))
    file = sorted(place.glob("*.parquet"))[0]
    chunk = pq.read_metadata(file).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(b"\xff" * chunk.total_compressed_size)
    told: list[str] = []
    config = replace(CONFIG, max_bad=0.1)
    found = list(batches(open_source(place).source(), config, 0, TOTAL, workers=1, warn=told.append))
    records = np.concatenate([batch.records_B for batch in found])
    assert sum(batch.bad for batch in found) == 20
    assert not set(records.tolist()) & set(range(20, 40))
    assert len(told) == 20
    assert all("row group 1 of" in line and "can't be decoded" in line and "\n" not in line for line in told)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_vanishes_ends_the_run_with_one_line(
    kind: str, place: Path, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_source(place, cache=tmp_path / "cache" if cached else None, block_size=8)
    monkeypatch.setattr(AheadSource, "_wish", lambda *_: None)  # else all may be there before it goes
    loader = batches(data.source(), CONFIG, 0, TOTAL, workers=1, prefetch=1)
    if kind == "folder":
        shutil.rmtree(place)
    else:
        shards = [
            file for file in sorted(place.iterdir()) if file.suffix in (".tar", ".parquet") or "record" in file.name
        ]
        shards[-1].unlink()
    with pytest.raises(UserError, match="is gone: put the") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_is_refetched_even_behind_the_checksum(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_dataset(written["dataset"], cache=BlockCache(tmp_path / "cache", 10_000_000), block_records=8)
    good = [found.read(i) for i in range(TOTAL)]
    for entry in (tmp_path / "cache").glob("??/*"):
        entry.write_bytes(bytes(entry.stat().st_size))
    # This process has checked them already, and holds them open: the record's own checksum finds it.
    assert [found.read(i) for i in range(TOTAL)] == good
    monkeypatch.setattr(block_cache, "_MAX_KNOWN", 0)
    path = written["dataset"] / found.shards[0].file
    assert path.exists()


def test_a_record_damaged_at_its_source_is_told_with_a_cache_too(written: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(written["dataset"], tmp_path / "data"))
    spoil("dataset", place, 5)
    found = open_dataset(place, cache=BlockCache(tmp_path / "cache", 10_000_000), block_records=8)
    with pytest.raises(RecordError, match="checksum"):
        found.read(5)
    assert found.read(4)


# ---- Labelled images -------------------------------------------------------------------------------------------------


def test_imagenets_classes_become_captions(tmp_path: Path) -> None:
    features = {"image": Feature("image"), "label": Feature("label", num_classes=1000), "file_name": Feature("text")}
    records = [{"image": jpg(n), "label": label, "file_name": f"{n}.JPEG"} for n, label in enumerate([0, 1, 999, 7000])]
    folder = write_dataset(tmp_path / "i", {"train": [records]}, features, name="imagenet2012", image="image")
    source = open_source(folder).source()
    found = list(source.pairs(range(4)))
    assert [each.caption for each in found[:3] if isinstance(each, Pair)] == [
        "a photo of a tench",
        "a photo of a goldfish",
        "a photo of a toilet paper",
    ]
    assert "no known class" in str(found[3])
    (folder / "label.labels.txt").write_text("red_panda\ncat\n")
    found = list(open_source(folder).source().pairs([0, 1]))
    assert [each.caption for each in found if isinstance(each, Pair)] == ["a photo of a red panda", "a photo of a cat"]


# ---- What --data says ------------------------------------------------------------------------------------------------


def test_mixtures_by_weight_and_by_size(written: dict[str, Path]) -> None:
    mixed = open_source([f"{written['tars']}=0.75", f"{written['dataset']}=0.25"])
    records = mixed.source().records_at(np.arange(400, dtype=np.uint64), 0, 8)
    assert (records < TOTAL).sum() == 300
    assert mixed.identity()["mixture"][0]["weight"] == "3/4"
    other = open_source([f"{written['tars']}=0.7", f"{written['dataset']}=0.3"])
    assert other.identity() != mixed.identity()
    by_size = open_source([str(written["tars"]), str(written["folder"])])
    assert [str(weight) for weight in by_size.weights] == ["160", "160"]
    check = list(by_size.source().pairs([0, TOTAL]))
    assert [found.caption for found in check if isinstance(found, Pair)] == [caption(0), caption(0)]
    assert by_size.source().key(TOTAL).startswith("folder: metadata.csv:0")


def test_the_identity_of_a_dataset_is_as_checkpoints_have_it(written: dict[str, Path]) -> None:
    data = open_source(written["dataset"])
    assert data.identity() == {"name": "pairs", "split": "train", "records": TOTAL}
    assert data.places() == str(written["dataset"])


def test_a_weight_is_told_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "a=3").mkdir()
    assert parse_data(f"{tmp_path}/a=3") == opening.DataOption(tmp_path / "a=3", None)
    assert parse_data("data=0.7") == opening.DataOption(Path("data"), opening.Fraction(7, 10))
    assert parse_data("s3://bucket/x=2").weight == 2
    for wrong in ("data=0", "data=-1", "data=x", "data=nan", "data=1/0"):
        with pytest.raises(UserError, match="a number above 0"):
            parse_data(wrong)


def nothing(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def two_tables(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("file_name,text\nx,y\n")
    return tmp_path / "two"


def no_caption(tmp_path: Path, written: dict[str, Path]) -> Any:
    (tmp_path / "t.csv").write_text("file_name,similarity\nx,1\n")
    return tmp_path / "t.csv"


REFUSED: dict[str, Callable[[Path, dict[str, Path]], Any]] = {
    "isn't a dataset, and holds nothing else to train on": nothing,
    "holds several tables": two_tables,
    "has no column with captions": no_caption,
    "doesn't exist: check the path": lambda tmp_path, written: tmp_path / "none",
    "some --data have a weight and some don't": lambda _, written: [f"{written['tars']}=1", str(written["folder"])],
    "no --data given": lambda *_: [],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_not_be_trained_on_is_one_line(message: str, tmp_path: Path, written: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_source(REFUSED[message](tmp_path, written))
    assert "\n" not in str(caught.value)


# ---- Training ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_data_and_weights_alone(written: dict[str, Path], tmp_path: Path) -> None:
    from clipkit.config import to_json
    from clipkit.train.catalogue import debug
    from clipkit.train.start import changes_on_resume

    tar, other = str(written["tars"]), str(written["folder"])
    identity = open_source([f"{tar}=0.75", f"{other}=0.25"]).identity()
    state = {"dataset": json.loads(json.dumps(identity))}
    (tmp_path / "config.json").write_text(json.dumps({"recipe": to_json(debug())}))
    start: Any = SimpleNamespace(path=tmp_path, samples_seen=64, state=state)
    same = open_source([f"{tar}=3", f"{other}=1"])  # the same weights, written otherwise
    assert changes_on_resume(start, debug(), same, False) == []
    for data in ([f"{tar}=0.5", f"{other}=0.5"], [tar], [f"{other}=0.75", f"{tar}=0.25"]):
        with pytest.raises(UserError, match="was trained on another dataset"):
            changes_on_resume(start, debug(), open_source(data), False)


def test_the_command_hands_over_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from clipkit.cli.main import main
    from clipkit.train import loop
    from clipkit.train.run import Summary

    told: dict[str, Any] = {}

    def train(recipe: Any, data: Any, out: Path, **options: Any) -> Any:
        told.update(options, data=data)
        return Summary(out, None, 0, 0.0, 0.0, True, False)

    monkeypatch.setattr(loop, "train", train)
    arguments = ["train", "--recipe", "debug", "--out", str(tmp_path), "--data", "a=0.7", "--data", "s3://b/c=0.3"]
    result = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "c"), "--cache-gb", "2.5"])
    assert result.exit_code == 0, result.output
    assert (told["data"], told["cache"], told["cache_gb"]) == (("a=0.7", "s3://b/c=0.3"), tmp_path / "c", 2.5)


def test_what_to_do_with_a_folder_that_holds_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("flat/a.jpg", "classes/cat/a.jpg", "classes/dog/a.jpg", "other/a.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name, says in {
        "empty": "to train on: it is empty: check the path, or make a dataset there with clipkit build-tfds",
        "flat": "(.jpg 1): put a table beside the images, metadata.csv with the columns file_name and caption",
        "classes": "(2 folders: cat, dog): where its folders are classes, make a dataset of them with clipkit build-im",
        "other": "(.mp4 1): clipkit reads a dataset directory",
    }.items():
        with pytest.raises(UserError) as caught:
            open_source(tmp_path / name)
        assert says in str(caught.value) and "\n" not in str(caught.value)
