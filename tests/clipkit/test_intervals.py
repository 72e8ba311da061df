import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from clipkit.intervals import wilson


@pytest.mark.parametrize("successes", [0, 1, 10, 19, 20])
def test_wilson_equals_scipys(successes: int) -> None:
    expected = binomtest(successes, 20).proportion_ci(method="wilson")
    assert wilson(successes / 20, 20) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_equals_the_published_example() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: the score method without continuity correction.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_stays_a_share(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes / n, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert high > low
    mirrored = wilson(1 - successes / n, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
