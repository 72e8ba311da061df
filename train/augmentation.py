"""What may happen to a training image, as plain data; `loader.augment` does it."""

from dataclasses import dataclass
from typing import Literal

from clipkit.errors import UserError

# The largest values of what isn't a probability.
MOST: dict[str, float] = {"rotation": 180, "shear": 89, "translation": 10, "fill": 255}
MOST |= {"brightness": 10, "contrast": 10, "saturation": 10, "hue": 0.5}


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image. Everything is off by default: the central square, resized."""

    crop_area: tuple[float, float] = (1.0, 1.0)
    """Share of the image's area that a crop covers. Above 1 the image is shown smaller, in a border of `fill`."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width by height) of a crop before it is made square, log-uniform."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Turn by up to this many degrees, either way."""
    shear: float = 0.0
    """Shear by up to this many degrees, either way."""
    translation: float = 0.0
    """Shift by up to this share of the image's sides, also beyond its edge."""
    fill: int = 255
    """Grey level of what lies outside the image."""
    brightness: float = 0.0
    """Factor from 1 - x to 1 + x, as contrast's and saturation's."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Turn of the colour circle by up to this share of it, either way; 0.5 is the whole circle."""
    jitter: float = 1.0
    """Probability of brightness, contrast, saturation and hue together."""
    hue_jitter: float = 1.0
    """Probability of the hue's part in it."""
    grey: float = 0.0
    """Probability of losing all colour."""
    fixed: Literal["black", "white"] = "black"
    """The colour that jitter leaves alone: `black` is the usual jitter of photographs (torchvision's, in random order,
    without clipping in between); `white` keeps the paper of drawings white, brightness and contrast acting as one."""
    permute_channels: float = 0.0
    """Probability of a random order of red, green and blue."""
    invert: float = 0.0
    """Probability of the negative."""
    erase: float = 0.0
    """Probability of one rectangle (a sixth to two fifths of each side) in a random colour."""
    exact: bool = False
    """Decode the whole image and resize the crop by Pillow's antialiased bicubic, as OpenCLIP does: three to four times
    the work for pixels that differ by about one level of 255 or less. Twice the work, and one to five levels, where no
    compiled code cuts the crop (docs/pixels.md). A warp (`is_affine`) has no exact way."""

    @property
    def is_affine(self) -> bool:
        """Whether images are warped, instead of cut along their pixels."""
        return bool(self.rotation or self.shear or self.translation or self.crop_area[1] > 1)

    @property
    def recolours(self) -> bool:
        """Whether any colour may change."""
        jitter = self.jitter and (self.brightness or self.contrast or self.saturation or self.hue)
        return bool(jitter or self.grey or self.permute_channels or self.invert)

    def check(self) -> None:
        """Raise UserError for values that mean nothing."""
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"augmentation {name}={low},{high}: give two positive numbers, the smaller first")
            if not 0.001 <= low <= high <= 1000:
                raise UserError(f"augmentation {name}={low},{high}: give numbers from 0.001 to 1000")
        for name in ("flip", "jitter", "hue_jitter", "grey", "permute_channels", "invert", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augmentation {name}={getattr(self, name)} is a probability: give 0 to 1")
        for name, most in MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"augmentation {name}={getattr(self, name)}: give a number from 0 to {most}")
        if self.fixed not in ("black", "white"):
            raise UserError(f"augmentation fixed={self.fixed!r}: choose black or white")
