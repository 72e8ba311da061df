"""One split of labelled images: its shards planned, made side by side, and accounted for.

The plan depends on the names and sizes of the images only. It is kept while the split is unfinished, so that a build
of other images can't go on among its shards.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset, shard_name
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest
from clipkit.formatting import counted
from clipkit.jobs.passes import Runner
from clipkit.storage.files import read_json, write_json, write_json_lines
from clipkit.tfrecord_tools.labelled.listing import Image
from clipkit.tfrecord_tools.labelled.shard import LabelledJob, LabelledState, build_labelled_shard, read_state

_NAMED_AT_MOST = 5
IMAGES = "images"  # in the plan and in the manifest: the hash of names and labels


def work_folder(folder: Path, split: str) -> Path:
    """Where the plan and the states of an unfinished split lie."""
    return folder / CLIPKIT_FOLDER / f"build-{split}"


def plan_shards(
    folder: Path,
    name: str,
    split: str,
    source: str,
    images: Sequence[Image],
    labels: Sequence[int],
    file_names: Sequence[str],
    count: int,
    jpeg_only: bool,
) -> list[LabelledJob]:
    """`count` shards of even numbers of images, which stand in the order in which TFDS writes its records.

    That is by the MD5 of the split's name and the record's key, for which TFDS's own `imagenet2012` takes the file
    name (`tensorflow_datasets/core/hashing.py`, `shard_utils.get_shard_boundaries`).
    """
    salted = hashlib.md5(split.encode())

    def place(i: int) -> bytes:
        digest = salted.copy()
        digest.update(file_names[i].encode("utf-8", "surrogateescape"))
        return digest.digest()

    order = sorted(range(len(images)), key=place)
    ends = [round(len(order) * number / count) for number in range(count + 1)]
    return [
        LabelledJob(
            path=folder / shard_name(name, split, number, count),
            state=work_folder(folder, split) / f"shard-{number:05d}.json",
            source=source,
            images=tuple(images[i] for i in order[start:end]),
            labels=tuple(labels[i] for i in order[start:end]),
            file_names=tuple(file_names[i] for i in order[start:end]),
            jpeg_only=jpeg_only,
        )
        for number, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def build_split(
    folder: Path, split: str, jobs: Sequence[LabelledJob], *, max_bad: int, allow: str, runner: Runner
) -> SplitManifest:
    """Make the shards that aren't there yet, and the list of broken images.

    `allow` is the option that lets broken images be left out.
    Raises UserError when more than `max_bad` images are broken, and for shards of another build.
    """
    images = _images_id(jobs)
    _check_begun(folder, split, {IMAGES: images, "shards": len(jobs)})
    states = runner.run(
        f"build-imagenet, {split}",
        build_labelled_shard,
        jobs,
        describe=lambda job: job.path.name,
        size=lambda job: job.size,
        finished=read_state,
        counts=lambda state: {"broken images": len(state.skipped)},
    )
    _check_broken(folder, split, states, max_bad, allow)
    return SplitManifest(tuple(state.shard for state in states), options={IMAGES: images})


def check_same(folder: Path, split: str, manifest: SplitManifest, jobs: Sequence[LabelledJob]) -> None:
    """Refuse to take a finished split for one of other images."""
    there = [(source.bytes, source.samples) for shard in manifest.shards for source in shard.sources]
    images = _images_id(jobs)
    same = there == [(job.size, len(job.images)) for job in jobs]
    if not same or manifest.options.get(IMAGES, images) != images:
        raise UserError(
            f"{folder} already holds a split {split!r} made from other images or labels: "
            "remove it, or choose another output or --name"
        )
    open_dataset(folder, split)  # says so when a shard is missing


def _images_id(jobs: Sequence[LabelledJob]) -> str:
    """A hash of the names and labels of all images."""
    digest = hashlib.blake2b(digest_size=16)
    for job in jobs:
        for name, label in zip(job.file_names, job.labels, strict=True):
            digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _check_begun(folder: Path, split: str, plan: dict[str, Any]) -> None:
    """Keep the plan. Refuse to go on with that of other images, and to write over shards that have none."""
    path = work_folder(folder, split) / "plan.json"
    if path.exists():
        if read_json(path) != plan:
            raise UserError(
                f"{folder} holds a build of {split!r} begun from other images: remove {path.parent} and the shards of "
                f"{split!r} to begin again, or run the command as it was"
            )
        return
    pattern = f"*-{split}.tfrecord-*-of-*"
    stray = next(folder.glob(pattern), None)
    if stray is not None:
        raise UserError(f"{stray} is of another build: remove {folder / pattern}, or choose another output")
    write_json(path, plan)


def _check_broken(folder: Path, split: str, states: Sequence[LabelledState], max_bad: int, allow: str) -> None:
    """List the broken images, one JSON line each, and refuse when they are too many."""
    skipped = [image for state in states for image in state.skipped]
    listed = folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl"
    write_json_lines(listed, ({"name": name, "reason": reason} for name, reason in skipped))
    if len(skipped) > max_bad:
        named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:_NAMED_AT_MOST])
        more = f" and {len(skipped) - _NAMED_AT_MOST:,} more, all in {listed}" if len(skipped) > _NAMED_AT_MOST else ""
        broken = f"{counted(len(skipped), 'image')} of {split} {'is' if len(skipped) == 1 else 'are'} broken"
        raise UserError(
            f"{broken}: {named}{more}. Put good copies in their place and run the "
            f"same command again, or give {allow} {len(skipped)} to leave them out"
        )
