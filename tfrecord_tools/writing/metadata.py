"""Write the files by which TFDS knows a dataset, `dataset_info.json` and `features.json`, without TFDS.

Missing values. A missing value is a key that isn't in the record. TFDS reads such a record in two ways:
- `Scalar(dtype, optional=True)`, TFDS's own word for it. `as_dataset` gives the smallest value of the type (int64:
  -2**63, float32: -3.4e38) or "" for text, and the column keeps its type and its scalar shape, so it can be batched.
- `Sequence(dtype)` of length 0 or 1: tells a missing text from an empty one, but can't be batched, and each reader must
  unpack it.
clipkit writes the first, and only for columns in which a value is missing somewhere; the others are plain scalars.
Whoever must tell "" from missing reads the record itself (`clipkit.formats.dataset` gives None).
A bool column with missing values is declared as int64, for TFDS would read the missing ones as False. Missing lists are
read as empty ones. Floats are float32, as `tf.train.Example` has it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipkit.formats.dataset import VERSION
from clipkit.formats.features import Feature
from clipkit.formats.manifest import SplitManifest
from clipkit.storage.files import read_json, write_beside, write_json

DESCRIPTION = "Image-text pairs written by clipkit."
FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

_PACKAGE = "tensorflow_datasets.core.features"
_DTYPES = {"int": "int64", "float": "float32", "bool": "bool"}


def write_metadata(
    folder: Path,
    name: str,
    features: Mapping[str, Feature],
    splits: Mapping[str, SplitManifest],
    *,
    label_names: Mapping[str, Sequence[str]] | None = None,
    **info: Any,
) -> None:
    """Write the files; `dataset_info.json` last, since its presence says that the dataset is whole.

    `label_names` gives each label column its classes in label order; `info` is as in `dataset_info_json`.
    """
    for column, names in (label_names or {}).items():
        with write_beside(folder / f"{column}.labels.txt") as temporary:
            temporary.write_text("".join(f"{each}\n" for each in names), encoding="utf-8")
    write_json(folder / "features.json", features_json(features))
    write_json(folder / "dataset_info.json", dataset_info_json(name, splits, **info))


def add_feature(folder: Path, name: str, feature: Feature) -> None:
    """Declare one column more in `features.json`, clipkit's or TFDS's own, all else in it left as it is."""
    description = read_json(folder / "features.json")
    content = description.get("content", description)
    features = content["featuresDict"]["features"] if "featuresDict" in content else content["features"]
    features[name] = feature_json(feature)
    write_json(folder / "features.json", description)


def dataset_info_json(
    name: str,
    splits: Mapping[str, SplitManifest],
    *,
    version: str = VERSION,
    description: str = DESCRIPTION,
    supervised: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of `dataset_info.json`: TFDS's DatasetInfo message as JSON (64-bit numbers are strings there).

    `supervised` names the two columns, input and target, that TFDS's `as_supervised=True` returns.
    """
    info: dict[str, Any] = {
        "description": description,
        "fileFormat": "tfrecord",
        "name": name,
        "splits": [
            {
                "filepathTemplate": FILE_TEMPLATE,
                "name": split,
                "numBytes": str(manifest.bytes),
                "shardLengths": [str(shard.records) for shard in manifest.shards],
            }
            for split, manifest in sorted(splits.items())
        ],
        "version": version,
    }
    if supervised is not None:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": column} for column in supervised]}}
    return info


def features_json(features: Mapping[str, Feature]) -> dict[str, Any]:
    """The contents of `features.json`: TFDS's Feature message of a FeaturesDict as JSON."""
    return {
        "pythonClassName": f"{_PACKAGE}.features_dict.FeaturesDict",
        "featuresDict": {"features": {name: feature_json(feature) for name, feature in sorted(features.items())}},
    }


def feature_json(feature: Feature) -> dict[str, Any]:
    """One column as TFDS's Feature message has it."""
    if feature.is_list:
        item = feature_json(Feature(feature.kind))
        return {
            "pythonClassName": f"{_PACKAGE}.sequence_feature.Sequence",
            "sequence": {"feature": item, "length": "-1"},
        }
    if feature.kind == "image":
        image: dict[str, Any] = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}
        if feature.encoding is not None:
            image["encodingFormat"] = feature.encoding
        return {"pythonClassName": f"{_PACKAGE}.image_feature.Image", "image": image}
    if feature.kind == "label":
        return {
            "pythonClassName": f"{_PACKAGE}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(feature.num_classes)},
        }
    if feature.kind == "text" and not feature.optional:
        return {"pythonClassName": f"{_PACKAGE}.text_feature.Text", "text": {}}
    tensor: dict[str, Any] = {"shape": {}, "dtype": _DTYPES.get(feature.kind, "string"), "encoding": "none"}
    if feature.optional:
        tensor["optional"] = True
    return {"pythonClassName": f"{_PACKAGE}.scalar.Scalar", "tensor": tensor}
