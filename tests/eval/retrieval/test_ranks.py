"""Ranks in tiles equal those of the whole matrix, as OpenCLIP's and CLIP_benchmark's definitions have them."""

from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.errors import UserError
from clipkit.eval.retrieval.ranks import Ranks, Vectors, best_matches, find_ranks
from clipkit.eval.retrieval.scores import directions, retrieval_measures

CPU = torch.device("cpu")


def features(items: int, width: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(items, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def found_in_tiles(image_NE: Tensor, text_CE: Tensor, image_of_C: NDArray[np.int64], tile: int) -> dict[str, float]:
    ranks = find_ranks(Vectors(image_NE), Vectors(text_CE), image_of_C, CPU, tile)
    once_N = np.ones(len(image_NE), np.int64)
    both = directions(ranks, image_of_C)
    return {name: value for each in both for name, value in zip(each.metrics, each.numbers(once_N), strict=True)}


def of_whole_matrix(score_NN: Tensor) -> dict[str, float]:
    """OpenCLIP's definition, for pairs: the place in a stable sort."""
    expected = {}
    for name, score_QD in (("text", score_NN), ("image", score_NN.T)):
        ranking = torch.argsort(score_QD, descending=True, stable=True)
        place_Q = (ranking == torch.arange(len(score_QD))[:, None]).nonzero()[:, 1].numpy()
        expected[f"{name}_retrieval_median_rank"] = np.floor(np.median(place_Q)) + 1
        expected |= {f"{name}_retrieval_recall@{k}": np.mean(place_Q < k) for k in (1, 5, 10) if k < len(score_QD)}
    return expected


# The cases of OpenCLIP's tests/test_retrieval_metrics.py.
@pytest.mark.parametrize(("items", "width", "tile"), [(11, 7, 3), (13, 5, 4), (19, 8, 4), (9, 5, 3), (17, 9, 4)])
@pytest.mark.parametrize("half", [False, True])
def test_tiles_equal_the_whole_matrix(items: int, width: int, tile: int, half: bool) -> None:
    image_NE, text_NE = features(items, width), features(items, width, seed=1)
    if half:
        image_NE, text_NE = image_NE.half(), text_NE.half()
    expected = of_whole_matrix(image_NE.float() @ text_NE.float().T)
    for size in (tile, 4096):
        assert found_in_tiles(image_NE, text_NE, np.arange(items), size) == pytest.approx(expected)


def test_of_equal_scores_the_first_is_ahead() -> None:
    ones = normalize(torch.ones(7, 4), dim=-1)
    ranks = find_ranks(Vectors(ones), Vectors(ones), np.arange(7), CPU, tile=2)
    assert ranks.text_N.tolist() == ranks.image_C.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found_in_tiles(ones, ones, np.arange(7), 2) == pytest.approx(of_whole_matrix(ones @ ones.T))


def recall_of_clip_benchmark(score_CN: Tensor, image_of_C: NDArray[np.int64], k: int) -> tuple[float, float]:
    """From text to image and from image to text, as clip_benchmark.metrics.zeroshot_retrieval has it."""
    positive_CN = torch.zeros_like(score_CN, dtype=torch.bool)
    positive_CN[torch.arange(len(score_CN)), torch.from_numpy(image_of_C)] = True
    hits = []
    for score_QD, positive_QD in ((score_CN, positive_CN), (score_CN.T, positive_CN.T)):
        top_QK = torch.topk(score_QD, k, dim=1)[1]
        hits.append(positive_QD.gather(1, top_QK).any(dim=1).float().mean().item())
    return hits[0], hits[1]


@settings(max_examples=15, deadline=None)
@given(
    captions=st.lists(st.integers(1, 4), min_size=11, max_size=40),
    tile=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_several_captions_an_image_as_clip_benchmark(captions: list[int], tile: int, seed: int) -> None:
    image_of_C = np.repeat(np.arange(len(captions)), captions)
    image_NE, text_CE = features(len(captions), 6, seed), features(len(image_of_C), 6, seed + 100)
    found = found_in_tiles(image_NE, text_CE, image_of_C, tile)
    for k in (1, 5, 10):
        to_image, to_text = recall_of_clip_benchmark(text_CE @ image_NE.T, image_of_C, k)
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(to_image)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(to_text, rel=1e-6, nan_ok=len(image_of_C) <= k)


@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=12, max_size=12),
    captions=st.lists(st.integers(1, 3), min_size=4, max_size=4).filter(lambda each: sum(each) <= 8),
    tile=st.integers(1, 9),
)
def test_ties_are_those_of_a_stable_sort_whatever_the_tile(values: list[float], captions: list[int], tile: int) -> None:
    image_of_C = np.repeat(np.arange(4), captions)
    image_NE, text_CE = torch.tensor(values[:4])[:, None], torch.tensor(values[4:][: len(image_of_C)])[:, None]
    score_NC = image_NE @ text_CE.T
    ranks = find_ranks(Vectors(image_NE), Vectors(text_CE), image_of_C, CPU, tile)
    order_NC = torch.argsort(score_NC, dim=1, descending=True, stable=True).numpy()
    assert ranks.text_N.tolist() == [1 + int(np.flatnonzero(image_of_C[order_NC[n]] == n)[0]) for n in range(4)]
    order_CN = torch.argsort(score_NC.T, dim=1, descending=True, stable=True).numpy()
    expected = [1 + order_CN[place].tolist().index(own) for place, own in enumerate(image_of_C)]
    assert ranks.image_C.tolist() == expected
    places, scores = best_matches(image_NE, Vectors(text_CE), 3, tile)
    assert places.tolist() == order_NC[:, :3].tolist()
    np.testing.assert_array_equal(scores, np.take_along_axis(score_NC.numpy(), order_NC[:, :3], axis=1))


@given(captions=st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_chance_counts_every_draw(captions: list[int]) -> None:
    total = sum(captions)
    ranks = Ranks(np.ones(len(captions), np.int64), np.ones(total, np.int64))
    to_text, to_image = directions(ranks, np.repeat(np.arange(len(captions)), captions))
    for k in range(1, total + 1):
        draws = list(combinations(range(total), k))
        hit = [Fraction(sum(min(draw) < right for draw in draws), len(draws)) for right in captions]
        assert to_text.chance(k) == pytest.approx(float(sum(hit) / len(captions)))
    assert to_image.chance(1) == pytest.approx(1 / len(captions))
    assert to_image.chances()[-1] == (len(captions) + 1) // 2  # the median of equally likely ranks, rounded down


def test_intervals_hold_the_value_and_come_again() -> None:
    image_of_C = np.repeat(np.arange(200), 5)
    image_NE = features(200, 16)
    text_CE = normalize(image_NE[image_of_C] + 0.4 * torch.randn(1000, 16, generator=torch.Generator().manual_seed(3)))
    ranks = find_ranks(Vectors(image_NE), Vectors(text_CE), image_of_C, CPU)
    found = retrieval_measures(ranks, image_of_C)
    assert found == retrieval_measures(ranks, image_of_C)
    by_name = {measured.metric: measured for measured in found}
    assert [by_name[name].n for name in ("text_retrieval_recall@1", "image_retrieval_recall@1")] == [200, 1000]
    for measured in found:
        assert measured.low <= measured.value <= measured.high
        assert measured.value == 1 or measured.low < measured.high or "median" in measured.metric
    # Five captions of an image succeed and fail together: the interval is wider than that of 1,000 trials.
    recall = by_name["image_retrieval_recall@1"]
    assert by_name["mean_recall@1"].value == (recall.value + by_name["text_retrieval_recall@1"].value) / 2
    assert recall.high - recall.low > 2 * 1.96 * np.sqrt(recall.value * (1 - recall.value) / 1000)


def test_all_right_and_all_wrong_have_intervals_too() -> None:
    ones = Ranks(np.ones(50, np.int64), np.ones(50, np.int64))
    recall = retrieval_measures(ones, np.arange(50))[0]
    assert (recall.value, recall.high) == (1, 1)
    assert recall.low < 0.95
    recall = retrieval_measures(Ranks(np.full(50, 50), np.full(50, 50)), np.arange(50))[0]
    assert recall.low <= recall.value == 0 < recall.chance < recall.high


def test_recall_at_all_candidates_is_left_out() -> None:
    names = found_in_tiles(features(5, 4), features(5, 4, 1), np.arange(5), 2)
    assert "text_retrieval_recall@5" not in names
    assert set(found_in_tiles(features(1, 4), features(1, 4), np.arange(1), 2)) == {
        "text_retrieval_median_rank",
        "image_retrieval_median_rank",
    }


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.most = max(self.most, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_memory_does_not_grow_with_the_square() -> None:
    for items in (300, 1000):
        images, texts = Vectors(features(items, 8)), Vectors(features(items, 8, 1))
        with LargestTensor() as largest:
            find_ranks(images, texts, np.arange(items), CPU, tile=100)
        assert largest.most == 100 * 100


def test_vectors_lie_on_the_disk_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.eval.retrieval.ranks.IN_MEMORY_BYTES", 64)
    vectors, rows_NE = Vectors(), features(9, 4)
    vectors.add(rows_NE[:4])
    torch.testing.assert_close(vectors.read(1, 3, CPU), rows_NE[1:3], rtol=0, atol=0)
    vectors.add(rows_NE[4:])
    assert isinstance(vectors.file.fileno(), int)  # a real file by now
    torch.testing.assert_close(torch.cat([tile for _, tile in vectors.tiles(4, CPU)]), rows_NE, rtol=0, atol=0)
    with pytest.raises(UserError, match="NaN"):
        vectors.add(torch.full((1, 4), torch.nan))
