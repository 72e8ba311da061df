"""The closed lists that recipes and models choose from, apart from the code that acts on them.

A recipe can so be read, changed and planned at once, without torch and without the libraries of images and texts.
"""

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
ImageMethod = Literal["random", "grid", "block"]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash"]
TextMethod = Literal["truncate", "random", "block", "sentence", "syntax"]

# Of the pixels that CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
