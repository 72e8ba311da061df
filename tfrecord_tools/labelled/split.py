"""One split of labelled images: its shards planned, made side by side, and accounted for.

The plan depends on the names and sizes of the images alone. It is kept while the split is unfinished, so that a build
of other images can't go on among its shards.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset, shard_name
from clipkit.formats.manifest import CLIPKIT_FOLDER, SplitManifest, index_path
from clipkit.formatting import counted
from clipkit.jobs.run import Engine, run_jobs
from clipkit.storage.files import read_json, write_beside, write_json
from clipkit.tfrecord_tools.labelled.listing import Image
from clipkit.tfrecord_tools.labelled.shard import (
    LabelledShardJob,
    LabelledShardState,
    build_labelled_shard,
    offsets_path,
    read_labelled_state,
)

_NAMED_AT_MOST = 5


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
) -> list[LabelledShardJob]:
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
        LabelledShardJob(
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
    folder: Path,
    split: str,
    job_list: Sequence[LabelledShardJob],
    *,
    max_bad: int,
    allow: str,
    workers: int | None,
    engine: Engine,
    tell: Callable[[int, str], None],
) -> SplitManifest:
    """Make the shards that aren't there yet, and the index and the list of broken images.

    `tell` gets the bytes of images done and a note; `allow` is the option that lets broken images be left out.
    Raises UserError when more than `max_bad` images are broken, and for shards of another build.
    """
    _check_begun(folder, split, job_list)
    states = {job.path: state for job in job_list if (state := read_labelled_state(job)) is not None}
    lacking = [job for job in job_list if job.path not in states]
    done = sum(_bytes(job) for job in job_list if job.path in states)
    finished = run_jobs(
        build_labelled_shard, lacking, workers=workers, engine=engine, describe=lambda job: job.path.name
    )
    for index, state in finished:
        states[lacking[index].path] = state
        done += _bytes(lacking[index])
        bad = sum(len(each.skipped) for each in states.values())
        tell(done, f"{split} shard {len(states):,}/{len(job_list):,}, {counted(bad, 'broken image')}")
    ordered = [states[job.path] for job in job_list]
    _check_broken(folder, split, ordered, max_bad, allow)
    index_N = np.concatenate([_load(offsets_path(job)) for job in job_list])
    with write_beside(index_path(folder, split)) as temporary, temporary.open("wb") as file:
        np.save(file, index_N)
    return SplitManifest(tuple(state.shard for state in ordered))


def check_same(folder: Path, split: str, manifest: SplitManifest, job_list: Sequence[LabelledShardJob]) -> None:
    """Refuse to take a finished split for one of other images."""
    there = [(source.bytes, source.samples) for shard in manifest.shards for source in shard.sources]
    if there != [(_bytes(job), len(job.images)) for job in job_list]:
        raise UserError(
            f"{folder} already holds a split {split!r} made from other images: "
            "remove it, or choose another output or --name"
        )
    open_dataset(folder, split)  # says so when a shard is missing


def _load(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # np.load itself can't open a remote path
        offsets_N: np.ndarray = np.load(file)
    return offsets_N


def _bytes(job: LabelledShardJob) -> int:
    return sum(image.size for image in job.images)


def _check_begun(folder: Path, split: str, job_list: Sequence[LabelledShardJob]) -> None:
    """Keep the plan. Refuse to go on with that of other images, and to write over shards that have none."""
    path = work_folder(folder, split) / "plan.json"
    digest = hashlib.blake2b(digest_size=16)
    for job in job_list:
        for name, label in zip(job.file_names, job.labels, strict=True):
            digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))
    mine: dict[str, Any] = {"images": digest.hexdigest(), "shards": len(job_list)}
    if path.exists():
        if read_json(path) != mine:
            raise UserError(
                f"{folder} holds a build of {split!r} begun from other images: remove {path.parent} and the shards of "
                f"{split!r} to begin anew, or run the command as it was"
            )
        return
    pattern = f"*-{split}.tfrecord-*-of-*"
    stray = next(folder.glob(pattern), None)
    if stray is not None:
        raise UserError(f"{stray} is of another build: remove {folder / pattern}, or choose another output")
    write_json(path, mine)


def _check_broken(folder: Path, split: str, states: Sequence[LabelledShardState], max_bad: int, allow: str) -> None:
    """List the broken images, one JSON line each, and refuse when they are too many."""
    skipped = [each for state in states for each in state.skipped]
    listed = folder / CLIPKIT_FOLDER / f"skipped-{split}.jsonl"
    with write_beside(listed) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, reason in skipped:
            file.write(json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n")
    if len(skipped) > max_bad:
        named = ", ".join(f"{name} ({reason})" for name, reason in skipped[:_NAMED_AT_MOST])
        more = f" and {len(skipped) - _NAMED_AT_MOST:,} more, all in {listed}" if len(skipped) > _NAMED_AT_MOST else ""
        broken = f"{counted(len(skipped), 'image')} of {split} {'is' if len(skipped) == 1 else 'are'} broken"
        raise UserError(
            f"{broken}: {named}{more}. Put good copies in their place and run the "
            f"same command again, or give {allow} {len(skipped)} to leave them out"
        )
