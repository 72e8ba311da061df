"""`--keep-best` and `--balance`: which samples of the whole dataset are taken, known before the first is written.

    survey      each stretch leaves of each sample that may be taken: a hash of its key, its score, its concepts
    here        the score from which on samples are kept, then how many of these have each concept
    choose      each stretch leaves the numbers of the samples that don't stay, with the reason

So the images are read once more than without, and memory is flat: what is held of all samples together is a table of
scores, where `--by` names one. A sample stays by what it is, not by where it stands: neither the order of the sources
nor that of the concepts, the cuts or the workers change anything.

`--keep-best` takes the share of the samples with a score, rounded up; of equal scores those whose keys have the larger
hashes. `--balance` is MetaCLIP's (see `concepts`): a sample stays when for any of its concepts a draw is below
limit / count, the count being that of the samples that have the concept; a sample without any concept goes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipkit.counter_rng import sample_keys, uniform
from clipkit.errors import UserError
from clipkit.formats.tables import KEY_NAME, is_table, read_columns, read_schema
from clipkit.storage.files import as_path, load_array, require_file, save_array
from clipkit.tfrecord_tools.build.concepts import ConceptList, hashes, load_matcher
from clipkit.tfrecord_tools.build.dedup import DecideJob, duplicates_in
from clipkit.tfrecord_tools.build.prepare import Preparation, Stretch, usable
from clipkit.tfrecord_tools.reasons import NO_CONCEPT, NO_SCORE, NOT_BEST, THINNED_OUT
from clipkit.tfrecord_tools.sample import Sample
from clipkit.tfrecord_tools.tables.digests import sha256_of

SURVEY = "survey"
LIMIT = 20_000
SCORE_COLUMN = "similarity"
DRAWS = 32  # the stream of random numbers
MOST_WITHOUT_SCORE = 0.01
SHOWN = 12  # concepts in the account

SURVEYED = np.dtype([("number", "<u4"), ("concepts", "<u4"), ("key", "<u8")])
CONCEPT = np.dtype([("count", "<u8"), ("key", "<u8")])
GOING = np.dtype([("number", "<u4"), ("reason", "u1")])
REASONS = ("", NO_SCORE, NOT_BEST, NO_CONCEPT, THINNED_OUT)

Rows = npt.NDArray[Any]
UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Best:
    """`--keep-best`: the share of the samples with the best scores of column `by`, of the samples or of a `table`."""

    share: float
    by: str
    table: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Balance:
    """`--balance`: a list of so many `concepts`, and from which count on a concept's samples are thinned out."""

    name: str
    concepts: int
    sha256: str
    limit: int
    seed: int


@dataclass(frozen=True)
class Cut:
    """The last sample that is kept by its score: the score as `sortable` makes it, and the hash of its key."""

    score: int
    key: int


def survey_path(job: Stretch, suffix: str) -> Path:
    """A file that the survey of a stretch leaves."""
    return job.beside(suffix, SURVEY)


def check_best(share: float | None, by: str | None) -> Best | None:
    """The options of `--keep-best`. Raises UserError for a share that isn't one, and for one without the other."""
    if share is None or by is None:
        if share is not None or by is not None:
            raise UserError("--keep-best and --by go together, as in --keep-best 0.3 --by similarity")
        return None
    if not 0 < share < 1:
        raise UserError(f"--keep-best {share}: give the share to keep, such as 0.3")
    name, colon, column = by.rpartition(":")
    if is_table(as_path(by)):
        name, column = by, SCORE_COLUMN
    elif not (colon and is_table(as_path(name))):
        return Best(share, by)
    path = require_file(as_path(name), "table of scores")
    return Best(share, column, name, sha256_of([path]))


def check_balance(concepts: ConceptList | None, limit: int | None, seed: int | None) -> Balance | None:
    """The options of `--balance`. Raises UserError for a limit or a seed without it."""
    if concepts is None:
        for option, value in (("--limit", limit), ("--seed", seed)):
            if value is not None:
                raise UserError(f"{option} is for --balance: leave it out, or name a list of concepts")
        return None
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give at least 1")
    return Balance(concepts.name, len(concepts.texts), concepts.sha256, LIMIT if limit is None else limit, seed or 0)


# ---- Survey ----------------------------------------------------------------------------------------------------------


def survey(
    job: Stretch,
    preparation: Preparation,
    duplicates: tuple[DecideJob, ...],
    by: str | None,
    concepts: tuple[Path, str] | None,
) -> int:
    """Write what the choice depends on; the number of samples that may be taken.

    `by` is a column of the samples, `concepts` a file of them and its hash.
    """
    matcher = load_matcher(*concepts) if concepts else None
    again = set(duplicates_in(duplicates, job.number).tolist())
    keys: list[str] = []
    numbers: list[int] = []
    scores: list[float] = []
    lengths: list[int] = []
    found: list[int] = []
    for number, sample in usable(job.parts, preparation):
        if number in again:
            continue
        numbers.append(number)
        keys.append(sample.key)
        if by is not None:
            scores.append(score_of(sample, by))
        matches = matcher.matches(sample.caption or "") if matcher else []
        lengths.append(len(matches))
        found += matches
    rows = np.empty(len(keys), SURVEYED)
    rows["number"], rows["concepts"], rows["key"] = numbers, lengths, np.array(hashes(keys), np.uint64)
    save_array(survey_path(job, ".npy"), rows)
    save_array(survey_path(job, "-concepts.npy"), np.array(found, np.uint32))
    if by is not None:
        save_array(survey_path(job, "-scores.npy"), np.array(scores, np.float64))
    job.write_count(SURVEY, len(rows), compared=bool(duplicates))
    return len(rows)


def score_of(sample: Sample, by: str) -> float:
    """A sample's score; NaN where it has none. Raises UserError for what isn't a number."""
    value = sample.columns.get(by)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"--by {by}: sample {sample.key} has {value!r:.100}, which isn't a number: name a column of scores"
        )
    return float(value)


def join_scores(jobs: Sequence[Stretch], best: Best) -> None:
    """Write the scores that a table has for the samples of all stretches; NaN where it has none."""
    keys, scores = read_scores(as_path(best.table), best.by)
    for job in jobs:
        wanted = load_array(survey_path(job, ".npy"))["key"]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        save_array(survey_path(job, "-scores.npy"), np.where(keys[place] == wanted, scores[place], np.nan))


def read_scores(path: Path, column: str) -> tuple[UInt64Array, Float64Array]:
    """The hashes of a table's keys, rising, and the scores.

    Raises UserError for a table that lacks a column, for text, and for two scores of a key.
    """
    names = read_schema(path).names
    for name in (KEY_NAME, column):
        if name not in names:
            raise UserError(f"--by {path} has no column {name!r}, but {', '.join(names)}: give TABLE or TABLE:COLUMN")
    keys, scores = [np.empty(0, np.uint64)], [np.empty(0)]
    for batch in read_columns(path, [KEY_NAME, column]):
        keys.append(np.array(hashes(map(str, batch.column(0).to_pylist())), np.uint64))
        try:
            scores.append(batch.column(1).cast(pa.float64()).to_numpy(zero_copy_only=False))
        except pa.ArrowException as error:
            raise UserError(f"--by {path}: column {column!r} isn't of numbers: name another as TABLE:COLUMN") from error
    key_N, score_N = np.concatenate(keys), np.concatenate(scores)
    if not len(key_N):
        raise UserError(f"--by {path} holds no row: give the scores of these samples")
    order = np.argsort(key_N, kind="stable")
    key_N, score_N = key_N[order], score_N[order]
    same = key_N[1:] == key_N[:-1]
    other = same & (score_N[1:] != score_N[:-1]) & ~(np.isnan(score_N[1:]) & np.isnan(score_N[:-1]))
    if other.any():
        raise UserError(f"--by {path} has two scores for a key, {int(other.sum()):,} times: give one a key")
    return key_N, score_N


# ---- The cut and the counts ------------------------------------------------------------------------------------------


def find_cut(jobs: Sequence[Stretch], best: Best) -> tuple[Cut, dict[str, Any]]:
    """The last sample that is kept, and the account. Raises UserError where more than 1% have no score, or all."""
    total = without = 0
    for job in jobs:
        missing = np.isnan(load_array(survey_path(job, "-scores.npy")))
        total, without = total + len(missing), without + int(missing.sum())
    if without > MOST_WITHOUT_SCORE * total:
        where = best.table or f"column {best.by!r}"
        raise UserError(
            f"{without:,} of {total:,} samples have no score (missing or NaN) in {where}: score them all, or leave out "
            "with --where those that have none"
        )
    kept = math.ceil(Fraction(str(best.share)) * (total - without))

    def scored() -> Iterator[tuple[UInt64Array, UInt64Array]]:
        for job in jobs:
            scores = load_array(survey_path(job, "-scores.npy"))
            there = ~np.isnan(scores)
            yield sortable(scores[there]), load_array(survey_path(job, ".npy"))["key"][there]

    cut = select(scored, kept) if kept else Cut(0, 0)
    return cut, {**asdict(best), "samples": total, "without_score": without, "score": unsorted_score(cut.score)}


def sortable(scores: Float64Array) -> UInt64Array:
    """Numbers in the order of the scores, none of which is NaN; -0 and 0 are one."""
    bits = (scores + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) != 0
    return cast(UInt64Array, np.where(negative, ~bits, bits | np.uint64(1 << 63)))


def unsorted_score(number: int) -> float:
    """The score that `sortable` gives such a number."""
    bits = number ^ (1 << 63) if number >> 63 else ~number & (1 << 64) - 1
    return float(np.array(bits, np.uint64).view(np.float64))


def select(scored: Callable[[], Iterator[tuple[UInt64Array, UInt64Array]]], kept: int) -> Cut:
    """The smallest of the `kept` largest pairs (score, key), found 16 bits at a time, so that memory stays flat."""
    found: list[int] = []
    for word in (0, 1):
        prefix = 0
        for shift in (48, 32, 16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for pair in scored():
                values = pair[word] if word == 0 else pair[1][pair[0] == np.uint64(found[0])]
                if shift < 48:
                    values = values[values >> np.uint64(shift + 16) == np.uint64(prefix)]
                digits = values >> np.uint64(shift) & np.uint64(0xFFFF)
                counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
            above = np.cumsum(counts[::-1])  # how many have the largest digits
            place = int(np.searchsorted(above, kept))
            kept -= int(above[place - 1]) if place else 0
            prefix = prefix << 16 | (1 << 16) - 1 - place
        found.append(prefix)
    return Cut(*found)


def count_concepts(jobs: Sequence[Stretch], cut: Cut | None, concepts: Sequence[str]) -> Rows:
    """How many of the samples that are kept by their score have each concept, with the concepts' hashes."""
    made = np.zeros(len(concepts), CONCEPT)
    made["key"] = np.array(hashes(concepts), np.uint64)
    for job in jobs:
        rows, found = load_array(survey_path(job, ".npy")), load_array(survey_path(job, "-concepts.npy"))
        stays = np.repeat(kept_by_score(job, rows, cut)[0], rows["concepts"])
        made["count"] += np.bincount(found[stays], minlength=len(made)).astype(np.uint64)
    return made


def kept_by_score(job: Stretch, rows: Rows, cut: Cut | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """bool[n] each: which samples of a stretch the score keeps, and which have none."""
    if cut is None:
        return np.ones(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    scores = load_array(survey_path(job, "-scores.npy"))
    missing = np.isnan(scores)
    values, score = sortable(np.where(missing, 0, scores)), np.uint64(cut.score)
    better = (values > score) | (values == score) & (rows["key"] >= np.uint64(cut.key))
    return better & ~missing, missing


# ---- Choose ----------------------------------------------------------------------------------------------------------


def choose(job: Stretch, cut: Cut | None, balance: Balance | None, counts: Path | None) -> Counter[str]:
    """Write which samples of a stretch go, and why. What it returns is added up to the account.

    `counts` is the file of what `count_concepts` found.
    """
    rows = load_array(survey_path(job, ".npy"))
    stays, missing = kept_by_score(job, rows, cut)
    reason = np.where(missing, REASONS.index(NO_SCORE), np.where(stays, 0, REASONS.index(NOT_BEST)))
    told = Counter({"kept by score": int(stays.sum())})
    if balance is not None and counts is not None:
        concepts, found = load_array(counts), load_array(survey_path(job, "-concepts.npy"))
        owners = np.repeat(np.arange(len(rows)), rows["concepts"])
        chances = balance.limit / np.maximum(concepts["count"][found], balance.limit)
        keys = sample_keys(balance.seed, rows["key"])[owners] ^ concepts["key"][found]
        drawn = np.zeros(len(rows), np.bool_)
        drawn[owners[uniform(keys, 1, DRAWS)[:, 0] < chances]] = True
        bare = rows["concepts"] == 0
        reason[stays & bare] = REASONS.index(NO_CONCEPT)
        reason[stays & ~bare & ~drawn] = REASONS.index(THINNED_OUT)
        told["with a concept"] = int((stays & ~bare).sum())
        kept = found[(reason == 0)[owners]]
        told["head"] = int((concepts["count"][kept] > balance.limit).sum())
        told["tail"] = len(kept) - told["head"]
        for place in most_frequent(concepts):
            told[str(place)] = int((kept == place).sum())
    told["kept"] = int((reason == 0).sum())
    going = np.empty(int((reason > 0).sum()), GOING)
    going["number"], going["reason"] = rows["number"][reason > 0], reason[reason > 0]
    save_array(survey_path(job, "-going.npy"), going)
    return told


def most_frequent(concepts: Rows) -> list[int]:
    """The numbers of the concepts that most samples have, most first."""
    order = np.argsort(-concepts["count"].astype(np.int64), kind="stable")[:SHOWN]
    return [place for place in order.tolist() if concepts["count"][place]]


def going(job: Stretch) -> dict[int, str]:
    """The numbers of the samples of a stretch that don't stay, each with the reason."""
    found = load_array(survey_path(job, "-going.npy"))
    return {number: REASONS[reason] for number, reason in found.tolist()}


def balance_account(balance: Balance, texts: Sequence[str], concepts: Rows, told: Counter[str]) -> dict[str, Any]:
    """What `--balance` did: concepts and matches (a sample with a concept) of head and tail, before and after."""
    head = concepts["count"] > balance.limit
    frequent = [[texts[each], int(concepts["count"][each]), told[str(each)]] for each in most_frequent(concepts)]
    return {
        **asdict(balance),
        "samples": told["kept by score"],
        "with_concept": told["with a concept"],
        "kept": told["kept"],
        "head": {
            "concepts": int(head.sum()),
            "matches": int(concepts["count"][head].sum()),
            "kept": told["head"],
        },
        "tail": {
            "concepts": int((concepts["count"] > 0).sum() - head.sum()),
            "matches": int(concepts["count"][~head].sum()),
            "kept": told["tail"],
        },
        "frequent": frequent,
    }
