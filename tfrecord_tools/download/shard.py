"""One shard on its way: its rows, the spool of its images, what became of each row, and its files at the end.

Images go to a spool file as they arrive, so memory doesn't grow with the shard, and are written from there in the order
of the rows.

Why not img2dataset's `Downloader`: its one method reads, fetches (urllib, a thread and a TLS context an image), resizes
and writes a shard, with nothing between that could be replaced; a subclass would have to override all of it. Pixels
are its `Resizer`'s still (`picture`).
"""

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipkit.errors import InternalError, UserError
from clipkit.storage.files import remove
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.account.ledger import Outcome, read_ledger, write_ledger
from clipkit.tfrecord_tools.account.purged import purged_rows
from clipkit.tfrecord_tools.account.replace_shard import commit, new_folder
from clipkit.tfrecord_tools.account.shard_state import Layout, ShardState, file_sizes, load_state, write_state
from clipkit.tfrecord_tools.download.output import (
    NOT_FETCHED,
    NOT_USABLE,
    DataFacts,
    read_images,
    rows_table,
    status_of,
    write_data,
)
from clipkit.tfrecord_tools.download.plan import Output, Shard
from clipkit.tfrecord_tools.download.spool import Spool
from clipkit.tfrecord_tools.pictures.hash_check import check_hash, parse_phash
from clipkit.tfrecord_tools.pictures.picture import PictureError, PictureMaker
from clipkit.tfrecord_tools.reasons import EMPTY_CAPTION, PURGED
from clipkit.tfrecord_tools.sample import caption_problem
from clipkit.tfrecord_tools.web.settings import Fetched, FetchSettings

# What a hash says when the image isn't the one that the table speaks of, as far as anybody can tell.
CHANGED = ("changed", "differs")
UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Task:
    """What all shards of a download have in common; it goes to every worker.

    `kinds` are those of the kept columns (see `schema`), `round` the number of the retry, 0 for the first time.
    `counters` is the folder where workers of this machine tell how far they are.
    """

    layout: Layout
    output: Output
    network: FetchSettings
    kinds: dict[str, str]
    round: int = 0
    counters: str | None = None

    @property
    def checks_hash(self) -> bool:
        """Whether the tables have a hash of the image."""
        return self.output.columns.hash is not None or self.output.columns.phash is not None


@dataclass(frozen=True)
class ShardJob:
    """A shard to fetch; with `retry` only its rows that failed for one of these reasons, the others as they are."""

    shard: Shard
    retry: frozenset[str] | None = None


class OpenShard:
    """A shard of which rows are being fetched. `missing` are the numbers of its rows to fetch, from 0 in the shard.

    `take` may be called from several threads at once.
    """

    def __init__(self, task: Task, job: ShardJob, rows: pa.Table, numbers: list[int]) -> None:
        """`rows` are the wanted rows as `TableColumns.align` has them, `numbers` their numbers in the table."""
        self.task, self.job, self.rows, self.numbers = task, job, rows, numbers
        self.started = time.time()
        self.urls: list[str | None] = rows["url"].to_pylist()
        self.digests: list[str | None] = rows["hash"].to_pylist() if "hash" in rows.column_names else []
        self.phashes: list[Any] = rows["phash"].to_pylist() if "phash" in rows.column_names else []
        self.lock = threading.Lock()
        self.spool = Spool(task.layout)
        self.places = [0] * len(self.urls)
        self.round = task.round
        self.outcomes: list[Outcome | None] = self.recall() if job.retry is not None else self.refuse()
        self.missing = [i for i, outcome in enumerate(self.outcomes) if outcome is None]
        self.pending = len(self.missing)

    def refuse(self) -> list[Outcome | None]:
        """What needs no fetching: rows without a URL and, in a dataset, those without a caption and the purged."""
        outcomes: list[Outcome | None] = [None] * len(self.urls)
        for i, url in enumerate(self.urls):
            if url is None:
                outcomes[i] = Outcome(reasons.BAD_URL, "the URL is null")
        if self.task.output.format == "tfds":
            for i, caption in enumerate(self.rows["caption"].to_pylist()):
                if caption_problem(caption) is not None:
                    outcomes[i] = Outcome(EMPTY_CAPTION, "not fetched: a pair without a caption isn't used")
            # A shard that was lost is fetched whole again, by the table, which still has what was purged from it.
            for i, purge in purged_rows(self.task.layout.root, self.urls, self.keys()).items():
                outcomes[i] = Outcome(PURGED, f"by the purge {purge}")
        return outcomes

    def recall(self) -> list[Outcome | None]:
        """What is known of the shard as it is, its images moved to the spool, without the rows that are tried again."""
        files = self.task.layout.files(self.job.shard.number)
        state = load_state(files)
        self.round = max(self.round, 0 if state is None else state.round)
        outcomes: list[Outcome | None] = list(read_ledger(files.ledger))
        stored = [i for i, outcome in enumerate(outcomes) if outcome is not None and outcome.reason is None]
        for i, jpg in zip(stored, read_images(self.task.output.format, files.data), strict=True):
            self.keep(i, jpg)
        again = self.job.retry or frozenset()
        return [None if outcome is not None and outcome.reason in again else outcome for outcome in outcomes]

    def take(self, i: int, fetched: Fetched, make: PictureMaker) -> Outcome:
        """Account for the answer to row `i`."""
        outcome, jpg = self.judge(i, fetched, make)
        if jpg is not None:
            self.keep(i, jpg)
        self.outcomes[i] = outcome
        return outcome

    def is_last(self) -> bool:
        """Count one row less to wait for; True when it was the last."""
        with self.lock:
            self.pending -= 1
            return self.pending == 0

    def judge(self, i: int, fetched: Fetched, make: PictureMaker) -> tuple[Outcome, bytes | None]:
        """What became of row `i`, and the image to store."""
        outcome = Outcome(
            fetched.reason, fetched.message, fetched.status, fetched.decision, fetched.attempts,
            None if fetched.body is None else len(fetched.body),
        )  # fmt: skip
        if fetched.body is None:
            return outcome, None
        try:
            picture = make(fetched.body)
        except PictureError as error:
            outcome.reason, outcome.message = error.reason, error.message
            return outcome, None
        except Exception as error:  # a body that trips a library shall not end a download of millions
            outcome.reason, outcome.message = reasons.OTHER, f"{type(error).__name__}: {error}"[:200]
            return outcome, None
        outcome.width, outcome.height = picture.width, picture.height
        outcome.original_width, outcome.original_height = picture.original_width, picture.original_height
        outcome.exif, outcome.sha256 = picture.exif, picture.sha256
        if self.task.checks_hash:
            outcome.hash_check = self.check(i, fetched.body)
            if self.task.output.drop_changed and outcome.hash_check in CHANGED:
                outcome.reason, outcome.message = reasons.HASH_CHANGED, f"the table's hash: {outcome.hash_check}"
                return outcome, None
        outcome.jpg_bytes = len(picture.jpg)
        return outcome, picture.jpg

    def check(self, i: int, body: bytes) -> str:
        """How a body compares with the table's hashes; a value that is none says nothing."""
        try:
            phash = parse_phash(self.phashes[i]) if self.phashes and self.phashes[i] is not None else None
            digest = self.digests[i] if self.digests else None
            return check_hash(body, digest, self.task.output.columns.hash_kind or "sha256", phash)
        except UserError:
            return UNCHECKED

    def keep(self, i: int, jpg: bytes) -> None:
        """Put the image of row `i` into the spool. Raises UserError when the disk is full."""
        self.places[i] = self.spool.append(jpg)

    def image(self, i: int) -> bytes:
        """The stored bytes of row `i`."""
        outcome = self.outcomes[i]
        assert outcome is not None
        return self.spool.read(self.places[i], outcome.jpg_bytes or 0)

    def keys(self) -> list[str]:
        """The keys of the rows, as img2dataset numbers them."""
        layout, wide = self.task.layout, math.ceil(math.log10(self.task.output.samples_per_shard))
        name, number = layout.shard(self.job.shard.number), self.job.shard.number
        return [f"{10**wide * number + i:0{len(name) + wide}d}" for i in range(len(self.urls))]

    def publish(self) -> ShardState:
        """Write the shard's files, the state last. Raises UserError when the disk refuses.

        A shard that takes the place of another is made beside it and moved when it is whole.
        """
        outcomes = [outcome for outcome in self.outcomes if outcome is not None]
        if len(outcomes) != len(self.outcomes):
            raise InternalError(
                f"shard {self.job.shard.number} lacks {len(self.outcomes) - len(outcomes)} answers: report this"
            )
        final = self.task.layout.files(self.job.shard.number)
        folder = new_folder(self.task.layout, self.job.shard.number) if self.job.retry is not None else None
        files = final if folder is None else final.inside(folder)
        if folder is None:
            # Tars come in steps of 10,240 bytes: the state of a damaged shard may seem right for half of a new one.
            remove(final.state)
        keys = self.keys()
        table = rows_table(self.rows, keys, outcomes, self.task.checks_hash)
        facts = write_data(self.task.output.format, files, table, outcomes, self.image, self.task.kinds)
        write_ledger(files.ledger, keys, self.numbers, self.rows, outcomes)
        state = self.state(outcomes, facts, file_sizes(files))
        write_state(files.state, state)
        if folder is not None:
            commit(folder, final)
        return state

    def state(self, outcomes: list[Outcome], facts: DataFacts, sizes: dict[str, int]) -> ShardState:
        """The counts of the shard."""
        statuses = Counter(status_of(outcome) for outcome in outcomes)
        failed = Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)
        stored = [outcome for outcome in outcomes if outcome.reason is None]
        captions = self.rows["caption"].to_pylist()
        return ShardState(
            count=len(outcomes),
            successes=len(stored),
            failed_to_download=statuses[NOT_FETCHED],
            failed_to_resize=statuses[NOT_USABLE],
            failed=dict(sorted(failed.items())),
            empty_captions=sum(caption_problem(caption) is not None for caption in captions),
            hash_check=dict(sorted(Counter(each.hash_check for each in stored if each.hash_check).items())),
            image_bytes=sum(outcome.jpg_bytes or 0 for outcome in stored),
            body_bytes=sum(outcome.body_bytes or 0 for outcome in outcomes),
            start_time=self.started,
            end_time=time.time(),
            round=self.round,
            sizes=sizes,
            crc32c=facts.crc32c,
            kinds=facts.kinds,
            present=facts.present,
        )
