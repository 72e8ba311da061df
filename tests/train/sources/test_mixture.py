"""Mixtures: shares at every prefix, each member's positions in a row, and nothing that depends on how one asks."""

import pickle
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.train.order import record_indices
from clipkit.train.sources.mixture import Member, Mixture, assign, member_seed, share, whole_weights
from clipkit.train.sources.source import Pair, Source

WEIGHTS = st.lists(st.integers(1, 1 << 27), min_size=1, max_size=9)
SMALL_WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


class Numbers(Source):
    """Records that say who they are; those in `bad` can't be used."""

    def __init__(self, name: str, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.name, self.count, self.bad = name, count, bad

    @property
    def num_records(self) -> int:
        return self.count

    def key(self, record: int) -> str:
        return f"{self.name}:{record}"

    def pairs(self, records: Sequence[int]) -> Iterator[Pair | UserError]:
        for record in records:
            assert 0 <= record < self.count
            yield UserError("bad") if record in self.bad else Pair(b"", self.key(record))


def mixture(*members: tuple[str, int, str]) -> Mixture:
    return Mixture([Member(Numbers(name, count), Fraction(weight), name) for name, count, weight in members])


def bound(members: int) -> float:
    """What the module promises: less than half a sample a level of halving."""
    return max(1, ceil(log2(members))) / 2 if members > 1 else 0.0


@given(weights=SMALL_WEIGHTS | WEIGHTS, start=st.integers(0, 1 << 40), count=st.integers(1, 600))
def test_shares_hold_at_every_prefix_and_positions_follow_each_other(
    weights: list[int], start: int, count: int
) -> None:
    positions = np.arange(start, start + count, dtype=np.uint64)
    members, places = assign(positions, weights)
    total = sum(weights)
    for number, weight in enumerate(weights):
        own = places[members == number]
        if not len(own):
            continue
        assert (np.diff(own.astype(np.int64)) == 1).all()
        # `own` is how many samples the member had before: compare with its share of all before each position.
        for position, place in zip(positions[members == number].tolist(), own.tolist(), strict=True):
            assert abs(place - Fraction(position * weight, total)) <= bound(len(weights))
    # From the beginning: nothing is left out, so the counts before the first position are those of its places.
    if start == 0:
        assert all(places[members == number][:1].tolist() in ([], [0]) for number in range(len(weights)))


@given(weights=SMALL_WEIGHTS)
def test_a_whole_round_has_exactly_the_weights(weights: list[int]) -> None:
    members, _ = assign(np.arange(sum(weights), dtype=np.uint64), weights)
    assert np.bincount(members, minlength=len(weights)).tolist() == weights


@given(weights=WEIGHTS, cuts=st.lists(st.integers(0, 300), max_size=5), start=st.integers(0, 1 << 35))
def test_how_the_positions_are_cut_changes_nothing(weights: list[int], cuts: list[int], start: int) -> None:
    positions = np.arange(start, start + 300, dtype=np.uint64)
    whole = assign(positions, weights)
    parts = [assign(part, weights) for part in np.split(positions, sorted(cuts))]
    for place in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[place] for part in parts]), whole[place])


def test_up_to_four_members_are_never_a_whole_sample_off() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.integers(1, 1000, rng.integers(2, 5))
        members, _ = assign(np.arange(3000, dtype=np.uint64), weights.tolist())
        counts = np.cumsum(members[:, None] == np.arange(len(weights)), axis=0)
        shares = np.arange(1, 3001)[:, None] * weights / weights.sum()
        assert np.abs(counts - shares).max() < 1


def test_large_positions_stay_exact() -> None:
    part, total = (1 << 30) - 1, (1 << 31) - 1
    count = (1 << 62) + 12345
    found = int(share(np.array([count], np.uint64), part, total)[0])
    assert found == (count * part + total // 2) // total


def test_weights_are_taken_as_they_are_written() -> None:
    assert whole_weights([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert whole_weights([Fraction(10_234_567), Fraction(1_281_167)]) == (10_234_567, 1_281_167)
    huge = whole_weights([Fraction(10**15 + 1), Fraction(10**12), Fraction(1, 10**9)])
    assert sum(huge) <= 1 << 31
    assert min(huge) == 1
    assert huge[0] / huge[1] == pytest.approx(1000, rel=1e-6)


def test_each_member_goes_through_its_own_order() -> None:
    mixed = mixture(("a", 50, "0.7"), ("b", 20, "0.2"), ("c", 50, "0.1"))
    records = mixed.records_at(np.arange(1000, dtype=np.uint64), 5, 8)
    for number, (first, count) in enumerate([(0, 50), (50, 20), (70, 50)]):
        own = records[(records >= first) & (records < first + count)] - first
        expected = record_indices(np.arange(len(own)), count, member_seed(5, number), 8)
        np.testing.assert_array_equal(own, expected)
        assert len(own) == (700, 200, 100)[number]
        assert sorted(own[:count]) == list(range(count))  # an epoch of its own
    same = min(len(records[records < 50]), 50)
    a, c = records[records < 50][:same], records[records >= 70][:same] - 70
    assert (a != c).any()


def test_pairs_keys_and_blocks_are_the_members() -> None:
    mixed = mixture(("a", 50, "0.7"), ("b", 20, "0.3"))
    assert mixed.num_records == 70
    pairs = list(mixed.pairs([69, 0, 50, 49, 51]))
    assert [pair.caption for pair in pairs if isinstance(pair, Pair)] == ["b:19", "a:0", "b:0", "a:49", "b:1"]
    assert [mixed.key(record) for record in (49, 50)] == ["a: a:49", "b: b:0"]
    assert mixed.block(49, 16) == range(48, 50)
    assert mixed.block(67, 16) == range(66, 70)
    assert pickle.loads(pickle.dumps(mixed)).key(69) == "b: b:19"


def test_a_bad_record_is_the_members_reason() -> None:
    members = [Member(Numbers("a", 4), Fraction(1), "a"), Member(Numbers("b", 4, frozenset({1})), Fraction(1), "b")]
    found = list(Mixture(members).pairs([4, 5, 1]))
    assert [isinstance(each, UserError) for each in found] == [False, True, False]


def test_what_can_not_be_mixed_is_refused() -> None:
    with pytest.raises(UserError, match="the weight of b is 0"):
        mixture(("a", 5, "1"), ("b", 5, "0"))
    with pytest.raises(UserError, match="b has no records"):
        mixture(("a", 5, "1"), ("b", 0, "1"))
