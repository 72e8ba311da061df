"""One TFRecord shard that becomes part of a dataset where it lies: scanned from end to end, and rewritten if it must.

A scan changes nothing on the disk but the shard's state, so a damaged shard is found before any is renamed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from clipkit.formats.manifest import ShardEntry, SourceEntry
from clipkit.formats.records import (
    RecordError,
    RecordWriter,
    check_contents,
    decode_example,
    encode_example,
    read_framed,
    read_records,
)
from clipkit.storage.files import disk_errors, read_json, save_array, sync_file, write_beside, write_json
from clipkit.tfrecord_tools.in_place.columns import convert
from clipkit.tfrecord_tools.in_place.example_wire import ExampleWire, Pair
from clipkit.tfrecord_tools.pictures.sniff import END_OF_FILE, image_format, is_truncated
from clipkit.tfrecord_tools.reasons import BAD_TEXT, NO_IMAGE, NOT_AN_IMAGE, TRUNCATED
from clipkit.tfrecord_tools.sample import caption_problem
from clipkit.tfrecord_tools.writing.pair_writer import TFDS_FORMATS


@dataclass(frozen=True)
class InPlaceJob:
    """One shard: where it lies, where it shall lie, and its files in the folder of the unfinished build."""

    source: Path
    target: Path
    state: Path

    @property
    def offsets(self) -> Path:
        """Byte offsets of the records, uint64[records]: of the source, and then of the rewritten shard."""
        return self.state.with_suffix(".npy")

    @property
    def rewritten(self) -> Path:
        """The state of the shard when it had to be rewritten: its presence says that it was."""
        return self.state.with_suffix(".rewritten.json")


@dataclass(frozen=True)
class ShardScan:
    """What a shard holds. `forms`: the columns', as in `example_wire`; `problems`: (key, reason) of bad pairs."""

    shard: ShardEntry
    forms: dict[str, dict[str, int]]
    problems: tuple[tuple[str, str], ...]


def scan_shard(job: InPlaceJob) -> ShardScan:
    """Check every CRC, find the offsets and the columns, and keep them. Raises RecordError for a damaged shard."""
    wire = ExampleWire()
    formats: Counter[str] = Counter()
    problems: list[tuple[str, str]] = []
    offsets: list[int] = []
    checksum = 0
    for offset, framed in read_framed(job.source):
        record = check_contents(framed, offset, job.source)
        checksum = google_crc32c.extend(checksum, framed)
        try:
            pair = wire.read(record, 0, len(record))
        except ValueError as error:
            raise RecordError(job.source, offset, str(error)) from error
        kind, reason = _judge(pair)
        if kind is not None:
            formats[kind] += 1
        if reason is not None:
            problems.append((_key(record, f"{job.source.stem}-{offset}"), reason))
        offsets.append(offset)
    size = job.source.stat().st_size
    source = SourceEntry(job.source.name, size, len(offsets), len(offsets))
    shard = ShardEntry(job.target.name, len(offsets), size, f"{checksum:08x}", (source,), dict(sorted(formats.items())))
    scan = ShardScan(shard, wire.forms(), tuple(problems))
    save_array(job.offsets, np.array(offsets, np.uint64))
    write_json(job.state, asdict(scan))
    return scan


def rewrite(job: InPlaceJob, kinds: Mapping[str, str]) -> ShardEntry:
    """Write the shard again under its target name, each column in its kind, and remove the source."""
    if job.source.exists():
        before = ShardEntry.from_dict(read_json(job.state)["shard"])
        offsets = []
        with write_beside(job.target) as temporary, RecordWriter(temporary) as writer:
            for record in read_records(job.source):
                offsets.append(writer.write(encode_example(convert(decode_example(record), kinds))))
        shard = ShardEntry.of(before.file, writer, before.sources, before.formats, {})
        save_array(job.offsets, np.array(offsets, np.uint64))
        write_json(job.rewritten, asdict(shard))
        with disk_errors(job.source):
            job.source.unlink()
        sync_file(job.source.parent)
    return ShardEntry.from_dict(read_json(job.rewritten))


def read_scan(job: InPlaceJob) -> ShardScan | None:
    """What an earlier run found, or None when the shard must be scanned (again), having changed for one."""
    if not (job.state.exists() and job.offsets.exists()):
        return None
    values: dict[str, Any] = read_json(job.state)
    shard = ShardEntry.from_dict(values["shard"])
    if job.source.exists() and job.source.stat().st_size != shard.bytes:
        return None
    return ShardScan(shard, values["forms"], tuple((key, reason) for key, reason in values["problems"]))


def _judge(pair: Pair) -> tuple[str | None, str | None]:
    """The format of a record's image, and the reason not to take it in a build that can leave records out."""
    kind, reason = _judge_image(pair)
    if reason is None:
        try:
            reason = caption_problem(None if pair.caption is None else pair.caption.decode())
        except UnicodeDecodeError:
            reason = BAD_TEXT
    return kind, reason


def _judge_image(pair: Pair) -> tuple[str | None, str | None]:
    if pair.data.startswith(b"\xff\xd8\xff", pair.start, pair.end) and pair.data.endswith(
        END_OF_FILE, pair.start, pair.end
    ):
        return "jpeg", None  # nearly every image, and no copy made
    if pair.start == pair.end:
        return None, NO_IMAGE
    image = pair.data[pair.start : pair.end]
    kind = image_format(image)
    if kind is None:
        return None, NOT_AN_IMAGE
    if is_truncated(image):
        return kind, TRUNCATED
    return kind, None if kind in TFDS_FORMATS else f"{kind} image, which TFDS can't decode"


def _key(record: bytes, fallback: str) -> str:
    key = decode_example(record, ["key"]).get("key")
    return key[0].decode("utf-8", "replace") if key and isinstance(key[0], bytes) else fallback
