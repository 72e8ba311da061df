"""Draws docs/pixels.png and prints the tables of docs/pixels.md: training's fast pixels beside exact ones.

Run `PYTHONPATH=tests/support python docs/pixels.py` after a change to `train/loader/crop.py` or the code in
`clipkit/pixels/csrc`. It needs matplotlib and scikit-image, whose photographs it takes. With `--run RUN --data EVAL`
it also shows the images of EVAL to the model of RUN in each way. tests/train/loader/test_pixels.py holds the
differences of the pixels to bounds.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from natural_images import encoded
from numpy.typing import NDArray
from photographs import (
    EXACT,
    FAST,
    FILES,
    STORED,
    Crop,
    centre,
    crops,
    difference,
    dimensions,
    library_pixels,
    resized,
    shrunk,
    stored,
)
from PIL import Image

from clipkit import checkpoint
from clipkit.counter_rng import sample_keys
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, clip_encoder
from clipkit.embedding.vectors import ImageSet, Pixels, decode_pixels, stack
from clipkit.eval.classification.images import LabelledImages
from clipkit.eval.classification.task import Classification, classify, open_task
from clipkit.intervals import wilson
from clipkit.model.clip import CLIP
from clipkit.pixels.images import Preprocess, UInt8Array, decode, eval_transform
from clipkit.text.tokenizer import Tokenizer
from clipkit.train.loader.augment import LUMA, Augmentation, cut, geometry_draws
from clipkit.train.loader.crop import central_box, crop_box, random_resized_crop

SIZES = (64, 112, 224)
CROPS = 100
SHOWN = ("astronaut", "chelsea", "motorcycle", "grace_hopper")
DRAWS = 4
TIMES = 3
LARGER = f"{TIMES} × the difference"
RESAMPLES = 10_000
INK, SOFT = "#1f2933", "#52606d"

Make = Callable[[int, bytes, int], UInt8Array]

# ---- Pixels ----------------------------------------------------------------------------------------------------------


def print_pixels() -> None:
    """Mean absolute differences to Pillow's pixels, in levels of 255, and what others would be."""
    print(
        "| stored as | crop to | fast | worst photo | central square | library | area mean | bilinear | JPEG itself |"
    )
    fallback = []
    for kind, (side, quality) in STORED.items():
        jpegs = stored(kind)
        sources = [decode(encoded(image, "PNG")) for image in shrunk(side).values()]
        for size in SIZES:
            every = list(crops(jpegs.values(), size, CROPS))
            middles = [centre(data, size) for data in jpegs.values()]
            fast = [each_photo([difference(crop.fast, crop.plain) for crop in found]) for found in (every, middles)]
            drawn = [
                each_photo([difference(crop.library.pixels, crop.plain) for crop in found])
                for found in (every, middles)
            ]
            cut_so = [
                each_photo([difference(crop.library.pixels, crop.library.plain) for crop in found])
                for found in (every, middles)
            ]
            others = np.mean(
                [others_differ(*each, size) for each in zip(every, cycle(jpegs.values()), cycle(sources))], 0
            )
            values = (fast[0].mean(), fast[0].max(), fast[1].mean(), drawn[0].mean(), *others)
            numbers = " | ".join(f"{value:.2f}" for value in values)
            print(f"| {side} px, quality {quality} | {size} px | {numbers} |")
            shrinks = np.mean([crop.library.scale > 1 for crop in every])
            moved = [crop.library.moved for crop in every if crop.library.scale > 1] or [0.0]
            values = (cut_so[0].mean(), cut_so[0].max(), cut_so[1].mean(), np.mean(moved), max(moved))
            numbers = " | ".join(f"{value:.2f}" for value in (*values, drawn[0].mean(), drawn[1].mean()))
            fallback.append(f"| {side} px | {size} px | {shrinks:.0%} | {numbers} |")
    print("\n| stored as | crop to | shrunk | mean | worst | central | moved | at most | as drawn | central as drawn |")
    print("\n".join(fallback))


def print_full_colour() -> None:
    """The central squares where JPEGs keep colour at half the resolution (4:2:0), as usual, and where at all of it."""
    print("\n| stored as | crop to | 4:2:0 | brightness alone | 4:4:4 |")
    for side, quality in STORED.values():
        for size in SIZES:
            values = []
            for subsampling in ("4:2:0", "4:4:4"):
                jpegs = [encoded(image, quality=quality, subsampling=subsampling) for image in shrunk(side).values()]
                every = [centre(data, size) for data in jpegs]
                values.append(np.mean([difference(crop.fast, crop.plain) for crop in every]))
                values.append(np.mean([np.abs((crop.fast.astype(float) - crop.plain) @ LUMA) for crop in every]))
            print(f"| {side} px | {size} px | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.2f} |")


def each_photo(amounts: Sequence[float]) -> NDArray[np.float64]:
    """Means by photograph, of crops that take the photographs in turn."""
    photo_means: NDArray[np.float64] = np.reshape(amounts, (-1, len(FILES))).mean(axis=0)
    return photo_means


def others_differ(crop: Crop, data: bytes, source: UInt8Array, size: int) -> tuple[float, ...]:
    """How far other ways are from Pillow's bicubic on the same crop of a full decoding: the mean of areas, Pillow's
    bilinear, and Pillow's bicubic of the picture before it became a JPEG."""
    image = decode(data)
    top, left, height, width = crop.box
    area = cv2.resize(image[top : top + height, left : left + width], (size, size), interpolation=cv2.INTER_AREA)
    bilinear = resized(Image.fromarray(image), crop.box, size, Image.Resampling.BILINEAR)
    before = resized(Image.fromarray(source), crop.box, size)
    return tuple(difference(pixels.astype(np.uint8), crop.plain) for pixels in (area, bilinear, before))


def draw(path: Path) -> None:
    """For some photographs the crop whose difference is the median: fast, exact and ten times the difference."""
    jpegs = stored("standard")
    figure, axes = plt.subplots(len(SHOWN), 6, figsize=(13, 2.35 * len(SHOWN)), facecolor="white")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.03, wspace=0.06, hspace=0.16)
    for row, name in zip(axes, SHOWN, strict=True):
        by_size = [list(crops([jpegs[name]], size, CROPS)) for size in SIZES[:2]]
        amounts = [difference(crop.fast, crop.plain) for crop in by_size[0]]
        median = int(np.argsort(amounts)[CROPS // 2])
        for column, every in enumerate(by_size):
            crop = every[median]
            amount = np.abs(crop.fast.astype(int) - crop.plain)
            apart = np.clip(255 - 10 * amount, 0, 255).astype(np.uint8)
            for ax, pixels in zip(row[3 * column :], (crop.fast, crop.plain, apart), strict=False):
                ax.imshow(pixels, interpolation="nearest")
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_color("#cbd2d9")
            row[3 * column + 2].set_xlabel(f"{amount.mean():.2f} of 255 on average", fontsize=9, color=SOFT)
    for column, size in enumerate(SIZES[:2]):
        for place, title in enumerate((f"Fast, {size} px", f"Exact, {size} px", "Difference × 10")):
            axes[0, 3 * column + place].set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=8)
    figure.savefig(path, dpi=90, facecolor="white")


# ---- Zero-shot -------------------------------------------------------------------------------------------------------


class OtherPixels(ImageSet):
    """Images that become the model's input by `make` (place, encoded image, size), not as in evaluation."""

    def __init__(self, images: LabelledImages, make: Make) -> None:
        super().__init__(images.path, images.keys, images.read)
        self.make = make

    def pixels(
        self, preprocess: Preprocess, batch_size: int, also: Callable[[int, bytes], None] | None = None
    ) -> Iterator[Pixels]:
        made = [(place, self.make(place, data, preprocess.size)) for place, data in enumerate(self.read())]
        for start in range(0, len(made), batch_size):
            yield stack(made[start : start + batch_size])


def with_pixels(task: Classification, make: Make) -> Classification:
    """The same task on images that are made another way."""
    other = Classification(task.images, task.classes, task.templates)
    other.pictures = OtherPixels(task.images, make)
    return other


def random_crops(augmentation: Augmentation, seed: int, count: int) -> Make:
    """The crop of each image that training would cut with this seed."""
    rows = geometry_draws(sample_keys(seed, np.arange(count))).tolist()
    return lambda place, data, size: cut(data, size, augmentation, rows[place])


def library_crops(seed: int, count: int) -> Make:
    """The same crops, cut as training does where the compiled code doesn't."""
    rows = geometry_draws(sample_keys(seed, np.arange(count))).tolist()

    def make(place: int, data: bytes, size: int) -> UInt8Array:
        box = crop_box(*dimensions(data), FAST.crop_area, FAST.crop_ratio, rows[place])
        return library_pixels(data, box, size)

    return make


def magnified(exact: Make, fast: Make) -> Make:
    """Pixels with TIMES the difference, as much as photographs have: drawings have less of what differs."""

    def make(place: int, data: bytes, size: int) -> UInt8Array:
        plain = exact(place, data, size).astype(np.int16)
        return np.clip(plain + TIMES * (fast(place, data, size) - plain), 0, 255).astype(np.uint8)

    return make


def as_jpegs(images: LabelledImages, side: int, quality: int) -> LabelledImages:
    """The images with a shorter side of `side` pixels, as JPEGs: drawings of 96 px are enlarged."""
    jpegs = []
    for data in images.read():
        image = Image.fromarray(decode(data))
        scale = side / min(image.size)
        target = round(image.width * scale), round(image.height * scale)
        jpegs.append(encoded(image.resize(target, Image.Resampling.BICUBIC), quality=quality))
    return replace(images, read=lambda: iter(jpegs))


@dataclass(frozen=True)
class Evaluation:
    """A model with what it is shown. The D tasks of a way have the same N images, in other crops."""

    model: CLIP
    preprocess: Preprocess
    labels_N: NDArray[np.int64]

    def guesses(self, tasks: Sequence[Classification]) -> NDArray[np.int64]:
        """int64[D, N, 5]: the best guesses for each image, for each task."""
        encoder, compute = clip_encoder(self.model, Tokenizer(), self.preprocess), Compute(pick("cpu"))
        return np.stack([classify(encoder, task, compute).top_NK for task in tasks])

    def difference(self, tasks: Sequence[Classification], others: Sequence[Classification]) -> float:
        """Of the pixels, in levels of 255."""
        inputs = [
            np.stack([decode_pixels(data, self.preprocess) for task in way for data in task.pictures.read()])
            for way in (tasks, others)
        ]
        return difference(*inputs)

    def print_ways(self, what: str, ways: dict[str, list[Classification]]) -> None:
        """The accuracy of exact pixels and of others, with what changes image by image."""
        exact, others = ways["exact"], {name: tasks for name, tasks in ways.items() if name != "exact"}
        before_DNK = self.guesses(exact)
        before = hits(before_DNK, self.labels_N, 1)
        numbers = " | ".join(accuracy(before_DNK, self.labels_N, k) for k in (1, 5))
        print(f"| {what} | exact | | {numbers} | | | | |")
        for name, tasks in others.items():
            after_DNK = self.guesses(tasks)
            after = hits(after_DNK, self.labels_N, 1)
            another = (after_DNK[:, :, 0] != before_DNK[:, :, 0]).mean()
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            levels = self.difference(exact, tasks)
            numbers = " | ".join(accuracy(after_DNK, self.labels_N, k) for k in (1, 5))
            changes = " | ".join(change(before_DNK, after_DNK, self.labels_N, k) for k in (1, 5))
            pairs = f"{another:.1%} | {lost}, {won} of {before.size:,}"
            print(f"| {what} | {name} | {levels:.2f} | {numbers} | {pairs} | {changes} |")


def print_zeroshot(run: Path, data: Path, templates: str) -> None:
    """Accuracy with each kind of pixels, on the central square and on random crops, from both kinds of JPEG."""
    loaded = checkpoint.load(run)
    task = open_task(data, templates_name=templates)
    count = len(task.images)
    evaluation = Evaluation(checkpoint.build_model(loaded), loaded.preprocess, task.labels_N)
    print(f"\n{count:,} images, {len(task.classes):,} classes, input of {loaded.preprocess.size} px")
    print(
        "| stored as | shown | pixels | differ by | top-1 | top-5 | other guess | lost, won | top-1 more | top-5 more |"
    )
    for side, quality in STORED.values():
        jpegs = Classification(as_jpegs(task.images, side, quality), task.classes, task.templates)
        makes = {
            "exact": [evaluated],
            "fast": [centred],
            LARGER: [magnified(evaluated, centred)],
            "library": [centred_by_library],
        }
        evaluation.print_ways(f"{side} px | central square", ways(jpegs, makes))
        exact, fast, others = (
            [random_crops(augmentation, seed, count) for seed in seeds]
            for augmentation, seeds in (
                (EXACT, range(DRAWS)),
                (FAST, range(DRAWS)),
                (EXACT, range(DRAWS, 2 * DRAWS)),
            )
        )
        larger = [magnified(*pair) for pair in zip(exact, fast, strict=True)]
        library = [library_crops(seed, count) for seed in range(DRAWS)]
        makes = {"exact": exact, "fast": fast, LARGER: larger, "library": library, "exact, other crops": others}
        evaluation.print_ways(f"{side} px | random crops", ways(jpegs, makes))


def ways(task: Classification, makes: dict[str, list[Make]]) -> dict[str, list[Classification]]:
    """The task with each way's pixels, once for each of its draws."""
    return {name: [with_pixels(task, make) for make in each] for name, each in makes.items()}


def evaluated(place: int, data: bytes, size: int) -> UInt8Array:
    """The central square as evaluation makes it."""
    return eval_transform(decode(data), size)


def centred(place: int, data: bytes, size: int) -> UInt8Array:
    """The central square as training makes it."""
    return random_resized_crop(data, size, (1.0, 1.0), (1.0, 1.0), ())


def centred_by_library(place: int, data: bytes, size: int) -> UInt8Array:
    """The central square as training makes it where the compiled code doesn't."""
    return library_pixels(data, central_box(*dimensions(data)), size)


def hits(top_DNK: NDArray[np.int64], labels_N: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """bool[D, N]: whether the label is among the k best guesses."""
    return (top_DNK[:, :, :k] == labels_N[:, None]).any(axis=2)


def accuracy(top_DNK: NDArray[np.int64], labels_N: NDArray[np.int64], k: int) -> str:
    """With its interval. Several crops of an image count as one trial, so the interval is rather too wide."""
    value = float(hits(top_DNK, labels_N, k).mean())
    low, high = wilson(value, len(labels_N))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def change(exact_DNK: NDArray[np.int64], top_DNK: NDArray[np.int64], labels_N: NDArray[np.int64], k: int) -> str:
    """What is added to the accuracy, in points, with a 95% interval: a bootstrap over images, each with its pairs."""
    added_N = hits(top_DNK, labels_N, k).mean(axis=0) - hits(exact_DNK, labels_N, k).mean(axis=0)
    rng = np.random.default_rng(0)
    sampled = [rng.choice(added_N, len(added_N)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(sampled, [0.025, 0.975])
    return f"{100 * added_N.mean():+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a trained run or checkpoint, for the zero-shot part")
    parser.add_argument("--data", type=Path, help="labelled images, as `clipkit zeroshot --data` takes them")
    parser.add_argument("--templates", default="plain", help="prompts, as of `clipkit zeroshot` (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.data is None):
        parser.error("--run and --data go together")
    print_pixels()
    print_full_colour()
    path = Path(__file__).with_name("pixels.png")
    draw(path)
    print(path)
    if arguments.run is not None:
        print_zeroshot(arguments.run, arguments.data, arguments.templates)


if __name__ == "__main__":
    main()
