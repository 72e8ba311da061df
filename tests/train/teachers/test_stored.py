"""Stored embeddings equal those that the teachers compute from the pixels and captions the trainer gets."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from colour_pairs import COLOURS, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoder import small_encoder

from clipkit.config import to_json
from clipkit.device import pick
from clipkit.embedding.encoder import Compute
from clipkit.embedding.vectors import text_matrix
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError
from clipkit.storage.files import save_array, write_json
from clipkit.text.tokenizer import Tokenizer
from clipkit.train.augmentation import Augmentation
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig, caption_hash
from clipkit.train.sources.source import Pair, Source
from clipkit.train.teachers.reinforce import describe, make_part, view
from clipkit.train.teachers.stored import (
    MANIFEST,
    Manifest,
    ReinforcedSource,
    Stored,
    part_path,
    quantise,
    read_stored,
)

AUGMENTATION = Augmentation(crop_area=(0.3, 1.0), flip=0.5, brightness=0.4, saturation=0.4, erase=0.3)
WARP = Augmentation(crop_area=(0.6, 1.3), rotation=12.0, brightness=0.3, fixed="white")
RECORDS, VIEWS = 40, 3
TOKENIZER = Tokenizer()


class Squares(Source):
    """Pairs in memory. Some have several captions, the first of them blank, and every other one of another source too;
    record 7 can't be decoded."""

    caption_sources = ("original", "synthetic")

    def __init__(self, changed=None):
        self.changed = changed

    num_records = RECORDS

    def key(self, record):
        return f"square {record}"

    def pairs(self, records):
        for record in records:
            name, colour = list(COLOURS.items())[record % 4]
            image = b"nothing" if record == 7 else picture(record, colour, size=90)
            text = f"a {name} square {record}"
            captions = [" ", text, f"{text} again", f"{text} once more"][: 1 + record % 4]
            caption = captions if record % 4 else text
            added = {"synthetic": [f"{text}, says a model", " "]} if record % 2 else None
            yield Pair(image, "another" if record == self.changed else caption, added=added)


@pytest.fixture(scope="module", params=[AUGMENTATION, WARP], ids=["crop", "warp"])
def stored(request, tmp_path_factory):
    """Two teachers' embeddings of all squares, in three parts, and the teachers."""
    folder, encoders = tmp_path_factory.mktemp("stored"), [small_encoder(1), small_encoder(2)]
    compute = Compute(pick("cpu"), batch_size=8)
    teachers = tuple(describe(encoder, compute) for encoder in encoders)
    manifest = Manifest({"records": RECORDS}, RECORDS, teachers, request.param, VIEWS, seed=5, part_records=16)
    for part in range(manifest.parts):
        records = manifest.records_of(part)
        save_array(part_path(folder, part), make_part(Squares(), manifest, records, encoders, compute))
    write_json(folder / MANIFEST, to_json(manifest))
    assert read_stored(folder) == manifest
    return Stored(folder, manifest), encoders, compute


def loaded(stored, start=0, stop=96, source=None, captions=None, **how):
    source = ReinforcedSource(source or Squares(), stored)
    config = LoaderConfig(32, 16, 24, augmentation=stored.manifest.augmentation, seed=3, block_size=8, max_bad=1.0)
    config = replace(config, captions=captions or {})
    return list(batches(source, config, start, stop, warn=lambda line: None, tokenizer=TOKENIZER, **how))


def unit(vector_BE):
    vector_BE = vector_BE.astype(np.float32)
    return vector_BE / np.linalg.norm(vector_BE, axis=-1, keepdims=True)


@pytest.mark.parametrize("weights", [{}, {"original": 1.0, "synthetic": 2.0}], ids=["plain", "sources"])
def test_the_trainer_gets_what_the_teachers_say_of_its_very_pixels_and_captions(stored, weights):
    """The crop is decoded again, and the teacher, asked about it, says what was stored: so it is the same crop."""
    opened, encoders, compute = stored
    found = loaded(opened, workers=0, captions=weights)
    said = [caption_of(*each) for batch in found for each in zip(batch.records_B, batch.caption_B, strict=True)]
    assert 20 < sum("says a model" in each for each in said) < 50 if weights else "says a model" not in "".join(said)
    for batch in found:
        images = compute.device.batch({"image": batch.image_BHWC})["image"]
        captions = [caption_of(record, hashed) for record, hashed in zip(batch.records_B, batch.caption_B, strict=True)]
        for number, encoder in enumerate(encoders):
            said_B2E = unit(batch.teacher_B2E[:, :, number * 32 : number * 32 + 32])
            image_BE = encoder.image_features(images, compute).numpy()
            text_BE = text_matrix(encoder, captions, compute).numpy()
            assert (said_B2E[:, 0] * image_BE).sum(axis=1).min() > 1 - 1e-4
            assert (said_B2E[:, 1] * text_BE).sum(axis=1).min() > 1 - 1e-4
    records = np.concatenate([batch.records_B for batch in found])
    assert 7 not in records
    assert sum(batch.bad for batch in found) >= 2


def caption_of(record, hashed):
    """The caption of a record that has this hash."""
    (pair,) = Squares().pairs([int(record)])
    (found,) = {each for each in pair.captions if caption_hash(TOKENIZER.clean(each).lower()) == hashed}
    return found


def test_samples_are_the_same_on_any_number_of_ranks_and_workers_and_from_any_place(stored):
    opened = stored[0]
    whole = loaded(opened, workers=0)
    # A worker process gets the source pickled.
    others = [loaded(opened, workers=1), loaded(pickle.loads(pickle.dumps(opened)), workers=0)]
    halves = [loaded(opened, workers=0, rank=rank, world=2) for rank in range(2)]
    assert loaded(opened, 48, workers=0)[0].teacher_B2E.tobytes() == whole[2].teacher_B2E.tobytes()
    for number, batch in enumerate(whole):
        parts = [half[number] for half in halves]
        for name in ("image_BHWC", "teacher_B2E", "records_B"):
            value = getattr(batch, name)
            assert all(np.array_equal(getattr(other[number], name), value) for other in others)
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), value)
    seen = [set() for _ in range(RECORDS)]
    for batch in whole:
        for record, image_HWC in zip(batch.records_B.tolist(), batch.image_BHWC, strict=True):
            seen[record].add(image_HWC.tobytes())
    assert max(map(len, seen)) <= VIEWS < RECORDS < sum(map(len, seen))


def test_a_record_that_changed_since_stops_the_run(stored):
    with pytest.raises(UserError, match=r"square 21 has changed since .*: run clipkit reinforce again"):
        loaded(stored[0], source=Squares(changed=21), workers=0)


def test_a_record_that_could_not_be_read_then_is_not_trained_on(stored):
    with pytest.raises(UserError, match="no embeddings of record 7"):
        stored[0].rows(np.array([6, 7]), np.array([0, 0]), np.array([1, 0]))


def test_what_a_view_is_does_not_depend_on_how_many_there_are(stored):
    manifest = stored[0].manifest
    records, views = np.arange(RECORDS), np.arange(RECORDS) % VIEWS
    keys_B = manifest.view_keys(records, views)
    assert len(set(manifest.view_keys(np.repeat(records, VIEWS), np.tile(np.arange(VIEWS), RECORDS)).tolist())) == 120
    assert np.array_equal(replace(manifest, views=10).view_keys(records, views), keys_B)
    assert not np.array_equal(replace(manifest, seed=6).view_keys(records, views), keys_B)


@settings(max_examples=40, deadline=None)
@given(width=st.sampled_from([32, 128, 768]), seed=st.integers(0, 2**32 - 1), peaks=st.booleans())
def test_the_error_of_eight_bits(width, seed, peaks):
    """Of cosines: that of rounding each number to a whole step, at most six deviations of it."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((2, 64, width)).astype(np.float32)
    if peaks:  # one number far larger than the others, as towers have them
        vectors[:, :, 3] *= 4
    whole, kept = unit(vectors), unit(quantise(unit(vectors)))
    error = np.abs(kept[0] @ kept[1].T - whole[0] @ whole[1].T)
    step = np.abs(whole).max() / 127
    assert error.max() < 6 * step * np.sqrt(2 / 12)
    assert width < 768 or peaks or error.mean() < 0.0005


def test_a_part_that_is_not_there_or_damaged_is_one_line(stored, tmp_path):
    opened = stored[0]
    for path in opened.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with part_path(tmp_path, 1).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"000001.npy is damaged: remove it"):
        loaded(Stored(tmp_path, opened.manifest), workers=0)
    part_path(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 3 parts: run the same clipkit reinforce again"):
        Stored(tmp_path, opened.manifest)


def test_an_unreadable_record_has_no_embeddings_at_all():
    manifest = Manifest({}, 8, (), AUGMENTATION, 1, 0)
    (pair,) = Squares().pairs([7])
    assert view(manifest, [32], 7, pair).image_VHWC == {}
    assert view(manifest, [32], 7, ImageError("gone")).captions == ()
