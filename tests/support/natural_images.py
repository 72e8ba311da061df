"""Images for tests that are like photographs: noise whose amplitude falls with frequency, and some hard edges."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def natural(height: int, width: int, seed: int = 0, roughness: float = 1.6) -> npt.NDArray[np.uint8]:
    """uint8[height, width, 3], another picture for each seed; photographs have a roughness of about 1.2 to 2."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width) ** roughness
    noise = np.fft.ifft2(spectrum).real
    noise = noise.mean(0) * 0.8 + noise * 0.2
    image = 128 + 48 * noise / noise.std()
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[:, top : top + height // 4, left : left + width // 4] += rng.normal(0, 40, (3, 1, 1))
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image | npt.NDArray[np.uint8], kind: str = "JPEG", **options: object) -> bytes:
    """A picture as a file of the kind that Pillow names so; `options` are Pillow's."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **options)
    return file.getvalue()


def jpeg(pixels_HWC: npt.NDArray[np.uint8], quality: int = 95, **options: object) -> bytes:
    """Pixels as a JPEG; `options` are Pillow's."""
    return encoded(pixels_HWC, quality=quality, **options)


PIXELS = natural(64, 96)
