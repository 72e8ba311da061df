"""Padding that isn't computed: the same vectors and gradients as with it, and how much of it is left."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openclip_twin import TINY
from torch.utils.flop_counter import FlopCounterMode

from clipkit.device import pick
from clipkit.model.clip import CLIP, build
from clipkit.model.text_tower import Prefixes, TextTower, length_buckets, shared_prefixes
from clipkit.text.tokenizer import EOT, SOT

TOKENS = 32
CONFIG = replace(TINY, text=replace(TINY.text, context_length=TOKENS))
MODEL = build(CONFIG)
LENGTHS = st.lists(st.integers(1, TOKENS), min_size=1, max_size=40)


def captions(lengths: list[int], tokens: int = TOKENS) -> torch.Tensor:
    """Ids of captions of so many tokens, start and end included. Of one token, there is only the end."""
    rng = np.random.default_rng(0)
    ids_BT = np.zeros((len(lengths), tokens), np.int32)
    for row, length in zip(ids_BT, lengths, strict=True):
        row[:length] = [SOT, *rng.integers(1, 49000, length), EOT][-length:]
        row[0] = SOT if length > 1 else EOT
    return torch.from_numpy(ids_BT)


def features_and_gradients(model: CLIP, lengths: list[int], skip: bool) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    buckets = length_buckets(np.array(lengths)) if skip else None
    features_BE = model.encode_text(captions(lengths), buckets=buckets)
    weight_BE = torch.randn(features_BE.shape, generator=torch.Generator().manual_seed(1))
    if features_BE.requires_grad:
        (features_BE * weight_BE).mean().backward()
    gradients = {name: each.grad for name, each in model.text.named_parameters() if each.grad is not None}
    return {"features": features_BE.detach(), **gradients}


def assert_equal_without_padding(model: CLIP, lengths: list[int]) -> None:
    expected = features_and_gradients(model, lengths, skip=False)
    found = features_and_gradients(model, lengths, skip=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(LENGTHS)
@example([1])
@example([TOKENS])
@example([3, TOKENS, 3, 1, TOKENS])
@example([*range(1, TOKENS + 1)])
def test_vectors_and_gradients_are_those_of_the_padded_tower(lengths):
    assert_equal_without_padding(MODEL, lengths)


@pytest.mark.parametrize("frozen", [False, 1, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_blocks_and_activations_computed_again_change_nothing(frozen, recompute):
    model = build(replace(CONFIG, text=replace(CONFIG.text, frozen=frozen)))
    model.recompute_activations(pick("cpu").recompute() if recompute else None)
    model.freeze()
    assert_equal_without_padding(model.train(), [3, 9, 32, 12, 5, 5, 28])


def test_bfloat16_is_as_near_as_bfloat16_can_be():
    lengths = [3, 9, 32, 12, 5, 5, 28]
    with torch.autocast("cpu", torch.bfloat16):
        skipped, padded = (features_and_gradients(MODEL, lengths, skip)["features"] for skip in (True, False))
    assert skipped.dtype == torch.float32
    torch.testing.assert_close(skipped, padded, atol=2e-2, rtol=0)


@pytest.mark.parametrize("change", [{"causal": False}, {"pooling": "last"}])
def test_a_tower_that_sees_its_padding_computes_it(change):
    model = build(replace(CONFIG, text=replace(CONFIG.text, **change)))
    assert not model.text.skips_padding
    assert_equal_without_padding(model, [3, 9, 32])


@pytest.mark.parametrize(("tokens", "skips"), [(8, False), (16, False), (17, True), (77, True)])
def test_short_contexts_have_fixed_shapes(tokens, skips):
    assert TextTower(replace(CONFIG.text, context_length=tokens)).skips_padding is skips


def test_no_size_depends_on_what_only_the_device_knows():
    """The meta device holds no values that could be read back."""
    tower = copy.deepcopy(MODEL.text).to("meta")
    lengths = [3, 9, 32, 12, 5]
    vector_BD = tower(captions(lengths).to("meta"), length_buckets(np.array(lengths)))
    vector_BD.sum().backward()
    assert vector_BD.shape == (5, CONFIG.text.width)


@given(LENGTHS)
def test_buckets_hold_every_caption_with_little_padding(lengths):
    buckets = length_buckets(np.array(lengths))
    assert sum(bucket.rows for bucket in buckets) == len(lengths)
    waiting = sorted(lengths, reverse=True)
    for rows, tokens in buckets:
        bucket, waiting = waiting[:rows], waiting[rows:]
        assert max(bucket) == tokens
        assert sum(bucket) > 0.95 * rows * tokens


def test_what_pytorch_counts_is_the_real_tokens():
    """At 77 tokens and captions of up to 24, a fifth of the padded tower."""
    model = build(replace(TINY, text=replace(TINY.text, context_length=77, width=128)))
    lengths = np.random.default_rng(0).integers(5, 25, 64)
    ids_BT = captions(lengths.tolist(), 77)

    def flops(buckets):
        with FlopCounterMode(display=False) as counter:
            model.encode_text(ids_BT, buckets=buckets).sum().backward()
        return counter.get_total_flops()

    share = flops(length_buckets(lengths)) / flops(None)
    assert lengths.mean() / 77 * 0.9 < share < lengths.mean() / 77 * 1.05  # attention shrinks with the square


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=12))
@example([[], [1], [1, 2], [1, 2], [1, 3, 1]])
def test_a_beginning_of_several_texts_is_computed_once(texts):
    whole = sorted([SOT, *text, EOT] for text in texts)
    ids_BT = np.array([text + [0] * (7 - len(text)) for text in whole])
    arrays = shared_prefixes(ids_BT)
    assert len(arrays["ids_N"]) == len({tuple(text[: end + 1]) for text in whole for end in range(len(text))})
    prefixes = Prefixes(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.no_grad():
        expected_BE = MODEL.encode_text(torch.from_numpy(ids_BT))
        torch.testing.assert_close(MODEL.encode_prefixes(prefixes), expected_BE, atol=1e-6, rtol=0)
