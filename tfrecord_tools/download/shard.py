"""One shard on its way: its rows, the spool of its images, what became of each row, and its files at the end.

Images go to a spool file as they arrive, so memory doesn't grow with the shard, and are written from there in the order
of the rows.

Why not img2dataset's `Downloader`: its one method reads, fetches (urllib, a thread and a TLS context an image), resizes
and writes a shard, with nothing between that could be replaced; a subclass would have to override all of it. Pixels
are its `Resizer`'s still (`picture`).
"""

import math
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa

from clipkit.errors import InternalError
from clipkit.storage.files import disk_errors, is_remote, remove
from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.account.ledger import ledger_table, read_ledger, write_ledger
from clipkit.tfrecord_tools.account.purged import purged_rows
from clipkit.tfrecord_tools.account.shard_state import (
    DownloadState,
    commit,
    load_state,
    new_folder,
    outcome_counts,
    write_state,
)
from clipkit.tfrecord_tools.download.output import (
    NOT_FETCHED,
    NOT_USABLE,
    read_images,
    rows_table,
    status_of,
    write_data,
)
from clipkit.tfrecord_tools.download.plan import DownloadJob, JobSettings
from clipkit.tfrecord_tools.outcome import RowOutcome
from clipkit.tfrecord_tools.pictures.hash_check import CHANGED, check_hash
from clipkit.tfrecord_tools.pictures.picture import Picture, PictureError, PictureMaker
from clipkit.tfrecord_tools.sample import caption_problem
from clipkit.tfrecord_tools.tables.url_table import WantedRows, own_names
from clipkit.tfrecord_tools.web.settings import FetchOutcome


class OpenShard:
    """A shard of which rows are being fetched. `missing` are the numbers of its rows to fetch, from 0 in the shard.

    `take` may be called from several threads at once.
    """

    def __init__(self, settings: JobSettings, job: DownloadJob, rows: WantedRows, numbers: list[int]) -> None:
        """`rows` are the wanted rows as `TableColumns.align` has them, `numbers` their numbers in the table."""
        self.settings, self.job, self.rows, self.numbers = settings, job, rows, numbers
        self.started = time.time()
        self.urls: list[str | None] = rows.urls.to_pylist()
        self.hashes: list[str | int | None] = [] if rows.hashes is None else rows.hashes.to_pylist()
        self.spool = Spool(settings.layout.own)
        self.places = [0] * len(self.urls)
        self.round = settings.round
        self.outcomes: list[RowOutcome | None] = self.recall() if job.retry is not None else self.refuse()
        self.missing = [i for i, outcome in enumerate(self.outcomes) if outcome is None]

    def refuse(self) -> list[RowOutcome | None]:
        """What needs no fetching: rows without a URL and, in a dataset, those without a caption and the purged."""
        outcomes: list[RowOutcome | None] = [None] * len(self.urls)
        for i, url in enumerate(self.urls):
            if url is None:
                outcomes[i] = RowOutcome(reasons.BAD_URL, "the URL is null")
        if self.settings.output.format == "tfds":
            for i, caption in enumerate(self.rows.captions.to_pylist()):
                if caption_problem(caption) is not None:
                    outcomes[i] = RowOutcome(reasons.EMPTY_CAPTION, "not fetched: a pair without a caption isn't used")
            # A shard that was lost is fetched whole again, by the table, which still has what was purged from it.
            for i, purge in purged_rows(self.settings.layout.root, self.urls, self.keys()).items():
                outcomes[i] = RowOutcome(reasons.PURGED, f"by the purge {purge}")
        return outcomes

    def recall(self) -> list[RowOutcome | None]:
        """What is known of the shard as it is, its images moved to the spool, without the rows that are tried again."""
        files = self.settings.layout.files(self.job.shard.number)
        state = load_state(files)
        self.round = max(self.round, 0 if state is None else state.round)
        known = read_ledger(files.ledger)
        stored = [i for i, outcome in enumerate(known) if outcome.reason is None]
        for i, jpg in zip(stored, read_images(self.settings.output.format, files.data), strict=True):
            self.places[i] = self.spool.append(jpg)
        again = self.job.retry or frozenset()
        is_tried = [url is not None and o.reason in again for url, o in zip(self.urls, known, strict=True)]
        return [None if tried else outcome for tried, outcome in zip(is_tried, known, strict=True)]

    def take(self, outcome: FetchOutcome, make: PictureMaker) -> None:
        """Complete the outcome of a row: make a picture of its body, and keep it."""
        body, outcome.body = outcome.body, None
        if body is not None:
            outcome.body_bytes = len(body)
            try:
                picture = make(body)
            except PictureError as error:
                outcome.reason, outcome.message = error.reason, error.message
            except Exception as error:  # a body that trips a library must not end a download of millions
                outcome.reason, outcome.message = reasons.OTHER, f"{type(error).__name__}: {error}"[:200]
            else:
                self.judge(outcome, picture, body)
        # Headers may hold bytes that aren't UTF-8, which stand as surrogates in texts, and no file takes those.
        outcome.message = outcome.message.encode("utf-8", "replace").decode()
        outcome.decision = outcome.decision.encode("utf-8", "replace").decode()
        self.outcomes[outcome.index] = outcome

    def judge(self, outcome: FetchOutcome, picture: Picture, body: bytes) -> None:
        """Keep a picture, unless the table's hash is of another one."""
        outcome.width, outcome.height = picture.width, picture.height
        outcome.original_width, outcome.original_height = picture.original_width, picture.original_height
        outcome.exif, outcome.sha256 = picture.exif, picture.sha256
        kind = self.settings.output.columns.hash_kind
        if kind is not None:
            outcome.hash_check = check_hash(body, self.hashes[outcome.index], kind)
            if self.settings.output.drop_changed and outcome.hash_check in CHANGED:
                outcome.reason, outcome.message = reasons.HASH_CHANGED, f"the table's hash: {outcome.hash_check}"
                return
        outcome.jpg_bytes = len(picture.jpg)
        self.places[outcome.index] = self.spool.append(picture.jpg)

    def image(self, i: int) -> bytes:
        """The stored bytes of row `i`."""
        outcome = self.outcomes[i]
        assert outcome is not None
        return self.spool.read(self.places[i], outcome.jpg_bytes or 0)

    def keys(self) -> list[str]:
        """The keys of the rows, as img2dataset numbers them."""
        layout, wide = self.settings.layout, math.ceil(math.log10(self.settings.output.samples_per_shard))
        name, number = layout.shard(self.job.shard.number), self.job.shard.number
        return [f"{10**wide * number + i:0{len(name) + wide}d}" for i in range(len(self.urls))]

    def publish(self) -> DownloadState:
        """Write the shard's files, the state last. Raises UserError when the disk refuses.

        A shard that takes the place of another is made beside it and moved when it is whole.
        """
        settings, number = self.settings, self.job.shard.number
        outcomes = [outcome for outcome in self.outcomes if outcome is not None]
        if len(outcomes) != len(self.outcomes):
            raise InternalError(f"shard {number} lacks {len(self.outcomes) - len(outcomes)} answers: report this")
        final = settings.layout.files(number)
        folder = new_folder(settings.layout, number) if self.job.retry is not None else None
        files = final if folder is None else final.inside(folder)
        if folder is None:
            # Tars come in steps of 10,240 bytes: the state of a damaged shard may seem right for half of a new one.
            remove(final.state)
        ledger = ledger_table(self.keys(), self.numbers, self.rows.urls, self.rows.captions, outcomes)
        names = own_names(self.rows.kept.column_names)
        table = rows_table(self.rows, ledger, outcomes, names)
        facts = write_data(settings.output.format, files, table, outcomes, names, self.image, settings.kinds)
        place = ledger.column_names.index("offset")
        offsets = pa.array([facts.offsets.get(i) for i in range(len(outcomes))], ledger["offset"].type)
        write_ledger(files.ledger, ledger.set_column(place, ledger.schema.field(place), offsets))
        statuses = Counter(status_of(outcome) for outcome in outcomes)
        state = DownloadState(
            count=len(outcomes),
            failed_to_download=statuses[NOT_FETCHED],
            failed_to_resize=statuses[NOT_USABLE],
            empty_captions=sum(caption_problem(caption) is not None for caption in self.rows.captions.to_pylist()),
            body_bytes=sum(outcome.body_bytes or 0 for outcome in outcomes),
            start_time=self.started,
            end_time=time.time(),
            round=self.round,
            sizes=files.sizes(),
            crc32c=facts.crc32c,
            kinds=facts.kinds,
            present=facts.present,
            **outcome_counts(outcomes),
        )
        write_state(files.state, state)
        if folder is not None:
            commit(folder, final)
        return state


class Spool:
    """A file for the images of a shard until they are written in order.

    It lies on the disk of the output (of a remote output: where TMPDIR says).

    It has no name, so a killed process leaves nothing of it. It is closed when its last user lets go of it: a thread
    that works on though the download has failed must not write into a file that has got its number since. Safe from
    several threads.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the disk refuses."""
        self.folder = folder
        self.lock = threading.Lock()
        self.end = 0
        with (
            disk_errors(folder),
            tempfile.TemporaryFile(dir=None if is_remote(folder) else folder, buffering=0) as file,
        ):
            self.descriptor = os.dup(file.fileno())

    def append(self, data: bytes) -> int:
        """Write bytes at the end; return their place. Raises UserError when the disk refuses."""
        with self.lock:
            start = place = self.end
            self.end += len(data)
        left = memoryview(data)
        with disk_errors(self.folder):
            while left:
                written = os.pwrite(self.descriptor, left, place)
                left, place = left[written:], place + written
        return start

    def read(self, place: int, count: int) -> bytes:
        """The bytes at a place."""
        return os.pread(self.descriptor, count, place)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
