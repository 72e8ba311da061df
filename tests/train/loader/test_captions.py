"""The caption of a sample: drawn by its source's weight, by the sample's key alone, and of a long one a sentence."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import picture

from clipkit.counter_rng import sample_keys, uniform
from clipkit.errors import UserError
from clipkit.text.tokenizer import EOT, Tokenizer, clean
from clipkit.train.loader.captions import (
    DRAWN_CAPTION,
    Text,
    caption_draws,
    draw_caption,
    draw_sentence,
    says_something,
    text_of,
    used_weights,
)
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig, caption_hash
from clipkit.train.sources.source import Pair, Source

TOKENIZER = Tokenizer()
CONFIG = LoaderConfig(16, 12, 8, block_size=4, seed=5)
LONG = "A red square on white paper. It is small! Is there a shadow? No, none of it can be seen in this picture"


class Captioned(Source):
    """Pairs in memory; of every third record only the original caption is there."""

    num_records = 24
    caption_sources = ("original", "alt", "synthetic")

    def key(self, record):
        return f"part-0:{record}"

    def pairs(self, records):
        for record in records:
            added = {"alt": [f"alt {record}"], "synthetic": [f"one {record}", " ", f"two {record}"]}
            yield Pair(picture(record % 7), f"original {record}", added=added if record % 3 else None)


class Long(Captioned):
    def pairs(self, records):
        for record in records:
            yield Pair(picture(record % 7), LONG if record % 2 else "A red square. It is small.")


def loaded(weights, start=0, stop=48, source=None, **how):
    config = replace(CONFIG, captions=weights, **{k: how.pop(k) for k in ("text_reduction",) if k in how})
    how = {"workers": 0, "tokenizer": TOKENIZER, "warn": lambda line: None} | how
    return list(batches(source or Captioned(), config, start, stop, **how))


def together(parts, name):
    return np.concatenate([getattr(part, name) for part in parts])


WEIGHTS = st.dictionaries(st.sampled_from(Captioned.caption_sources), st.floats(0.1, 9), min_size=1).map(
    lambda weights: {"original": 1.0} | weights
)


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.integers(0, 40), st.sampled_from([2, 4, 8]), st.integers(0, 2**63))
def test_the_draw_depends_on_seed_and_sample_alone(weights, start, world, seed):
    """Not on ranks, workers, the order in which the weights are written, or where the run goes on."""

    def captions(start, stop, weights=weights, **how):
        config = replace(CONFIG, captions=weights, seed=seed)
        found = list(batches(Captioned(), config, start, stop, tokenizer=TOKENIZER, **how))
        return np.concatenate([batch.caption_B for batch in found])

    whole = captions(start, start + 16, workers=0)
    np.testing.assert_array_equal(captions(start + 8, start + 16, workers=1), whole[8:])
    turned = dict(reversed(weights.items()))
    ranks = [captions(start, start + 8, turned, rank=rank, world=world, workers=0) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(ranks), whole[:8])


def test_sources_come_as_often_as_their_weights_say_and_the_others_stand_in():
    weights = {"original": 1, "synthetic": 2, "alt": 1}
    pairs = list(Captioned().pairs(range(2)))
    draws = caption_draws(sample_keys(0, np.arange(4000))).tolist()
    rich = [draw_caption(text_of(pairs[1], weights, clean), draw, clean) for draw in draws]
    shares = {said: sum(text.caption.startswith(said) for text in rich) / 4000 for said in ("original", "alt")}
    assert shares == {"original": pytest.approx(0.25, abs=0.03), "alt": pytest.approx(0.25, abs=0.03)}
    assert {(text.caption, text.number) for text in rich} == {
        ("original 1", 0), ("alt 1", 1), ("one 1", 2), ("two 1", 4),
    }  # fmt: skip
    ones = sum(text.caption == "one 1" for text in rich)
    assert ones / 4000 == pytest.approx(0.25, abs=0.03)
    poor = text_of(pairs[0], weights, clean)
    assert {draw_caption(poor, draw, clean).caption for draw in draws} == {"original 0"}
    # Without the original, the two others keep their ratio.
    some = text_of(pairs[1], used_weights({"original": 0, "synthetic": 2, "alt": 1}), clean)
    drawn = [draw_caption(some, draw, clean).caption for draw in draws]
    assert drawn.count("alt 1") / 4000 == pytest.approx(1 / 3, abs=0.03)
    assert "original 1" not in drawn


def test_without_weights_the_original_captions_are_read_as_ever():
    assert set(together(loaded({}), "caption_B")) == {caption_hash(f"original {n}") for n in range(24)}
    pair = Pair(picture(0), ["a", " ", "&nbsp;", "b", "c"])
    text, keys = text_of(pair, used_weights({}), clean), sample_keys(3, np.arange(200))
    old = [["a", "b", "c"][int(uniform(key, 1, DRAWN_CAPTION)[0, 0] * 3)] for key in keys]
    assert [draw_caption(text, draw, clean).caption for draw in caption_draws(keys).tolist()] == old


def test_token_ids_that_a_record_holds_go_with_its_own_caption_only():
    pair = Pair(picture(0), "a cat", [1, 2], [0, 0], {"synthetic": ["a tabby"]})
    text = text_of(pair, {"original": 1, "synthetic": 1}, clean)
    assert draw_caption(text, (0.0, 0.1), clean) == Text("a cat", [1, 2], [0, 0], raw="a cat")
    assert draw_caption(text, (0.0, 0.9), clean) == Text("a tabby", number=1, raw="a tabby")
    assert text_of(pair, {"original": 1}, clean) == Text("a cat", [1, 2], [0, 0], raw="a cat")


def test_a_source_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"captions\.synth: the data have only captions of original, alt, synthetic"):
        loaded({"synth": 1})


def test_a_record_without_any_of_the_sources_is_named_and_replaced():
    told = []
    with pytest.raises(UserError, match=r"more than 1%.*it has no caption of the source alt or synthetic"):
        loaded({"synthetic": 1, "alt": 1, "original": 0}, 0, 480, warn=told.append)
    assert told[0].endswith("it has no caption of the source alt or synthetic; name another one in captions")


@given(st.text(max_size=30))
def test_what_says_something_is_what_cleaning_leaves(raw):
    assert says_something(raw, clean) == bool(clean(raw))


@pytest.mark.parametrize(
    ("raw", "sentences"),
    [
        (LONG, {"a red square on white paper.", "it is small!", "is there a shadow?",
                "no, none of it can be seen in this picture"}),
        ("一只猫。它在睡觉！", {"一只猫。", "它在睡觉!"}),
        ('He says "stop." Then he goes', {'he says "stop."', "then he goes"}),
        ("no full stop", {"no full stop"}),
        ("... . !", {"... . !"}),
    ],
)  # fmt: skip
def test_sentences(raw, sentences):
    drawn = [draw_sentence(raw, draw, clean) for draw in np.linspace(0, 1, 40, endpoint=False)]
    assert set(drawn) == sentences


def test_of_a_caption_that_does_not_fit_one_sentence_is_kept():
    ids_BT = together(loaded({}, source=Long(), text_reduction="sentence"), "ids_BT")
    records = together(loaded({}, source=Long(), text_reduction="sentence"), "records_B")
    sentences = [draw_sentence(LONG, draw, clean) for draw in (0.0, 0.25, 0.5, 0.75)]
    possible = {tuple(row) for row in TOKENIZER(sentences, 12)}
    found = {tuple(row) for row in ids_BT[records % 2 == 1]}
    assert found == possible
    (whole,) = TOKENIZER(["A red square. It is small."], 12)
    assert (ids_BT[records % 2 == 0] == whole).all()
    assert EOT in whole
    np.testing.assert_array_equal(
        together([*loaded({}, 24, 48, source=Long(), text_reduction="sentence", workers=1)], "ids_BT"), ids_BT[24:]
    )
