"""Why a row gave no image: a small set of reasons, so that failures can be counted, compared and retried by kind."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.files import write_beside

TRUNCATED = "truncated image"
EMPTY = "empty body"

# In order: the first pattern found in the message decides. The messages are those of img2dataset, urllib and OpenCV.
PATTERNS = [
    ("timeout", r"timed out|timeout"),
    ("http-3xx", r"HTTP Error 3\d\d"),
    ("http-4xx", r"HTTP Error 4\d\d"),
    ("http-5xx", r"HTTP Error 5\d\d"),
    ("dns", r"Name or service not known|name resolution|nodename nor servname|No address associated|getaddrinfo"),
    ("tls", r"SSL|CERTIFICATE|certificate"),
    ("connect", r"Connection (refused|reset|aborted)|Remote end closed|No route to host|unreachable|Broken pipe"),
    ("truncated", rf"IncompleteRead|^{TRUNCATED}$"),
    ("empty", rf"^{EMPTY}$"),
    ("too-small", r"image too small"),
    ("too-large", r"area too large|CV_IO_MAX_IMAGE"),
    ("aspect-ratio", r"aspect ratio too large"),
    ("not-an-image", r"Image decoding error|OpenCV"),
    ("disallowed", r"X-Robots-Tag"),
    (
        "bad-url",
        r"unknown url type|no host given|control characters|nonnumeric port|Invalid (IPv6 )?URL|'idna'|'ascii' codec"
        r"|label (empty|too long)",
    ),
]
REASONS = (*(reason for reason, _ in PATTERNS), "other")
COMPILED = [(reason, re.compile(pattern)) for reason, pattern in PATTERNS]

TABLE = pa.schema([(name, pa.string()) for name in ("shard", "key", "url", "caption", "reason", "message")])


def classify(message: str) -> str:
    """The reason, one of REASONS, behind an error message of a download."""
    return next((reason for reason, pattern in COMPILED if pattern.search(message)), "other")


def read_failures(shard: Path) -> pa.Table:
    """The failed rows of one shard's `00000.parquet`, as columns of TABLE, in order of their keys."""
    rows = pq.read_table(shard, columns=["key", "url", "caption", "status", "error_message"])
    failed = rows.filter(pc.not_equal(rows["status"], "success"))
    messages = [message or "no message" for message in failed["error_message"].to_pylist()]
    columns = [
        pa.array([shard.stem] * len(failed), pa.string()),
        *(failed[name].cast(pa.string()) for name in ("key", "url", "caption")),
        pa.array([classify(message) for message in messages], pa.string()),
        pa.array(messages, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=TABLE)


def write_failures(path: Path, shards: Iterable[Path]) -> Counter[str]:
    """Write the failed rows of all shards into one parquet file and return how many there are of each reason.

    One shard at a time is held in memory.
    """
    counts: Counter[str] = Counter()
    with write_beside(path) as temporary, pq.ParquetWriter(temporary, TABLE) as writer:
        for shard in shards:
            failures = read_failures(shard)
            counts.update(failures["reason"].to_pylist())
            writer.write_table(failures)
    return counts
