"""From samples as their shards hold them to pairs as a dataset stores them: what `build-tfds` does to each sample.

A sample goes through these in turn, and the first that refuses it gives the reason: its reader, `--where`, caption and
image (`pair_writer.judge`), `--dedup`, `--keep-best`, `--balance`, `--resize`. Each judges the sample by itself or by
the sample's number, so it doesn't matter how samples are cut into shards.

`--where`: a sample's metadata become a row of an Arrow table, so that DuckDB judges it as it judges a table of URLs. A
sample's columns are what its shard holds, without a schema. The kinds are found on the first samples; where a later
value needs a wider kind, the condition is asked again with that kind, so that no value is taken for missing. Numbers
that turn out to stand beside text are refused, unless the condition casts them: as text, 10 comes before 9.

`--precompute` adds what a trainer would otherwise make of each caption again and again. `clipkit_tokens` is a list of
ints: what `Tokenizer.encode` gives, so without start and end and not cut. `clipkit_syntax` is a list of ints, one for
each token: what `Syntax.priorities` gives for them (0 noun, 1 adjective, 2 verb, 3 other). The two are the arguments
`ids` and `priorities` of `clipkit.text.tokens.reduce_text`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.errors import UserError
from clipkit.formats.kinds import EMPTY_LIST, KindWidenedError, arrow_type, fit, kind_of, own_name, unify
from clipkit.formats.manifest import PRECOMPUTED_COLUMNS, SYNTAX, TOKENS
from clipkit.pixels.images import ImageError
from clipkit.storage.files import read_json, write_json
from clipkit.text.tokenizer import Tokenizer
from clipkit.tfrecord_tools.pictures.compact import compact
from clipkit.tfrecord_tools.readers.shards import InputShard, read_shard
from clipkit.tfrecord_tools.reasons import NOT_AN_IMAGE, NOT_WANTED
from clipkit.tfrecord_tools.sample import Sample
from clipkit.tfrecord_tools.tables.where import Mask, RowFilter
from clipkit.tfrecord_tools.writing.pair_writer import judge, stored_image

if TYPE_CHECKING:
    from clipkit.text.syntax import Syntax

CAPTION = "txt"

BATCH_SAMPLES = 256
BATCH_BYTES = 1 << 20  # of images, that they are still in the processor's cache when they are written
ASKED_BYTES = 16 << 20  # the same with a condition, which costs a millisecond a batch
COLUMN_BYTES = 600  # about what a record has beside its image


@dataclass(frozen=True)
class Part:
    """What an output shard takes of one input shard: the samples that begin in [start, stop); None is its end."""

    shard: InputShard
    start: int
    stop: int | None


def parts_id(parts: Sequence[Part]) -> str:
    """A line that differs when a source or a cut does."""
    return " ".join(
        f"{part.shard.path.name}:{part.shard.size}{part.shard.sha256}:{part.start}:{part.stop}" for part in parts
    )


@dataclass(frozen=True)
class Preparation:
    """What is done to each sample. `kinds` are those of the columns that `where` may name."""

    where: str | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    resize: int | None = None
    quality: int = 90
    precompute: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """What lies between two cuts, of about `size` bytes: what a worker is given in every pass.

    `path` is the file that becomes of it; in `folder` the passes leave for each other what they found. `all_parts` is
    the hash of what lies in all stretches, on which depends what is found by comparing samples.
    """

    number: int
    path: Path
    folder: Path
    parts: tuple[Part, ...]
    size: int
    all_parts: str

    def beside(self, suffix: str, what: str = "shard") -> Path:
        """A file of `what` a pass has left of the stretch."""
        return self.folder / f"{what}-{self.number:05d}{suffix}"

    def skipped(self, split: str) -> Path:
        """The list of the samples of a split that were left out, a JSON line each."""
        return self.beside(f".skipped-{split}.jsonl")

    def made_of(self, compared: bool) -> str:
        """A line that differs when a source or a cut does, with `compared` those of any stretch."""
        return f"{parts_id(self.parts)} {self.all_parts}" if compared else parts_id(self.parts)

    def write_count(self, what: str, count: int, compared: bool) -> None:
        """Say that all of `what` is written, and how many there are; `compared` as in `made_of`."""
        write_json(self.beside(".json", what), {"parts": self.made_of(compared), what: count})

    def read_count(self, what: str, compared: bool) -> int | None:
        """The number that an earlier run wrote; None where it didn't, or where that was made of something else."""
        path = self.beside(".json", what)
        state: dict[str, Any] = read_json(path) if path.exists() else {}
        return state.get(what) if state.get("parts") == self.made_of(compared) else None


class Judged(NamedTuple):
    """A sample, the number of its part, the format of its image, and the reason not to take it."""

    part: int
    sample: Sample
    kind: str
    reason: str | None


class Prepared(NamedTuple):
    """A pair to store, or with a `reason` one not to take. `kind` is the format that its image had."""

    part: int
    key: str
    reason: str | None
    kind: str = ""
    image: bytes = b""
    caption: str = ""
    columns: Mapping[str, Any] = {}


def judged(parts: Sequence[Part], preparation: Preparation) -> Iterator[list[Judged]]:
    """All samples of the parts in order, a batch at a time, with the reasons that the sample itself gives."""
    condition = Condition(preparation.where, preparation.kinds) if preparation.where else None
    for batch in batches(parts, BATCH_BYTES if condition is None else ASKED_BYTES):
        yield judge_batch(batch, condition)


def usable(parts: Sequence[Part], preparation: Preparation) -> Iterator[tuple[int, Sample]]:
    """Of all samples of the parts, those that may be taken by what they are, with their numbers."""
    numbers = count()
    for batch in judged(parts, preparation):
        for each in batch:
            number = next(numbers)
            if not each.reason:
                yield number, each.sample


def judge_batch(batch: Sequence[tuple[int, Sample]], condition: "Condition | None") -> list[Judged]:
    """The reasons that some samples give, with the numbers of their parts."""
    wanted = np.ones(len(batch), np.bool_)
    if condition is not None:
        asked = [i for i, (_, sample) in enumerate(batch) if sample.problem is None]
        wanted[asked] = condition.mask([batch[i][1] for i in asked])
    return [
        Judged(part, sample, *(judge(sample) if want else ("", NOT_WANTED)))
        for (part, sample), want in zip(batch, wanted, strict=True)
    ]


def batches(parts: Sequence[Part], most_bytes: int) -> Iterator[list[tuple[int, Sample]]]:
    """The samples with the number of their part, a few at a time, however large their images are."""
    batch: list[tuple[int, Sample]] = []
    size = 0
    for number, part in enumerate(parts):
        for sample in read_shard(part.shard, part.start, part.stop):
            batch.append((number, sample))
            size += len(sample.image or b"")
            if len(batch) == BATCH_SAMPLES or size >= most_bytes:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def prepared(parts: Sequence[Part], preparation: Preparation, left_out: Mapping[int, str]) -> Iterator[Prepared]:
    """All samples of the parts in order; `left_out` has the reasons for those, by number, that aren't to be taken."""
    number = 0
    for batch in judged(parts, preparation):
        pairs = []
        for part, sample, kind, reason in batch:
            pairs.append(_pair(part, sample, kind, left_out.get(number, reason), preparation))
            number += 1
        yield from with_precomputed(pairs, preparation.precompute)


def _pair(part: int, sample: Sample, kind: str, reason: str | None, preparation: Preparation) -> Prepared:
    if reason is not None:
        return Prepared(part, sample.key, reason)
    columns: Mapping[str, Any] = sample.columns
    image: bytes | None
    if preparation.resize is not None:
        assert sample.image is not None
        try:
            small = compact(sample.image, preparation.resize, preparation.quality)
        except ImageError:
            return Prepared(part, sample.key, NOT_AN_IMAGE)
        image = small.jpg
        sizes = {"width": small.width, "height": small.height}
        columns = {**columns, **{own_name(columns, name): size for name, size in sizes.items()}}
        kind = "jpeg"
    else:
        image = stored_image(sample, kind)
        if image is None:
            return Prepared(part, sample.key, NOT_AN_IMAGE)
    return Prepared(part, sample.key, None, kind, image, sample.caption or "", columns)


def with_precomputed(pairs: Sequence[Prepared], wanted: Sequence[str]) -> Iterator[Prepared]:
    """The same pairs with the precomputed columns."""
    captions = [pair.caption for pair in pairs if pair.reason is None] if wanted else []
    columns = {TOKENS: tokenizer().encode(captions)} if captions else {}
    if captions and SYNTAX in wanted:
        columns[SYNTAX] = syntax().priorities(columns[TOKENS])
    made = ({PRECOMPUTED_COLUMNS[name]: columns[name][i] for name in wanted} for i in range(len(captions)))
    for pair in pairs:
        yield pair._replace(columns={**pair.columns, **next(made)}) if captions and pair.reason is None else pair


def part_left(samples: Sequence[Sample], preparation: Preparation) -> float:
    """About what part of the bytes of some samples will be left in the records."""
    condition = Condition(preparation.where, preparation.kinds) if preparation.where else None
    pairs = [
        _pair(0, sample, kind, reason, preparation)
        for _, sample, kind, reason in judge_batch(list(enumerate(samples)), condition)
    ]
    left = sum(len(pair.image) + COLUMN_BYTES for pair in pairs if pair.reason is None)
    return left / max(sum(len(sample.image or b"") + COLUMN_BYTES for sample in samples), 1)


def check_sizes(resize: int | None, quality: int) -> None:
    """Raise UserError for an invalid size or quality."""
    if resize is not None and resize < 1:
        raise UserError(f"--resize {resize}: give the shorter side in pixels, such as 128")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: give 1 to 100")


# ---------------------------------------------------------------------------------------------------------------------
# --where
# ---------------------------------------------------------------------------------------------------------------------


def kinds_of_samples(samples: Iterable[Sample]) -> dict[str, str]:
    """The kinds of the columns of some samples, the caption as `txt`; text where no sample has a value."""
    schemas = [{CAPTION: "text"}]
    names: dict[str, None] = {}
    for sample in samples:
        names.update(dict.fromkeys(sample.columns))
        schemas.append({name: kind for name, value in sample.columns.items() if (kind := kind_of(value)) is not None})
    return {**dict.fromkeys(names, "text"), **unify(schemas)}


def arrow_schema(kinds: Mapping[str, str]) -> pa.Schema:
    """The columns in Arrow's types."""
    return pa.schema([(name, arrow_type(kind)) for name, kind in sorted(kinds.items())])


class Condition:
    """A condition asked of samples; one a worker, not for several threads."""

    def __init__(self, where: str, kinds: Mapping[str, str]) -> None:
        """`kinds` of the columns that there are. Raises UserError for one that is invalid or names others."""
        self.where = where
        self.kinds = dict(kinds)
        self.filter = RowFilter(where, arrow_schema(kinds))

    def mask(self, samples: Sequence[Sample]) -> Mask:
        """bool[len(samples)]: which fulfil the condition; a missing value makes it unknown, which counts as not."""
        while True:
            named = {name: self.kinds[name] for name in self.filter.columns}
            try:
                rows = [self._row(sample, named) for sample in samples]
            except KindWidenedError as widened:
                self._check_widened(widened.kinds)
                self.kinds.update(widened.kinds)
                self.filter = RowFilter(self.where, arrow_schema(self.kinds))
                continue
            return self.filter.mask(pa.Table.from_pylist(rows, arrow_schema(named)))

    def _check_widened(self, kinds: Mapping[str, str]) -> None:
        """Raise UserError for what was compared as numbers before, and would be compared as text from here on."""
        for name in self.filter.columns:
            before, now = self.kinds[name], kinds[name]
            if name not in self.filter.cast and now.endswith("text") and before not in (now, EMPTY_LIST):
                raise UserError(
                    f"--where {self.where!r}: column {name!r} holds text in some samples and {before} in others: "
                    f"write TRY_CAST({name} AS DOUBLE) or CAST({name} AS VARCHAR)"
                )

    @staticmethod
    def _row(sample: Sample, kinds: dict[str, str]) -> dict[str, object]:
        columns = {name: sample.columns.get(name) for name in kinds}
        if CAPTION in kinds:
            columns[CAPTION] = sample.caption
        fitted = fit(columns, kinds, {})
        return {name: v.encode("utf-8", "replace") if isinstance(v, str) else v for name, v in fitted.items()}


# ---------------------------------------------------------------------------------------------------------------------
# --precompute
# ---------------------------------------------------------------------------------------------------------------------


def check_precompute(wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted columns in their order. Raises UserError for others, and when the tagger isn't installed."""
    for name in wanted:
        if name not in PRECOMPUTED_COLUMNS:
            raise UserError(f"can't precompute {name!r}: choose among {', '.join(PRECOMPUTED_COLUMNS)}")
    if SYNTAX in wanted:
        from clipkit.text.syntax import load_tagger

        load_tagger()
    return tuple(name for name in PRECOMPUTED_COLUMNS if name in wanted)


@cache
def tokenizer() -> Tokenizer:
    """One a process: it takes a third of a second to build, and a worker makes many shards."""
    return Tokenizer()


@cache
def syntax() -> "Syntax":
    """One a process: its memory of tagged words makes it a hundred times as fast."""
    from clipkit.text.syntax import Syntax

    return Syntax(tokenizer())
