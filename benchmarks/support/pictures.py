"""Pictures and captions for the loader's benchmark: what img2dataset delivers for LAION, without a download.

The JPEGs are mixtures of smooth random fields, edges and texture, whose mean size is that of natural photos at the same
side and quality; how much texture each has varies, so their sizes spread as photos' do. Captions follow the frequencies
of words in English text, with the numbers, names, capitals and accents that web captions have.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import webdataset

from clipkit.pixels.images import UInt8Array, decode
from clipkit.text.tokenizer import MERGES, Tokenizer

SIDE, QUALITY = 256, 95
COMPACT_SIDE, COMPACT_QUALITY = 128, 90
SHARD_SAMPLES = 500
# Width by height, as often as LAION has them.
RATIOS = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 5 / 4)
# The amplitude of a field falls with its frequency to this power; with the texture below that gives photos' sizes.
FALL = 0.58


def picture(random: np.random.Generator) -> UInt8Array:
    """One natural-like image, uint8[H, W, 3], its shorter side SIDE pixels."""
    ratio = RATIOS[random.integers(len(RATIOS))]
    height, width = (SIDE, round(SIDE * ratio)) if ratio >= 1 else (round(SIDE / ratio), SIDE)
    image = np.zeros((height, width, 3), np.float32)
    detail = random.lognormal(0.43, 0.5)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        rows, columns = max(2, cells * height // SIDE), max(2, cells * width // SIDE)
        field = random.standard_normal((rows, columns, 3), dtype=np.float32)
        field = 0.85 * field.mean(axis=2, keepdims=True) * 3**0.5 + 0.15 * field
        strength = 80 / cells**FALL * (detail if cells > 16 else 1.0)
        image += strength * cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    image += 128
    for _ in range(random.integers(4, 12)):
        centre = random.integers(0, (width, height))
        corners = centre + random.integers(-width // 4, width // 4, (int(random.integers(3, 8)), 2))
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [cv2.convexHull(corners.astype(np.int32))], 255, cv2.LINE_AA)
        share = mask[:, :, None].astype(np.float32) / 255 * random.uniform(0.4, 0.9)
        image += share * (random.uniform(0, 255, 3).astype(np.float32) - image)
        texture = random.standard_normal((height, width, 1), dtype=np.float32)
        image += share * cv2.GaussianBlur(texture, (0, 0), random.uniform(0.7, 2.0))[:, :, None] * 12 * detail
    # A lens and a camera's demosaicing leave little of the highest frequencies.
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.6), 0, 255).astype(np.uint8)


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Encoded pictures, 4:2:0 as OpenCV and thus img2dataset write them."""
    random = np.random.default_rng(seed)
    return [simplejpeg.encode_jpeg(picture(random), QUALITY, colorsubsampling="420") for _ in range(count)]


def compacted(data: bytes, side: int = COMPACT_SIDE, quality: int = COMPACT_QUALITY) -> bytes:
    """A JPEG's compact copy, its shorter side `side` pixels."""
    image = decode(data)
    scale = side / min(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return simplejpeg.encode_jpeg(small, quality, colorsubsampling="420")


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of 3 to 18 words, no two equal."""
    random = np.random.default_rng(seed)
    # CLIP's merges are in the order of frequency; those that end a word are words.
    tokens = Tokenizer().model
    ranked = [token for n in range(512, 512 + MERGES) if (token := tokens.id_to_token(n)) and token.endswith("</w>")]
    words = [word for token in ranked if (word := token.removesuffix("</w>")).isalpha()]
    lengths = random.integers(3, 19, count)
    share = 1 / (np.arange(len(words)) + 10.0)
    drawn = random.choice(len(words), lengths.sum(), p=share / share.sum()).tolist()
    found = []
    for number, length in enumerate(lengths.tolist()):
        chosen = [words[drawn.pop()] for _ in range(length)]
        place = int(random.integers(length))
        match int(random.integers(20)):
            case 0 | 1 | 2:
                chosen[place] = f"{random.integers(10_000)}"
            case 3 | 4:
                chosen[place] += f"-{random.integers(1000)}{'abcd'[number % 4]},"
            case 5:
                chosen[place] += "’s"
            case 6:
                chosen[place] = "“Café & crème”"
            case 7 | 8 | 9:  # a name that no vocabulary has
                chosen[place] = chosen[place] + words[int(random.integers(len(words)))]
        chosen[0] = chosen[0].capitalize()
        found.append(" ".join(chosen) + f" {number}" * (number % 7 == 0))
    return found


def write(folder: Path, samples: int, unique: int) -> None:
    """`standard` and `compact` in `folder`, each as tars in `tars/` and as a dataset directory in `tfds/`."""
    from clipkit.tfrecord_tools.build.command import build_tfds

    images, texts = jpegs(unique), captions(samples)
    sizes = []
    for name in ("standard", "compact"):
        if name == "compact":
            images = [compacted(data) for data in images]
        sizes.append(sum(map(len, images)) / unique / 1e3)
        tars = folder / name / "tars"
        tars.mkdir(parents=True)
        for shard in range(samples // SHARD_SAMPLES):
            with webdataset.TarWriter(str(tars / f"{shard:05d}.tar")) as writer:
                for number in range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES):
                    key, text = f"{number:09d}", texts[number]
                    about = json.dumps(
                        {"key": key, "caption": text, "status": "success", "url": f"https://e.org/{key}"}
                    )
                    writer.write({"__key__": key, "jpg": images[number % unique], "txt": text, "json": about})
        build_tfds(tars, folder / name / "tfds", "bench", shard_megabytes=1, progress=lambda now: None)
    (folder / "sizes.json").write_text(json.dumps(sizes))
