"""Image shards of any kind that clipkit reads, behind one function: a file and a range in, samples out.

All shards in their order, one behind the other, are one line of bytes, which can be cut anywhere without looking at the
data. `places_in` tells a reader's own place (bytes of a tar or TFRecord file, rows of a table) for a byte of the line,
and a reader takes the samples that begin in [start, stop). So no sample is lost or doubled, wherever the cuts are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import UserError
from clipkit.formats.dataset import find_dataset, open_dataset, read_layout, refuse_unfinished_download
from clipkit.formats.features import find_image
from clipkit.formats.shards import ALL_SPLITS, SHARD_SUFFIXES, describe_files, list_shards
from clipkit.formats.tables import USUAL, PairColumns, is_hidden, is_table
from clipkit.storage.files import is_remote, local_copy, remove
from clipkit.storage.stores import list_folder, reading
from clipkit.tfrecord_tools.readers.parquet import (
    FolderSizes,
    copy_pairs,
    open_rows,
    read_folder,
    read_parquet,
    row_at,
    stored_columns,
)
from clipkit.tfrecord_tools.readers.records import columns_left_out as features_left_out
from clipkit.tfrecord_tools.readers.records import dataset_features, read_dataset, read_tfrecord
from clipkit.tfrecord_tools.readers.tar import read_tar
from clipkit.tfrecord_tools.sample import Sample
from clipkit.tfrecord_tools.tables.digests import sha256_of

KINDS = "tars, tfrecords, parquet files with images, a dataset directory, or a table of a folder of images"


@dataclass(frozen=True)
class InputShard:
    """One input file. `size` is its length on the line, in bytes.

    Of a folder's table `size` is that of its images, `table` its rows, as parquet, and `sha256` its hash.
    """

    path: Path
    size: int
    columns: PairColumns = USUAL
    table: Path | None = None
    sha256: str = ""


def find_shards(
    path: Path, columns: PairColumns = USUAL, split: str = "train", tell: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """The shards of a folder by name, all of one kind, or the one file `path`; of a folder of images its table.

    Of a dataset directory, and of a folder whose files' names say several splits, the shards of `split`, or of the only
    one; of `clipkit.formats.shards.ALL_SPLITS` all. What lies there and isn't read is told by `tell`.
    Raises UserError when there are none, and for a folder that `clipkit download` hasn't finished.
    """
    with reading(path):
        if path.is_file():
            if not (path.suffix in SHARD_SUFFIXES or is_table(path) or _is_dataset_shard(path)):
                raise UserError(f"{path} isn't an image shard: clipkit reads {KINDS}")
            return [path]
        if not path.is_dir():
            raise UserError(f"shards {path} don't exist: check the path, or make them with clipkit download")
        refuse_unfinished_download(path)
        dataset = None if _holds_shards(path, columns) else find_dataset(path)
        if dataset is not None and (dataset / "features.json").exists():
            return dataset_shards(dataset, split)
        found = list_shards(path, split, lambda folder, file: _has_images(folder / file.name, columns))
        if found is None:
            there = describe_files(path)
            raise UserError(
                f"{path} holds no image shards{there}: clipkit reads {KINDS}; make them with clipkit download"
            )
        for note in found.notes:
            tell(note)
        return [found.folder / file.name for file in found.files]


def dataset_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split of a dataset directory, or of its only split. Raises UserError when they can't be told."""
    splits = list(read_layout(folder).lengths)
    if split not in splits and len(splits) != 1 and split != ALL_SPLITS:
        raise UserError(f"{folder} has the splits {', '.join(splits) or 'none'}: name the one to read by --split")
    wanted = splits if split == ALL_SPLITS else [split if split in splits else splits[0]]
    return [folder / shard.file for each in wanted for shard in open_dataset(folder, each).shards]


def open_shard(path: Path, columns: PairColumns = USUAL, work: Path | None = None) -> InputShard:
    """A shard with its length; the rows of a folder's table are copied to `work`, where they stay."""
    try:
        with reading(path):
            size = path.stat().st_size
    except FileNotFoundError as error:
        raise _gone(path) from error
    if path.suffix in (".tar", ".tfrecord") and (columns.image or columns.caption):
        raise UserError(
            f"{path}: in tars and img2dataset's tfrecords image and caption have fixed names, jpg or the like and txt: "
            "leave out --image-column and --caption-column"
        )
    if (
        path.suffix in (".tar", ".tfrecord")
        or _is_dataset_shard(path)
        or (path.suffix == ".parquet" and _has_images(path, columns))
    ):
        return InputShard(path, size, columns)
    if work is None:
        raise UserError(f"{path} has no column with images: name it by --image-column")
    table = work / "table.parquet"
    copied = work / "table.of"
    sha256 = sha256_of([path])
    mark = f"{path} {sha256} {columns}"
    if not (table.exists() and copied.exists() and copied.read_text(encoding="utf-8") == mark):
        remove(copied)
        copy_pairs(path, table, columns)
        copied.write_text(mark, encoding="utf-8")
    return InputShard(path, FolderSizes(path.parent, table, columns).total, columns, table, sha256)


def places_in(shard: InputShard, positions: Sequence[int]) -> list[int]:
    """The reader's own places in a shard (bytes or rows) for bytes of it on the line; 0 is the beginning."""
    if shard.table is not None:
        sizes = FolderSizes(shard.path.parent, shard.table, shard.columns)
        return [sizes.row_at(position) for position in positions]
    if shard.path.suffix == ".parquet":
        return [row_at(shard.path, position, shard.size) for position in positions]
    return list(positions)


def read_shard(shard: InputShard | Path, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The samples of a shard that begin in [start, stop), places as `places_in` gives them, in order.

    A remote shard is copied to the local disk first. Raises UserError when it is damaged or gone.
    """
    shard = shard if isinstance(shard, InputShard) else open_shard(shard)
    path = shard.path
    try:
        if shard.table is not None:
            yield from read_folder(path.parent, shard.table, start, stop, shard.columns)
            return
        with local_copy(path) as local:
            try:
                yield from _read(shard, local, start, stop)
            except UserError as error:
                if not is_remote(path):
                    raise
                raise UserError(str(error).replace(str(local), str(path))) from error
    except FileNotFoundError as error:
        raise _gone(path) from error


def columns_left_out(shard: InputShard) -> list[str]:
    """The columns of a shard that no record can hold. Raises UserError where image or caption aren't found."""
    path, columns = shard.path, shard.columns
    if _is_dataset_shard(path):
        features = dataset_features(path.parent)
        return features_left_out(features, columns.image or find_image(features) or "")
    if path.suffix != ".parquet" and shard.table is None:
        return []
    with open_rows(shard.table or path) as rows:
        names = rows.schema.names
        image = columns.require_image(rows.schema, path) if shard.table is None else columns.require_file(names, path)
        stored = stored_columns(rows, (image, columns.require_caption(rows.schema, path)))
    return [name for name in names if name not in stored]


def _gone(path: Path) -> UserError:
    return UserError(f"image shard {path} is gone: put it back and run the same command again")


def _read(shard: InputShard, local: Path, start: int, stop: int | None) -> Iterator[Sample]:
    path = shard.path
    if path.suffix == ".tar":
        return read_tar(local, start, stop, shard.columns.captions)
    if path.suffix == ".parquet":
        if not local.exists():
            raise FileNotFoundError(local)
        return read_parquet(local, start, stop, shard.columns)
    if path.suffix == ".tfrecord":
        return read_tfrecord(local, start, stop, shard.columns.captions)
    return read_dataset(local, dataset_features(path.parent), start, stop, shard.columns)


def _is_dataset_shard(path: Path) -> bool:
    return ".tfrecord-" in path.name and (path.parent / "features.json").exists()


def _holds_shards(folder: Path, columns: PairColumns) -> bool:
    """Whether shards lie in the folder itself, which then are meant, and not a dataset that was built below it."""
    if (folder / "dataset_info.json").exists():
        return False
    names = [file.name for file in list_folder(folder) if not is_hidden(file.name)]
    shards = [folder / name for name in names if Path(name).suffix in SHARD_SUFFIXES]
    others = any(path.suffix != ".parquet" for path in shards)
    return others or any(_has_images(path, columns) for path in shards[:1])


def _has_images(path: Path, columns: PairColumns) -> bool:
    with open_rows(path) as rows:
        return columns.find_image(rows.schema) is not None
