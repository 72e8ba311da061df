"""How fast the loader is on a dataset and this machine, what a GPU would need, and what to change.

A starved GPU doesn't say so: it is only slow. So the loader is measured here by itself, by phases, with the workers and
the augmentation that a run would use; what a change would bring is tried on the dataset's own images, not guessed.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg

from clipkit.counter_rng import sample_keys
from clipkit.device import Device, pick
from clipkit.errors import UserError
from clipkit.jobs.worker import cores
from clipkit.pixels.images import decode
from clipkit.text.tokenizer import WordTokenizer
from clipkit.text.vocabulary import open_tokenizer
from clipkit.train.bench.findings import COMPACT_QUALITY, PUBLISHED, Compact, Findings, Need, Reading
from clipkit.train.checks import loader_config, takes_precomputed
from clipkit.train.fit.trial import step_times
from clipkit.train.loader.augment import Augmentation, cut, geometry_draws
from clipkit.train.loader.crop import COMPILED, shrink
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig
from clipkit.train.recipes import Recipe, Stage
from clipkit.train.sources.open import CACHE_GB, open_source
from clipkit.train.sources.source import Pair, Source

# Batches of another size hold the same samples; these fit into any memory.
BATCH = 256
STEP_BATCH = 512
WARM_SECONDS = 2.0  # frequent words and open files are met by then
TRIED = 128


def bench_data(
    data: str | Path | Sequence[str | Path],
    *,
    recipe: Recipe | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    seconds: float = 10.0,
    need: float | None = None,
    device_name: str = "auto",
    cache: Path | None = None,
    cache_gb: float = CACHE_GB,
    split: str = "train",
    vocabulary: Path | None = None,
) -> Findings:
    """Measure the loader on `data` for so many seconds; `data`, `split`, `cache` and `cache_gb` are as in
    `open_source`.

    Sizes, augmentation and text reduction are those of the recipe's first stage, or CLIPA's crop without one;
    `image_size` (default 112) goes before the recipe's. `need` is in samples/s; without it, the machine's GPU is
    measured on the recipe's step, and where there is no GPU or no recipe, `PUBLISHED` stands in.
    Raises UserError for whatever `open_source` or the loader refuse.
    """
    if recipe is None:
        config, stage = plain_config(image_size or 112), None
    else:
        stage = replace(recipe.stages[0], image_size=image_size or recipe.stages[0].image_size)
        config = replace(loader_config(recipe, stage), batch_size=BATCH)
    tokenizer = open_tokenizer(recipe.model.text.tokenizer if recipe else "clip-bpe", vocabulary)
    opened = open_source(data, cache=cache, cache_gb=cache_gb, block_size=config.block_size, split=split)
    source = opened.source(precomputed=bool(recipe and stage and takes_precomputed(recipe, stage)))
    device = pick(device_name)
    if workers is None:  # what a run would have; without a GPU the question is what the machine could feed
        workers = cores() if device.kind == "cpu" else device.loader_workers()
    samples, elapsed, phases = run_loader(source, config, tokenizer, workers, seconds, device)
    worked = sum(value for phase, value in phases.items() if not (workers and phase in ("assemble", "transfer")))
    reading, pairs = measure_reading(source, config, first=samples + BATCH)
    if need is not None:
        needs: tuple[Need, ...] = (Need("what you asked for", need),)
    elif recipe is not None and stage is not None and device.kind == "cuda":
        needs = (step_need(recipe, stage, device),)
    else:
        needs = PUBLISHED
    return Findings(
        data=", ".join(map(str, data)) if isinstance(data, (list, tuple)) and len(data) > 1 else str(opened.places()),
        records=source.num_records,
        image_size=config.image_size,
        text_reduction=config.text_reduction,
        workers=workers,
        cores=cores(),
        samples=samples,
        seconds=elapsed,
        phases_us={phase: 1e6 * value / samples for phase, value in phases.items()},
        busy=min(1.0, worked / (max(1, workers) * elapsed)),
        reading=reading,
        compact=try_compact(pairs, config.image_size, config.augmentation),
        needs=needs,
        tokenizer=tokenizer.name,
        compiled=COMPILED,
    )


def plain_config(image_size: int) -> LoaderConfig:
    """What CLIPA trains with: crops of 40% of the area and more, captions cut at 16 tokens."""
    crop = Augmentation(crop_area=(0.4, 1.0))
    return LoaderConfig(image_size, 16, BATCH, crop, block_size=256)


# ---- Measuring -------------------------------------------------------------------------------------------------------


def run_loader(
    source: Source, config: LoaderConfig, tokenizer: WordTokenizer, workers: int, seconds: float, device: Device
) -> tuple[int, float, dict[str, float]]:
    """Samples, wall seconds, and processor seconds by phase, of the loader after a warm-up.

    `assemble` is what this thread does to put batches together, `transfer` what it does to bring them to a device.
    """
    phases: dict[str, float] = {}
    samples, transfer = 0, 0.0
    loader = batches(source, config, workers=workers, tokenizer=tokenizer)
    with contextlib.closing(loader):
        next(loader)
        warm = time.monotonic() + min(WARM_SECONDS, seconds)
        while time.monotonic() < warm:
            next(loader)
        began, spent = time.monotonic(), time.thread_time()
        while (elapsed := time.monotonic() - began) < seconds or not samples:
            batch = next(loader)
            samples += len(batch.image_BHWC)
            for phase, value in batch.seconds.items():
                phases[phase] = phases.get(phase, 0.0) + value
            if device.kind != "cpu":
                before = time.thread_time()
                device.batch(batch.arrays())
                transfer += time.thread_time() - before
        spent = time.thread_time() - spent - (0.0 if workers else sum(phases.values()))
    phases["assemble"] = max(0.0, spent - transfer)
    if device.kind != "cpu":
        phases["transfer"] = transfer
    return samples, elapsed, phases


def measure_reading(source: Source, config: LoaderConfig, first: int) -> tuple[Reading, list[Pair]]:
    """Read TRIED records at the positions from `first` on, as the loader would."""
    positions = np.arange(first, first + min(TRIED, source.num_records), dtype=np.uint64)
    records = source.records_at(positions, config.seed, config.block_size).tolist()
    began, active = time.monotonic(), time.thread_time() + queued_seconds()
    pairs = [pair for pair in source.pairs(records) if isinstance(pair, Pair)]
    active, elapsed = time.thread_time() + queued_seconds() - active, max(time.monotonic() - began, 1e-9)
    if not pairs:
        raise UserError(f"none of {len(records)} records of {source!r} could be read: see clipkit verify")
    size = sum(len(pair.image) for pair in pairs)
    precomputed = all(pair.ids is not None for pair in pairs)
    return Reading(size / 1e6 / elapsed, size / len(pairs), max(0.0, 1 - active / elapsed), precomputed), pairs


def queued_seconds() -> float:
    """How long this thread has waited for a core; 0.0 where the kernel doesn't tell (proc(5), schedstat)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def try_compact(pairs: Sequence[Pair], image_size: int, augmentation: Augmentation) -> Compact | None:
    """Store images smaller, in memory, and see how much faster they become pixels.

    None where the images are small already, or where warps keep them decoded.
    """
    side = compact_side(image_size)
    if augmentation.is_affine:
        return None
    draws = geometry_draws(sample_keys(0, np.arange(len(pairs), dtype=np.uint64))).tolist()
    spent, sizes, sides = np.zeros(2), np.zeros(2), []
    out = np.empty((image_size, image_size, 3), np.uint8)
    for pair, row in zip(pairs, draws, strict=True):
        try:
            image = decode(pair.image)
        except UserError:
            continue
        sides.append(min(image.shape[:2]))
        small = simplejpeg.encode_jpeg(shrink(image, side), COMPACT_QUALITY, "RGB", "420")
        for which, data in enumerate((pair.image, small)):
            began = time.thread_time()
            cut(data, image_size, augmentation, row, out)
            spent[which] += time.thread_time() - began
            sizes[which] += len(data)
    if not sides or np.median(sides) <= side or not spent.all():
        return None
    return Compact(side, float(spent[0] / spent[1]), float(sizes[0] / sizes[1]))


def compact_side(image_size: int) -> int:
    """The shorter side of copies for inputs of `image_size`: an eighth more, so that most crops need no enlarging."""
    return -(-image_size * 8 // (7 * 32)) * 32


def step_need(recipe: Recipe, stage: Stage, device: Device, seconds: float = 3.0) -> Need:
    """What one device takes when data are always there."""
    import torch

    size = min(STEP_BATCH, stage.batch_size)
    spent = step_times(recipe, stage, size, device, seconds)
    gpus = torch.cuda.device_count() if device.kind == "cuda" else 1
    each = ", each of them" if gpus > 1 else ""
    return Need(f"{device.hardware()}, {recipe.name}{each}", size * len(spent) / sum(spent))
