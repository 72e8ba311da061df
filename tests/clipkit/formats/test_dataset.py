import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from image_shards import pair, picture, write_tar
from small_dataset import PAIR_FEATURES, pair_columns, write_dataset

import clipkit.storage.ranges
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.records import RecordError, read_records
from clipkit.storage.cache import BlockCache
from clipkit.storage.files import as_path
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.inspection.figures import inspect
from clipkit.tfrecord_tools.verify.command import verify
from clipkit.train.sources.open import open_source


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three shards with 3, 0 and 4 records, the middle one empty."""
    folder = tmp_path_factory.mktemp("built")
    numbers = iter(range(7))
    features = PAIR_FEATURES | {"width": Feature("int"), "height": Feature("int")}
    shards = [
        [pair_columns(n, jpg=picture(n), width=16, height=16 + n % 3) for n in islice(numbers, count)]
        for count in (3, 0, 4)
    ]
    write_dataset(folder / "out" / "pairs" / "1.0.0", {"train": shards}, features)
    return folder / "out"


@pytest.fixture
def version(built, tmp_path):
    """A copy of the dataset to be spoilt."""
    shutil.copytree(built, tmp_path / "out")
    return tmp_path / "out" / "pairs" / "1.0.0"


def test_every_record_by_number_in_any_order(built):
    dataset = open_dataset(built)
    assert (len(dataset), dataset.num_records, dataset.name, dataset.split) == (7, 7, "pairs", "train")
    assert [shard.records for shard in dataset.shards] == [3, 0, 4]
    in_order = [record for shard in dataset.shards for record in read_records(dataset.path / shard.file)]
    assert [dataset.read(i) for i in reversed(range(7))] == in_order[::-1]
    assert dataset.key(2) == "pairs-train.tfrecord-00000-of-00003:2"
    assert dataset.key(3) == "pairs-train.tfrecord-00002-of-00003:0"
    for i in (-1, 7):
        with pytest.raises(IndexError):
            dataset.read(i)


def test_an_example_has_python_values(built):
    example = open_dataset(built).example(5)
    assert example == {
        "jpg": picture(5),
        "txt": "picture number 5",
        "url": "http://example.org/5.jpg",
        "key": "000000005",
        "width": 16,
        "height": 18,
        "similarity": 0.625,
    }


def test_missing_values_lists_and_bools(tmp_path):
    columns = [{"tags": ["a", "é"], "flag": True, "n": 1}, {"tags": [], "flag": False, "n": None}, {"flag": True}]
    write_tar(tmp_path / "0.tar", [pair(i, json=extra) for i, extra in enumerate(columns)])
    build_tfds(tmp_path / "0.tar", tmp_path / "out", "pairs")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.features["n"] == Feature("int", optional=True)
    assert dataset.features["flag"] == Feature("bool")
    assert dataset.features["tags"] == Feature("text", is_list=True)
    found = [{name: dataset.example(i)[name] for name in ("tags", "flag", "n")} for i in range(3)]
    assert found == [
        {"tags": ["a", "é"], "flag": True, "n": 1},
        {"tags": [], "flag": False, "n": None},
        {"tags": None, "flag": True, "n": None},
    ]


def test_opening_touches_no_shard_and_reading_keeps_few_open(built, monkeypatch):
    monkeypatch.setattr(clipkit.storage.ranges, "_MAX_OPEN", 1)
    dataset = open_dataset(built)
    assert not dataset._files._open
    records = [dataset.read(i) for i in range(7)]
    assert len(dataset._files._open) == 1
    with ThreadPoolExecutor(8) as pool:  # shards close under other readers' hands
        assert list(pool.map(dataset.read, list(range(7)) * 100)) == records * 100


def test_a_pickled_dataset_reads_the_same(built):
    dataset = open_dataset(built)
    dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.read(i) for i in range(7)] == [dataset.read(i) for i in range(7)]
    assert copy.features == dataset.features


def test_a_directory_that_clipkit_did_not_write_opens_too(version):
    expected = [open_dataset(version).read(i) for i in range(7)]
    shutil.rmtree(version / "clipkit")
    dataset = open_dataset(version)
    assert [dataset.read(i) for i in range(7)] == expected
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["3", "0", "5"]
    (version / "dataset_info.json").write_text(json.dumps(info))
    dataset = open_dataset(version)
    assert dataset.read(0) == expected[0]
    with pytest.raises(UserError, match=r"00002-of-00003 holds 4 records where dataset_info\.json says 5"):
        dataset.read(3)


def test_the_parent_of_one_dataset_is_enough_and_of_two_is_not(version):
    for path in (version, version.parent, version.parent.parent, str(version)):
        assert open_dataset(path).path == version
    shutil.copytree(version, version.parent / "2.0.0")
    with pytest.raises(UserError, match=r"holds 2 datasets: name one of them, such as .*1\.0\.0"):
        open_dataset(version.parent)


def test_a_split_of_another_name(version):
    with pytest.raises(UserError, match="no split 'test': choose one of train"):
        open_dataset(version, "test")


def spoil_file_format(version):
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))


def spoil_counts(version):
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["7"]
    (version / "dataset_info.json").write_text(json.dumps(info))


SPOILT = {
    r"has no dataset_info\.json.*clipkit build-tfds": lambda v: (v / "dataset_info.json").unlink(),
    r"has no features\.json.*clipkit build-tfds": lambda v: (v / "features.json").unlink(),
    r"isn't valid JSON": lambda v: (v / "features.json").write_text("{"),
    r"has metadata that isn't TFDS's": lambda v: (v / "features.json").write_text("{}"),
    r"isn't a manifest": lambda v: (v / "clipkit" / "manifest.json").write_text('{"splits": {"train": {}}}'),
    r"shard .*00002-of-00003 is missing": lambda v: (v / "pairs-train.tfrecord-00002-of-00003").unlink(),
    r"shard .*00000-of-00003 has 0 bytes where the manifest says \d+": lambda v: (
        v / "pairs-train.tfrecord-00000-of-00003"
    ).write_bytes(b""),
    r"index-train\.npy knows 2 records where the shards hold 7": lambda v: np.save(
        v / "clipkit" / "index-train.npy", np.zeros(2, np.uint64)
    ),
    r"index-train\.npy isn't an index": lambda v: (v / "clipkit" / "index-train.npy").write_bytes(b"no index"),
    r"holds array_record files and clipkit reads tfrecord": spoil_file_format,
    r"dataset_info\.json and clipkit/manifest\.json differ": spoil_counts,
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_spoilt_directory_gets_one_clear_line(version, message):
    SPOILT[message](version)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(version)
    assert "\n" not in str(caught.value)


def test_no_directory_and_an_unfinished_one(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "pairs" / "1.0.0" / "clipkit" / "build-train").mkdir(parents=True)
    with pytest.raises(UserError, match="isn't finished: run the same clipkit build-tfds command again"):
        open_dataset(tmp_path / "pairs")


WORK = {
    "clipkit/plan.json": (
        "{}",
        "the download into {folder} isn't finished: run the same clipkit download command to its end",
    ),
    "clipkit/build-train/plan.json": (
        '{"images": "00", "shards": 2}',
        "{folder} isn't finished: run the same clipkit build-imagenet command again to go on",
    ),
    "clipkit/build-train/plan.json ": (
        '{"name": "pairs", "in_place": []}',
        "{folder} isn't finished: run the same clipkit build-tfds command again to go on",
    ),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("reader", [open_dataset, open_source, verify, inspect])
def test_what_is_not_finished_names_its_command(tmp_path, name, depth, reader):
    """Train, verify and inspect are sent back to the command that has begun it."""
    contents, message = WORK[name]
    folder = tmp_path / "pairs" / "1.0.0"
    file = folder / name.strip()
    file.parent.mkdir(parents=True)
    file.write_text(contents)
    with pytest.raises(UserError) as caught:
        reader([folder, folder.parent, tmp_path][depth])
    assert str(caught.value) == message.format(folder=folder)


def test_a_download_in_another_form_is_no_dataset_though_finished(tmp_path):
    for name in ("plan.json", "download.json"):
        (tmp_path / "clipkit").mkdir(exist_ok=True)
        (tmp_path / "clipkit" / name).write_text("{}")
    with pytest.raises(UserError, match=r"has no dataset_info\.json, so it isn't a dataset"):
        open_dataset(tmp_path)


def test_a_damaged_record_names_shard_and_byte_and_leaves_the_others(version):
    dataset = open_dataset(version)
    shard = version / dataset.shards[2].file
    offset = int(dataset.offsets(2)[1])
    contents = bytearray(shard.read_bytes())
    contents[offset + 50] ^= 1
    shard.write_bytes(contents)
    with pytest.raises(RecordError, match=rf"00002-of-00003: .*byte {offset}") as caught:
        dataset.read(4)
    assert (caught.value.path, caught.value.offset) == (shard, offset)
    assert dataset.example(5)["txt"] == "picture number 5"


def test_a_shard_cut_short_or_gone_during_use(version):
    dataset = open_dataset(version)
    dataset.read(0)
    shard = version / dataset.shards[0].file
    with shard.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(RecordError, match="ends inside a record"):
        dataset.read(1)
    (version / dataset.shards[2].file).unlink()
    with pytest.raises(UserError, match=r"00002-of-00003 is gone"):
        dataset.read(6)


def test_features_of_tfdss_own_datasets_and_their_class_names(version):
    package = "tensorflow_datasets.core.features"
    imagenet = {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {"pythonClassName": f"{package}.image_feature.Image", "image": {"encodingFormat": "jpeg"}},
                "label": {
                    "pythonClassName": f"{package}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": "1000"},
                },
                "file_name": {"pythonClassName": f"{package}.text_feature.Text", "text": {}},
                "box": {"pythonClassName": f"{package}.bounding_boxes.BBoxFeature", "boundingBox": {}},
            }
        },
    }
    assert parse_features(imagenet) == {
        "image": Feature("image", encoding="jpeg"),
        "label": Feature("label", num_classes=1000),
        "file_name": Feature("text"),
        "box": Feature("other", is_list=True),
    }
    assert open_dataset(version).label_names() is None
    for text in ("n01440764\nn01443537\n", "n01440764\nn01443537", "n01440764\r\nn01443537\r\n"):  # as edited by hand
        (version / "label.labels.txt").write_bytes(text.encode())
        assert open_dataset(version).label_names() == ["n01440764", "n01443537"]


def test_a_purge_that_is_not_finished_is_refused(version):
    (version / "clipkit" / "purge.json").write_text("{}")
    with pytest.raises(UserError, match="a purge isn't finished, run the same clipkit purge command again"):
        open_dataset(version)


def test_a_shard_that_changed_after_opening_is_noticed(version):
    """Its records no longer stand where the index says, and one of them may stand where another stood."""
    dataset = open_dataset(version)
    path = version / dataset.shards[0].file
    path.write_bytes(path.read_bytes()[dataset.offsets(0)[1] :])
    with pytest.raises(UserError, match="has changed since the dataset was opened"):
        dataset.read(0)


def test_a_dataset_in_a_store_reads_as_on_the_disk(built):
    local = open_dataset(built)
    store = as_path("memory://test-dataset/pairs")
    for file in local.path.rglob("*"):
        if file.is_file():
            target = store / file.relative_to(local.path).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    remote = open_dataset(store)
    assert [remote.read(i) for i in range(7)] == [local.read(i) for i in range(7)]
    assert pickle.loads(pickle.dumps(remote)).example(6) == local.example(6)
    (store / "clipkit" / "index-train.npy").unlink()
    assert open_dataset("memory://test-dataset").read(6) == local.read(6)
    (store / local.shards[2].file).unlink()
    with pytest.raises(UserError, match="is missing: put it back or build it again"):
        open_dataset(store)


def test_a_cache_keeps_nothing_of_shards_that_were_made_again(tmp_path):
    """Those of TFDS have no checksums, and new labels or captions may leave their size as it was."""
    for text in ("one", "two"):
        shards = [[pair_columns(n, txt=f"{text} {n}") for n in range(4)]]
        folder = write_dataset(tmp_path / "data", {"train": shards}, manifest=False)
        dataset = open_dataset(folder, cache=BlockCache(tmp_path / "cache", 10_000_000))
        assert [dataset.example(i)["txt"] for i in range(4)] == [f"{text} {n}" for n in range(4)]
