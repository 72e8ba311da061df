import json

import numpy as np
import pytest
from image_shards import pair, picture, write_tar
from tensorflow_process import with_tensorflow

from clipkit.formats.dataset import shard_name
from clipkit.formats.features import Feature, parse_features
from clipkit.formats.manifest import ShardEntry, SplitManifest
from clipkit.pixels import images
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.writing.metadata import dataset_info_json, features_json

FEATURES = {
    "jpg": Feature("image"),
    "txt": Feature("text"),
    "width": Feature("int"),
    "seen": Feature("bool"),
    "similarity": Feature("float"),
    "stars": Feature("int", optional=True),
    "score": Feature("float", optional=True),
    "licence": Feature("text", optional=True),
    "sizes": Feature("int", is_list=True),
    "scores": Feature("float", is_list=True),
    "tags": Feature("text", is_list=True),
}

TFDS_FEATURES = """
import json
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
f = tfds.features
f.FeaturesDict({
    "jpg": f.Image(),
    "txt": f.Text(),
    "width": f.Scalar(np.int64),
    "seen": f.Scalar(np.bool_),
    "similarity": f.Scalar(np.float32),
    "stars": f.Scalar(np.int64, optional=True),
    "score": f.Scalar(np.float32, optional=True),
    "licence": f.Scalar(np.str_, optional=True),
    "sizes": f.Sequence(f.Scalar(np.int64)),
    "scores": f.Sequence(f.Scalar(np.float32)),
    "tags": f.Sequence(f.Text()),
}).save_config(arguments[0])
result = json.loads((Path(arguments[0]) / "features.json").read_text())
"""

READ_WITH_TFDS = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
split = builder.info.splits["train"]

def plain(value):
    value = value.numpy() if hasattr(value, "numpy") else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value

dataset = builder.as_dataset(split="train", shuffle_files=False, read_config=tfds.ReadConfig(interleave_cycle_length=1))
result = {
    "name": builder.name,
    "version": str(builder.version),
    "shard_lengths": list(split.shard_lengths),
    "num_bytes": int(split.num_bytes),
    "num_examples": split.num_examples,
    "cardinality": int(dataset.cardinality()),
    "types": {name: [str(spec.dtype.name), len(spec.shape)] for name, spec in dataset.element_spec.items()},
    "examples": [{name: plain(value) for name, value in example.items()} for example in dataset],
    "batched": plain(next(iter(dataset.map(lambda e: e["stars"]).batch(3)))),
    "slice": [plain(example["key"]) for example in builder.as_dataset(split="train[1:3]")],
}
"""

READ_WITH_TF_DATA = """
import tensorflow as tf
files = sorted(tf.io.gfile.glob(arguments[0] + "/*.tfrecord-*"))
spec = {
    "txt": tf.io.FixedLenFeature([], tf.string),
    "width": tf.io.FixedLenFeature([], tf.int64),
    "stars": tf.io.VarLenFeature(tf.int64),
}
result = []
for record in tf.data.TFRecordDataset(files):
    parsed = tf.io.parse_single_example(record, spec)
    row = [parsed["txt"].numpy().decode(), int(parsed["width"]), parsed["stars"].values.numpy().tolist()]
    result.append(row)
"""


def test_features_are_written_as_tfds_writes_them(tmp_path):
    assert features_json(FEATURES) == with_tensorflow(TFDS_FEATURES, tmp_path)


def test_features_come_back():
    assert parse_features(features_json(FEATURES)) == FEATURES
    in_memory = {
        "type": "FeaturesDict",
        "content": features_json(FEATURES)["featuresDict"],
        "proto_cls": "FeaturesDict",
    }
    assert parse_features(in_memory) == FEATURES


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """Two shards with records and an empty one between; values missing here and there, images of three formats."""
    folder = tmp_path_factory.mktemp("metadata")
    write_tar(
        folder / "shards" / "0.tar",
        [
            pair(0, json={"stars": 4, "score": None, "licence": None, "seen": True, "sizes": [1, 2], "tags": ["é"]}),
            pair(1, jpg=picture(1, "PNG"), json={"stars": None, "score": 0.5, "seen": False, "sizes": []}),
        ],
    )
    write_tar(folder / "shards" / "1.tar", [])
    write_tar(
        folder / "shards" / "2.tar",
        [pair(2, jpg=picture(2, "WEBP"), json={"stars": -1, "licence": "CC-BY", "seen": True, "late": False})],
    )
    # A third of the line of bytes, the middle one in what pads the first tar, and the empty tar.
    third = sum(tar.stat().st_size for tar in (folder / "shards").iterdir()) / 3
    return build_tfds(folder / "shards", folder / "out", "Some_pairs", shard_megabytes=third / 1e6).path


def test_tfds_opens_and_reads_what_was_built(version):
    read = with_tensorflow(READ_WITH_TFDS, version)
    assert (read["name"], read["version"]) == ("Some_pairs", "1.0.0")
    assert (read["shard_lengths"], read["num_examples"], read["cardinality"]) == ([2, 0, 1], 3, 3)
    assert read["num_bytes"] == sum(path.stat().st_size for path in version.glob("*.tfrecord-*"))
    assert read["types"] == {
        "jpg": ["uint8", 3],
        "txt": ["string", 0],
        "url": ["string", 0],
        "key": ["string", 0],
        "width": ["int64", 0],
        "height": ["int64", 0],
        "similarity": ["float32", 0],
        "seen": ["bool", 0],
        "late": ["int64", 0],
        "stars": ["int64", 0],
        "score": ["float32", 0],
        "licence": ["string", 0],
        "sizes": ["int64", 1],
        "tags": ["string", 1],
    }
    no_int, no_float = -(2**63), float(np.finfo(np.float32).min)
    columns = ("key", "txt", "seen", "late", "stars", "score", "licence", "sizes", "tags")
    assert [[example[name] for name in columns] for example in read["examples"]] == [
        ["000000000", "picture number 0", True, no_int, 4, no_float, "", [1, 2], ["é"]],
        ["000000001", "picture number 1", False, no_int, no_int, 0.5, "", [], []],
        ["000000002", "picture number 2", True, 0, -1, no_float, "CC-BY", [], []],
    ]
    assert (read["batched"], read["slice"]) == ([4, no_int, -1], ["000000001", "000000002"])
    for number, image_format in enumerate(("JPEG", "PNG", "WEBP")):
        pixels_HWC = np.array(read["examples"][number]["jpg"])
        expected = images.decode(picture(number, image_format)).astype(int)
        assert pixels_HWC.shape == expected.shape
        assert np.abs(pixels_HWC - expected).mean() < 3


def test_tf_data_reads_it_without_tfds_and_missing_is_missing(version):
    assert with_tensorflow(READ_WITH_TF_DATA, version) == [
        ["picture number 0", 16, [4]],
        ["picture number 1", 16, []],
        ["picture number 2", 16, [-1]],
    ]


def test_counts_stand_in_the_metadata_as_strings():
    shards = tuple(ShardEntry(shard_name("pairs", "train", i, 2), 3 + i, 100, "00000000") for i in range(2))
    info = dataset_info_json("pairs", {"train": SplitManifest(shards), "test": SplitManifest(shards[:1])})
    assert json.loads(json.dumps(info)) == info
    assert [(part["name"], part["numBytes"], part["shardLengths"]) for part in info["splits"]] == [
        ("test", "100", ["3"]),
        ("train", "200", ["3", "4"]),
    ]
    assert shards[1].file == "pairs-train.tfrecord-00001-of-00002"
