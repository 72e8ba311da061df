"""McNemar's p-values are scipy's; the bootstrap agrees with drawing images; intervals contain what they should."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from clipkit.eval.comparison.significance import mcnemar, paired_accuracy, paired_queries, paired_recall, unpaired
from clipkit.eval.metrics import mean_per_class_recall
from clipkit.intervals import wilson


@given(st.integers(0, 3000), st.integers(0, 3000))
@example(11, 1064)
def test_mcnemar_is_the_binomial_test(first, second):
    exact, mid = mcnemar(first, second)
    if first + second:
        least = min(first, second)
        assert exact == pytest.approx(stats.binomtest(first, first + second, 0.5).pvalue, rel=1e-6)
        # In whole numbers: scipy's cdf is 0 where it should be 1e-300.
        fewer, ways = 0, 1
        for k in range(least):
            fewer, ways = fewer + ways, ways * (first + second - k) // (k + 1)
        ways += 2 * fewer
        assert mid == pytest.approx(float(Fraction(ways, 2 ** (first + second))), rel=1e-6, abs=1e-300)
    else:
        assert (exact, mid) == (1.0, 1.0)


def test_the_bootstrap_is_that_of_drawing_images():
    random = np.random.default_rng(3)
    class_N = random.integers(0, 12, 600)
    first_N = random.random(600) < 0.3 + class_N / 30
    second_N = np.where(random.random(600) < 0.7, first_N, random.random(600) < 0.6)
    found = paired_recall(first_N, second_N, class_N)

    def difference(rows):
        both = (mean_per_class_recall(hits[rows], class_N[rows])[0] for hits in (first_N, second_N))
        return -np.subtract(*both)

    drawn = [difference(random.integers(0, 600, 600)) for _ in range(1500)]
    assert found.value == pytest.approx(difference(np.arange(600)))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.008)
    assert paired_recall(first_N, second_N, class_N) == found  # seeded


def test_captions_of_one_image_are_drawn_together():
    random = np.random.default_rng(4)
    image_Q = np.repeat(np.arange(150), random.integers(1, 7, 150))
    of_image = np.stack([random.random(150) < 0.4, random.random(150) < 0.5])  # all captions of an image as one
    first_Q, second_Q = of_image[:, image_Q]
    found = paired_queries([(first_Q, second_Q, image_Q)])

    def difference(images):
        rows = np.concatenate([np.flatnonzero(image_Q == image) for image in images])
        return second_Q[rows].mean() - first_Q[rows].mean()

    drawn = [difference(random.integers(0, 150, 150)) for _ in range(1500)]
    assert found.value == pytest.approx(second_Q.mean() - first_Q.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.012)
    alone = paired_accuracy(first_Q, second_Q)
    assert found.high - found.low > 1.5 * (alone.high - alone.low), "captions aren't independent queries"
    assert paired_queries([(first_Q, first_Q, image_Q)]).p == 1


def test_a_paired_test_sees_what_two_intervals_do_not():
    random = np.random.default_rng(5)
    first_N = random.random(2000) < 0.5
    second_N = first_N.copy()
    second_N[np.flatnonzero(~first_N)[:25]] = True
    second_N[np.flatnonzero(first_N)[:5]] = False
    found = paired_accuracy(first_N, second_N)
    assert (found.value, found.only_first, found.only_second) == (pytest.approx(0.01), 5, 25)
    assert found.is_significant and 0 < found.low < 0.01 < found.high
    values = [(float(hits.mean()), *wilson(float(hits.mean()), 2000)) for hits in (first_N, second_N)]
    assert not unpaired(*values).is_significant


def test_newcombes_interval():
    """The example of his paper (1998, table II (a)): 56/70 and 48/80."""
    a, b = (48 / 80, *wilson(48 / 80, 80)), (56 / 70, *wilson(56 / 70, 70))
    found = unpaired(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert found.is_significant


def test_equal_guesses_do_not_differ():
    same_N = np.array([True, False, True])
    found = paired_recall(same_N, same_N, np.array([0, 0, 1]))
    assert (found.value, found.low, found.high, found.is_significant) == (0, 0, 0, False)
    assert paired_accuracy(same_N, same_N).p == 1
