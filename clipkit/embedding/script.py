"""A model in a script: `clipkit.load(path)`, then `encode_image` and `encode_text`, and no more to know."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.device import Device
from clipkit.embedding.encoder import Compute, Encoder, check_finite
from clipkit.embedding.vectors import pixel_vectors, text_matrix
from clipkit.errors import UserError
from clipkit.pixels.images import ImageError, UInt8Array, decode, eval_transform, upright_rgb

ImageInput = Path | str | bytes | Image.Image | UInt8Array
"""A file, its content, a Pillow image, which gives what its file does, or uint8[H, W, 3]."""


class LoadedModel:
    """A model of any origin on a device."""

    def __init__(self, encoder: Encoder, device: Device) -> None:
        self.encoder, self.device = encoder.to(device.torch_device), device

    def encode_image(self, images: ImageInput | Sequence[ImageInput], batch_size: int = 256) -> NDArray[np.float32]:
        """Unit vectors float32[N, E] of images, or [E] of one. Raises UserError for what can't be read or decoded,
        and for a model that gives NaN.
        """
        if isinstance(images, Path | str | bytes | np.ndarray | Image.Image):
            one: NDArray[np.float32] = self.encode_image([images])[0]
            return one
        if not images:
            raise UserError("no images to encode: give one or more")
        compute, parts = Compute(self.device, batch_size=batch_size), []
        for start in range(0, len(images), batch_size):
            pixels = np.stack([self._pixels(each) for each in images[start : start + batch_size]])
            parts.append(check_finite(pixel_vectors(self.encoder, pixels, compute)).cpu().numpy())
        return np.concatenate(parts)

    def encode_text(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors float32[N, E] of texts, or [E] of one. Longer ones than the context length are cut."""
        if isinstance(texts, str):
            one: NDArray[np.float32] = self.encode_text([texts])[0]
            return one
        if not texts:
            raise UserError("no texts to encode: give one or more")
        return text_matrix(self.encoder, texts, Compute(self.device)).cpu().numpy()

    def _pixels(self, image: ImageInput) -> UInt8Array:
        if isinstance(image, Path | str):
            try:
                return self._pixels(Path(image).read_bytes())
            except OSError as error:
                raise UserError(f"can't read the image {image} ({error.strerror})") from error
            except ImageError as error:
                raise UserError(f"{image}: {error}") from error
        if isinstance(image, Image.Image):
            image = upright_rgb(image)
        rgb = decode(image) if isinstance(image, bytes) else image
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise UserError(f"an array of {rgb.dtype} {list(rgb.shape)} isn't an image: give uint8 [height, width, 3]")
        how = self.encoder.preprocess
        return eval_transform(rgb, how.size, interpolation=how.interpolation, resize_mode=how.resize_mode)
