"""One output shard of a dataset from the image shards that belong to it: what a worker of `build` does.

The shard and its state appear one after the other by renames, the state last. So a shard with a state is finished, and
one without is written again, to the same bytes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.files import read_json, write_beside, write_json
from clipkit.manifest import Shard, Source
from clipkit.records import RecordWriter, encode_example
from clipkit.tfrecord_tools.read_shards import read_shard
from clipkit.tfrecord_tools.sample import (
    NO_IMAGE,
    NOT_AN_IMAGE,
    TRUNCATED_IMAGE,
    Sample,
    caption_problem,
    image_format,
)
from clipkit.tfrecord_tools.schema import KindWidenedError, fit
from clipkit.tfrecord_tools.truncation import is_truncated

# TensorFlow's decode_image gives four dimensions for WebP and GIF and knows no TIFF or AVIF, so TFDS's Image feature
# fails on them.
_TFDS_FORMATS = frozenset({"jpeg", "png", "bmp"})
_CONVERTED_QUALITY = 95
_OWN_COLUMNS = ("jpg", "txt")


@dataclass(frozen=True)
class ShardJob:
    """What one worker is to make. `number` counts the output shards; `sizes` are the bytes of `sources`."""

    number: int
    path: Path
    state: Path
    sources: tuple[Path, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ShardState:
    """What is known of a finished shard. `present` counts each column's values; `skipped` is (source, key, reason)."""

    shard: Shard
    kinds: dict[str, str]
    present: dict[str, int]
    skipped: tuple[tuple[str, str, str], ...]


def build_shard(job: ShardJob, kinds: Mapping[str, str]) -> ShardState:
    """Write the shard, its record offsets and its state. `kinds` are the columns' kinds to begin with.

    A value that doesn't fit widens its column's kind and the shard is begun anew, so that all of it has one kind.
    """
    while True:
        try:
            return _build_shard(job, dict(kinds))
        except KindWidenedError as widened:
            kinds = widened.kinds


def _build_shard(job: ShardJob, kinds: dict[str, str]) -> ShardState:
    present: dict[str, int] = {}
    formats: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    skipped: list[tuple[str, str, str]] = []
    sources: list[Source] = []
    offsets: list[int] = []
    with write_beside(job.path) as temporary, RecordWriter(temporary) as writer:
        for source, size in zip(job.sources, job.sizes, strict=True):
            samples, first_record = 0, writer.records
            reasons: Counter[str] = Counter()
            for sample in read_shard(source):
                samples += 1
                image, kind, reason = _take(sample)
                if reason is not None:
                    reasons[reason] += 1
                    skipped.append((source.name, sample.key, reason))
                    continue
                for name in _OWN_COLUMNS:
                    sample.columns.pop(name, None)
                columns = fit(sample.columns, kinds, present)
                columns["jpg"], columns["txt"] = image, sample.caption
                offsets.append(writer.write(_encode(columns)))
                if kind in _TFDS_FORMATS:
                    formats[kind] += 1
                else:
                    formats["jpeg"] += 1
                    converted[kind] += 1
            records = writer.records - first_record
            sources.append(Source(source.name, size, samples, records, dict(sorted(reasons.items()))))
    shard = Shard(
        job.path.name,
        writer.records,
        writer.bytes,
        f"{writer.checksum:08x}",
        tuple(sources),
        dict(sorted(formats.items())),
        dict(sorted(converted.items())),
    )
    with write_beside(offsets_path(job)) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(offsets, dtype=np.uint64))
    state = ShardState(shard, dict(sorted(kinds.items())), dict(sorted(present.items())), tuple(skipped))
    write_json(job.state, asdict(state))
    return state


def offsets_path(job: ShardJob) -> Path:
    """Where the byte offsets of the shard's records wait for the index of the whole split."""
    return job.state.with_suffix(".npy")


def read_state(job: ShardJob) -> ShardState | None:
    """The state of a finished shard, or None when it must be written (again), its sources having changed for one."""
    if not (job.state.exists() and job.path.exists() and offsets_path(job).exists()):
        return None
    values: dict[str, Any] = read_json(job.state)
    shard = Shard.from_dict(values["shard"])
    same_sources = [(source.file, source.bytes) for source in shard.sources] == [
        (source.name, size) for source, size in zip(job.sources, job.sizes, strict=True)
    ]
    if not same_sources or job.path.stat().st_size != shard.bytes:
        return None
    skipped = tuple((source, key, reason) for source, key, reason in values["skipped"])
    return ShardState(shard, values["kinds"], values["present"], skipped)


def _take(sample: Sample) -> tuple[bytes, str, str | None]:
    """Image bytes, their original format, and the reason not to take the sample (then the first two mean nothing)."""
    image = sample.image
    if sample.problem is not None or image is None:
        return b"", "", sample.problem or NO_IMAGE
    reason = caption_problem(sample.caption)
    if reason is not None:
        return b"", "", reason
    kind = image_format(image)
    if kind is None:
        return b"", "", NOT_AN_IMAGE
    if is_truncated(image):
        return b"", "", TRUNCATED_IMAGE
    if kind not in _TFDS_FORMATS:
        try:
            image = _as_jpeg(image)
        except UserError:
            return b"", "", NOT_AN_IMAGE
    return image, kind, None


def _as_jpeg(image: bytes) -> bytes:
    """The (first) picture as a JPEG of full colour resolution."""
    # Here and not above: most shards have nothing to convert, and the decoders would cost each worker a second to load.
    import simplejpeg

    from clipkit import images

    encoded: bytes = simplejpeg.encode_jpeg(
        images.decode(image), quality=_CONVERTED_QUALITY, colorspace="RGB", colorsubsampling="444"
    )
    return encoded


def _encode(columns: dict[str, Any]) -> bytes:
    try:
        return encode_example(columns)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold and UTF-8 may not
        return encode_example(
            {name: v.encode("utf-8", "replace") if isinstance(v, str) else v for name, v in columns.items()}
        )
