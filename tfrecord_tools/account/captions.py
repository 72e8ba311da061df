"""What `clipkit add-captions` has added to a dataset: the counts of each source, in `clipkit/captions.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.manifest import CLIPKIT_FOLDER
from clipkit.storage.files import read_json, write_json


def read_added(folder: Path) -> dict[str, dict[str, Any]]:
    """The account of each source of captions that were added to the dataset in `folder`; {} where none were."""
    path = _path(folder)
    return dict(read_json(path)) if path.exists() else {}


def write_added(folder: Path, source: str, account: Mapping[str, Any]) -> None:
    """Write down what was added of a source."""
    write_json(_path(folder), read_added(folder) | {source: dict(account)})


def refuse_added_captions(folder: Path) -> None:
    """Raise UserError where captions were added to what a download has made: a shard that is fetched again has none."""
    if _path(folder).exists():
        raise UserError(
            f"{folder} has captions of clipkit add-captions, which shards that are fetched again would lose: download "
            "into another folder, and add captions at the end"
        )


def _path(folder: Path) -> Path:
    return folder / CLIPKIT_FOLDER / "captions.json"
