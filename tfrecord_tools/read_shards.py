"""Image shards of any kind that clipkit reads, behind one function: a file in, samples out.

A further kind is one more file with a reader, and one more line in `READERS`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from clipkit.errors import UserError
from clipkit.tfrecord_tools.read_tar import read_tar
from clipkit.tfrecord_tools.read_tfrecord import read_tfrecord
from clipkit.tfrecord_tools.sample import Sample

READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    ".tar": read_tar,
    ".tfrecord": read_tfrecord,
}


def find_shards(path: Path) -> list[Path]:
    """The shards of a folder by name, all of one kind, or the one file `path`.

    Raises UserError when there are none, and for a folder that `clipkit download` hasn't finished: the rest would be
    lost without a word.
    """
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(f"{path} isn't an image shard: clipkit reads {', '.join(READERS)} files")
        return [path]
    if not path.is_dir():
        raise UserError(f"shards {path} don't exist: check the path, or make them with clipkit download")
    if (path / "clipkit" / "plan.json").exists() and not (path / "clipkit" / "download.json").exists():
        raise UserError(f"the download into {path} isn't finished: run the same clipkit download command to its end")
    files = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith("."))
    kinds = sorted({file.suffix for file in files})
    if not files:
        raise UserError(f"{path} holds no image shards ({', '.join(READERS)}): make them with clipkit download")
    if len(kinds) > 1:
        raise UserError(f"{path} holds both {' and '.join(kinds)} shards: name a folder with one kind, or one file")
    return files


def read_shard(path: Path) -> Iterator[Sample]:
    """The samples of one image shard, in the order of the file. Raises UserError when it is damaged or gone."""
    try:
        yield from READERS[path.suffix](path)
    except FileNotFoundError as error:
        raise UserError(f"image shard {path} is gone: put it back and run the same command again") from error
