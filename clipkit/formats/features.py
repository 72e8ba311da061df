"""What a dataset's columns hold, as TFDS's `features.json` tells it.

Only what clipkit reads or writes is understood by name; a feature of another kind (a bounding box, a video) still has a
place here, so that a dataset with such columns opens, and its values come as plain lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clipkit.formats.tables import CAPTION_NAMES, IMAGE_NAMES, find_name

Kind = Literal["image", "text", "int", "float", "bool", "label", "other"]


@dataclass(frozen=True)
class Feature:
    """One column. `optional`: the key may be absent from a record, which means a missing value.

    `encoding` is the one format of all images (`jpeg` or `png`) where the dataset promises one.
    """

    kind: Kind
    optional: bool = False
    is_list: bool = False
    num_classes: int | None = None
    encoding: str | None = None

    def value(self, values: list[Any] | None) -> Any:
        """A record's value of this column in Python's types: str, bytes, int, float, bool, a list, None for missing."""
        if values is None:
            return None
        if self.kind == "text":
            values = [value.decode("utf-8", "replace") for value in values]
        elif self.kind == "bool":
            values = [bool(value) for value in values]
        if self.is_list:
            return values
        return values[0] if values else None


def parse_features(features_json: Mapping[str, Any]) -> dict[str, Feature]:
    """Columns by name from the contents of a `features.json`. Raises KeyError or TypeError when it isn't one."""
    content = features_json.get("content", features_json)
    features = content["featuresDict"]["features"] if "featuresDict" in content else content["features"]
    return {name: _parse(feature) for name, feature in features.items()}


def find_image(features: Mapping[str, Feature]) -> str | None:
    """The column with a record's image: by its usual names, else the first of that kind."""
    names = [name for name, feature in features.items() if feature.kind == "image" and not feature.is_list]
    return find_name(names, IMAGE_NAMES) or next(iter(names), None)


def find_caption(features: Mapping[str, Feature], lists: bool = False) -> str | None:
    """The column with a record's caption, with `lists` perhaps a list of several, by its usual names."""
    names = [name for name, feature in features.items() if feature.kind == "text" and (lists or not feature.is_list)]
    return find_name(names, CAPTION_NAMES)


def _parse(feature: Mapping[str, Any]) -> Feature:
    name = feature["pythonClassName"].rsplit(".", 1)[-1]
    if name == "Image":
        return Feature("image", encoding=feature.get("image", {}).get("encodingFormat") or None)
    if name == "Text":
        return Feature("text")
    if name == "ClassLabel":
        return Feature("label", num_classes=int(feature["classLabel"]["numClasses"]))
    if name == "Sequence":
        item = _parse(feature["sequence"]["feature"])
        return Feature(item.kind if not item.is_list else "other", is_list=True)
    tensor = feature.get("tensor")
    if tensor is None or tensor.get("encoding", "none") != "none":
        return Feature("other", is_list=True)
    shape = tensor.get("shape", {}).get("dimensions", [])
    return Feature(_kind_of(tensor["dtype"]), bool(tensor.get("optional")), is_list=bool(shape))


def _kind_of(dtype: str) -> Kind:
    if dtype == "bool":
        return "bool"
    if dtype in ("string", "object"):
        return "text"
    if dtype.startswith(("int", "uint")):
        return "int"
    return "float" if dtype.startswith(("float", "bfloat")) else "other"
