"""Several sources as one, mixed by weight, in an order that is a pure function of the position.

Which member a position belongs to is decided by halving: the members are split in two, and of the first n samples the
first half gets n times its share of the weight, rounded; within each half it goes on likewise. So both the member and
how many samples it has had so far are known for any position at once, the shares hold at every moment and for ever, and
each member goes through its own shuffled order without gap or repeat, in epochs of its own length.

How far a member's count can be from its share: rounding at the top is off by at most 1/2; on each further level what
was off is multiplied by a share below 1 and rounding adds 1/2. Hence less than d/2 for d levels of halving (1/2 at one
level): never a whole sample for up to four members.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from clipkit.counter_rng import UInt64Array, mix_int
from clipkit.errors import UserError
from clipkit.train.order import Int64Array
from clipkit.train.sources.source import Pair, Source

# Positions are multiplied by weights in 64 bits.
_MAX_TOTAL = 1 << 31
_MEMBER = 0xA24BAED4963EE407  # any odd number


@dataclass(frozen=True)
class Member:
    """One source of a mixture. `label` tells it from the others in the names of records."""

    source: Source
    weight: Fraction
    label: str


class Mixture(Source):
    """The members' records, one member's numbers behind another's, in the order that their weights say."""

    def __init__(self, members: Sequence[Member]) -> None:
        """Raises UserError for a weight that isn't positive and a member without records."""
        for member in members:
            if member.weight <= 0:
                raise UserError(f"the weight of {member.label} is {float(member.weight)}: give one above 0")
            if member.source.num_records < 1:
                raise UserError(f"{member.label} has no records: leave it out")
        if len({member.source.feature_width for member in members}) > 1:
            raise UserError("vectors of clipkit embed can't be mixed with images, or with others of another width")
        self.members = tuple(members)
        self.weights = whole_weights([member.weight for member in members])
        self.firsts = np.cumsum([0, *(member.source.num_records for member in members)]).tolist()

    def __repr__(self) -> str:
        return f"<Mixture of {', '.join(member.label for member in self.members)}>"

    @property
    def num_records(self) -> int:
        return int(self.firsts[-1])

    @property
    def feature_width(self) -> int | None:
        return self.members[0].source.feature_width

    @property
    def text_width(self) -> int | None:
        return self.members[0].source.text_width

    @property
    def caption_sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for member in self.members for name in member.source.caption_sources))

    def key(self, record: int) -> str:
        number = self.member_of(record)
        member = self.members[number]
        return f"{member.label}: {member.source.key(record - self.firsts[number])}"

    def block(self, record: int, block_size: int) -> range:
        number = self.member_of(record)
        first = self.firsts[number]
        block = self.members[number].source.block(record - first, block_size)
        return range(block.start + first, block.stop + first)

    def member_of(self, record: int) -> int:
        """The number of the member that a record belongs to."""
        return int(np.searchsorted(self.firsts, record, side="right")) - 1

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        numbers = (np.searchsorted(self.firsts, np.asarray(records, np.int64), side="right") - 1).tolist()
        wanted: list[list[int]] = [[] for _ in self.members]
        for record, number in zip(records, numbers, strict=True):
            wanted[number].append(record - self.firsts[number])
        found = [member.source.pairs(part) for member, part in zip(self.members, wanted, strict=True)]
        for number in numbers:
            yield next(found[number])

    def records_at(self, positions_B: UInt64Array, seed: int, block_size: int) -> Int64Array:
        members_B, places_B = assign(positions_B, self.weights)
        records_B = np.empty(len(members_B), np.int64)
        for number, member in enumerate(self.members):
            of_member = members_B == number
            if of_member.any():
                found = member.source.records_at(places_B[of_member], member_seed(seed, number), block_size)
                records_B[of_member] = found + self.firsts[number]
        return records_B


def whole_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers in the ratio of the weights; exactly so unless they come to more than 2**31, then rounded."""
    common = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * common) for weight in weights]
    total = sum(whole)
    if total > _MAX_TOTAL:
        whole = [max(1, round(Fraction(weight * (_MAX_TOTAL - len(whole)), total))) for weight in whole]
    return tuple(whole)


def member_seed(seed: int, number: int) -> int:
    """The seed of a member's own order: two members of one size are shuffled differently."""
    return mix_int(seed + (number + 1) * _MEMBER)


def assign(positions_B: UInt64Array, weights: Sequence[int]) -> tuple[Int64Array, UInt64Array]:
    """For each position of the mixture its member, int64[B], and the position in that member, uint64[B]."""
    positions = np.atleast_1d(np.asarray(positions_B)).astype(np.uint64)
    members_B, places_B = np.zeros(len(positions), np.int64), positions.copy()
    _halve(np.arange(len(positions)), positions, 0, list(weights), members_B, places_B)
    return members_B, places_B


def _halve(
    rows: Int64Array,
    positions: UInt64Array,
    first: int,
    weights: list[int],
    members_B: Int64Array,
    places_B: UInt64Array,
) -> None:
    """Share `positions`, which belong to the members from `first` on with these weights, and write down where."""
    if len(weights) == 1:
        members_B[rows], places_B[rows] = first, positions
        return
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    before, after = share(positions, left, total), share(positions + np.uint64(1), left, total)
    is_left = after > before
    _halve(rows[is_left], before[is_left], first, weights[:middle], members_B, places_B)
    rest = positions - before
    _halve(rows[~is_left], rest[~is_left], first + middle, weights[middle:], members_B, places_B)


def share(counts: UInt64Array, part: int, total: int) -> UInt64Array:
    """`counts * part / total`, rounded half up, without leaving 64 bits."""
    wholes, rests = np.divmod(counts, np.uint64(total))
    return wholes * np.uint64(part) + (rests * np.uint64(part) + np.uint64(total // 2)) // np.uint64(total)
