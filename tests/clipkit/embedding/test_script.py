"""A model in three lines: what it embeds equals what the model gives for the same pixels and tokens."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoder import SMALL, small_run

import clipkit
from clipkit.embedding.script import LoadedModel
from clipkit.errors import UserError
from clipkit.model.clip import build
from clipkit.pixels.images import ORIENTATION, ImageError, Preprocess, eval_transform, normalise
from clipkit.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), seed=3)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return clipkit.load(folder, device="cpu")


def test_images_of_every_kind_give_the_models_vectors(loaded: LoadedModel, tmp_path: Path) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    kinds = [path, str(path), buffer.getvalue(), Image.fromarray(pixels_HWC), pixels_HWC]
    found_NE = loaded.encode_image(kinds, batch_size=2)
    image_BHWC = torch.tensor(eval_transform(pixels_HWC, 32))[None]
    how = Preprocess()
    with torch.no_grad():
        expected_E = build(SMALL, seed=3).eval().encode_image(normalise(image_BHWC, how.mean, how.std))[0]
    assert found_NE.shape == (5, SMALL.embed_dim)
    for found_E in (*found_NE, loaded.encode_image(path)):
        np.testing.assert_allclose(found_E, expected_E.numpy(), atol=1e-6)


def test_an_image_that_pillow_opened_is_what_its_file_is(loaded: LoadedModel, tmp_path: Path) -> None:
    """Turned by its EXIF, laid on white, and 16 bits as 8."""
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    deep_HW = pixels_HWC[..., 0].astype(np.uint16) * 257
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    Image.fromarray(pixels_HWC[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(pixels_HWC).save(tmp_path / "clear.png")
    Image.fromarray(pixels_HWC[..., :3]).quantize(16).save(tmp_path / "palette.gif", transparency=3)
    Image.fromarray(deep_HW).save(tmp_path / "deep.png")
    for name in ("turned.jpg", "clear.png", "palette.gif", "deep.png"):
        with Image.open(tmp_path / name) as image:
            found_E = loaded.encode_image(image)
        np.testing.assert_allclose(found_E, loaded.encode_image(tmp_path / name), atol=1e-2 if "jpg" in name else 1e-6)


def test_an_array_that_is_no_image_is_told(loaded: LoadedModel) -> None:
    """Of four channels the last was left out, transparent or not; others gave an error of Pillow's or torch's."""
    pixels_HWC = np.zeros((40, 56, 4), np.uint8)
    for array in (pixels_HWC, pixels_HWC[..., 0], pixels_HWC[None, ..., :3], pixels_HWC[..., :3] / 255):
        with pytest.raises(UserError, match=r"an array of \w+ \[.*\] isn't an image: give uint8 \[height, width, 3\]"):
            loaded.encode_image(array)


def test_texts_give_the_models_vectors_in_their_order(loaded: LoadedModel) -> None:
    texts = ["a long caption about a heron by the river", "a cat", "a dog", "a cat"]
    with torch.no_grad():
        expected_NE = (
            build(SMALL, seed=3).eval().encode_text(torch.from_numpy(Tokenizer()(texts, SMALL.text.context_length)))
        )
    np.testing.assert_allclose(loaded.encode_text(texts), expected_NE.numpy(), atol=1e-6)
    np.testing.assert_allclose(loaded.encode_text("a cat"), expected_NE[1].numpy(), atol=1e-6)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_model_that_gives_no_numbers_is_told(tower: str, tmp_path: Path) -> None:
    model = clipkit.load(small_run(tmp_path, seed=3), device="cpu")
    weight = model.encoder.model.state_dict()[f"{tower}_projection.weight"]
    torch.nn.init.constant_(weight, float("nan"))
    encode = {
        "image": lambda: model.encode_image([np.zeros((9, 9, 3), np.uint8)]),
        "text": lambda: model.encode_text("a"),
    }
    with pytest.raises(UserError, match="the model gives NaN"):
        encode[tower]()


def test_what_is_no_image_is_told(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't read the image .*gone.png \(No such file"):
        loaded.encode_image(tmp_path / "gone.png")
    with pytest.raises(ImageError):
        loaded.encode_image(b"<html>")
    with pytest.raises(UserError, match="no texts"):
        loaded.encode_text([])
    with pytest.raises(UserError, match="no images"):
        loaded.encode_image([])


def test_the_hash_of_the_weights_tells_models_apart(folder: Path, loaded: LoadedModel) -> None:
    assert clipkit.load(folder, device="cpu").encoder.weights == loaded.encoder.weights
    other = dataclasses.replace(loaded.encoder, model=build(SMALL, seed=4))
    assert other.weights != loaded.encoder.weights
