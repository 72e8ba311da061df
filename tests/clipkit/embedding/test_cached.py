"""Embeddings out of the cache are those that the model gives; what changes them is never taken for the same."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ranks import forkserver
from small_encoder import PREPROCESS, SMALL, small_encoder

from clipkit import embedded
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder, clip_encoder
from clipkit.embedding.vectors import ImageSet, embed_images, image_matrix, text_matrix
from clipkit.errors import UserError
from clipkit.model.clip import build
from clipkit.pixels.images import Preprocess
from clipkit.storage.cache import BlockCache
from clipkit.text.tokenizer import Tokenizer

TEXTS = [f"a picture of {number} birds" for number in range(40)] + ["a bird"] * 2
BROKEN = 17


class CountedCache(BlockCache):
    """Counts what is made."""

    made = 0

    def put(self, key: str, data: bytes) -> None:
        self.made += 1
        super().put(key, data)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [row["image"] for row in pq.read_table(embedded.emoji_parquet("heldout")).slice(0, 120).to_pylist()]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return small_encoder(seed=3)


@pytest.fixture
def cache(tmp_path: Path) -> CountedCache:
    return CountedCache(tmp_path / "cache", 1 << 30)


def compute(cache: BlockCache | None) -> Compute:
    return Compute(pick("cpu"), batch_size=32, cache=cache)


def image_set(pictures: list[bytes]) -> ImageSet:
    return ImageSet(Path("set"), [str(place) for place in range(len(pictures))], lambda: iter(pictures))


def test_images_out_of_the_cache_are_the_same(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [b"<html>" if place == BROKEN else data for place, data in enumerate(pictures)]
    plain = image_set(broken)
    index_N, expected_NE = image_matrix(encoder, plain, compute(None))
    shown: list[int] = []
    for attempt in range(2):
        again = image_set(broken)
        found_N, found_NE = image_matrix(encoder, again, compute(cache), lambda place, _: shown.append(place))
        np.testing.assert_array_equal(found_N, index_N)
        torch.testing.assert_close(found_NE, expected_NE, rtol=0, atol=1e-6)
        assert (again.content, again.unreadable) == (plain.content, plain.unreadable) != ("", {})
        assert shown == list(range(120)) * (attempt + 1)
        assert cache.made == 4
        monkeypatch.setattr("clipkit.embedding.vectors.decode_pixels", None)


def test_a_batch_without_a_readable_image_is_passed_by(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache
) -> None:
    broken = image_set([b"<html>", *pictures[1:]])
    found_N, _ = image_matrix(encoder, broken, dataclasses.replace(compute(cache), batch_size=1))
    assert found_N.tolist() == list(range(1, 120))
    assert list(broken.unreadable) == [0]


def test_what_changes_the_embeddings_is_another_piece(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache
) -> None:
    quick = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, act="quick_gelu"))
    same_weights = build(quick, seed=3).eval()
    others = [
        encoder,
        dataclasses.replace(encoder, model=same_weights),
        dataclasses.replace(encoder, model=build(SMALL, seed=4).eval()),
        dataclasses.replace(encoder, preprocess=Preprocess(size=32, resize_mode="squash")),
        dataclasses.replace(encoder, precision="bfloat16"),
    ]
    assert others[1].weights == encoder.weights
    for number, other in enumerate(others, 1):
        _, found_NE = image_matrix(other, image_set(pictures[:20]), compute(cache))
        assert cache.made == number
        torch.testing.assert_close(found_NE, image_matrix(other, image_set(pictures[:20]), compute(None))[1])


def test_texts_out_of_the_cache_are_the_same(
    encoder: Encoder, cache: CountedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit.embedding.vectors.TOKENS_PER_BATCH", 64)
    expected_NE = text_matrix(encoder, TEXTS, compute(None))
    found_NE = text_matrix(encoder, TEXTS, compute(cache))
    made = cache.made
    assert made > 4
    assert torch.equal(found_NE, text_matrix(encoder, TEXTS, compute(cache)))
    assert cache.made == made
    torch.testing.assert_close(found_NE, expected_NE, rtol=0, atol=1e-6)
    text_matrix(dataclasses.replace(encoder, precision="bfloat16"), TEXTS, compute(cache))
    assert cache.made == 2 * made


def test_a_damaged_piece_is_made_again(pictures: list[bytes], encoder: Encoder, cache: CountedCache) -> None:
    _, expected_NE = image_matrix(encoder, image_set(pictures[:20]), compute(cache))
    (file,) = [path for path in cache.folder.glob("??/*") if path.is_file()]
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    fresh = CountedCache(cache.folder, 1 << 30)
    assert torch.equal(image_matrix(encoder, image_set(pictures[:20]), compute(fresh))[1], expected_NE)
    assert fresh.made == 1


@pytest.mark.parametrize(("total", "most"), [(1, 0), (2, 0), (3, 1), (20, 9), (21, 10), (1000, 10), (50_000, 500)])
def test_a_corrupted_image_ends_no_small_evaluation_and_half_of_them_end_any(total: int, most: int) -> None:
    images = ImageSet(Path("set"), [str(place) for place in range(total)], lambda: iter(()))
    for place in range(most):
        images.note_unreadable(place, "cut off")
    with pytest.raises(UserError, match=f"{most + 1:,} of {total:,} images can't be read"):
        images.note_unreadable(most, "cut off")


def test_too_many_broken_images_are_refused_out_of_the_cache_too(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache
) -> None:
    broken = [b"<html>" if place < 11 else data for place, data in enumerate(pictures)]
    for _ in range(2):
        with pytest.raises(UserError, match="11 of 120 images can't be read, the last one 10 "):
            image_matrix(encoder, image_set(broken), compute(cache))


def die_in_the_third_batch(pictures: list[bytes], folder: Path) -> None:
    model = build(SMALL, seed=3).eval()
    encode, calls = model.encode_image, iter(range(99))

    def encode_image(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments, **options)

    model.encode_image = encode_image
    killed = clip_encoder(model, Tokenizer(), PREPROCESS)
    image_matrix(killed, image_set(pictures), compute(BlockCache(folder, 1 << 30)))


def test_killed_it_goes_on_behind_its_last_batch(pictures: list[bytes], encoder: Encoder, cache: CountedCache) -> None:
    process = forkserver().Process(target=die_in_the_third_batch, args=(pictures, cache.folder))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    _, found_NE = image_matrix(encoder, image_set(pictures), compute(cache))
    assert cache.made == 2  # of four
    torch.testing.assert_close(found_NE, image_matrix(encoder, image_set(pictures), compute(None))[1])


def test_reading_goes_no_further_than_a_batch_ahead(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache
) -> None:
    read = 0

    def counted() -> Iterator[bytes]:
        nonlocal read
        for data in pictures:
            read += 1
            yield data

    images = ImageSet(Path("set"), [str(place) for place in range(120)], counted)
    index_B, _ = next(embed_images(encoder, images, compute(cache)))
    assert (len(index_B), read) == (32, 64)


def test_models_with_one_preprocessing_share_what_is_decoded(
    pictures: list[bytes], encoder: Encoder, cache: CountedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(encoder, model=build(SMALL, seed=4).eval())
    expected_NE = image_matrix(other, image_set(pictures), compute(None))[1]
    images = image_set(pictures)
    image_matrix(encoder, images, compute(cache))
    monkeypatch.setattr("clipkit.embedding.vectors.decode_pixels", None)
    torch.testing.assert_close(image_matrix(other, images, compute(cache))[1], expected_NE)
    # Nothing is kept of a set that is too large.
    monkeypatch.setattr("clipkit.embedding.vectors.KEEP_PIXELS_BYTES", 1000)
    assert image_set(pictures).kept(PREPROCESS, 32) is None
