"""One side of the loader's benchmark, in a process of its own: `python support/loader_sides.py NAME FD`.

A request is a line of JSON on stdin, the answer a line on the descriptor FD. Each side sets up what it needs once,
makes a new loader for each request, takes `warm` samples, and then counts the samples and the CPU seconds of its whole
process tree for at least `samples` more.

The peers are run as their own trainers run them. `openclip` is `open_clip_train.data.get_wds_dataset` (shards drawn
with replacement, as for LAION) with `open_clip`'s transform and tokenizer. `tfds` reads as CLIPA's PyTorch trainer does
(UCSC-VLAA/CLIPA, clipa_torch/training/reader_tfds.py): TFDS decodes in tf.data, and a DataLoader worker makes a PIL
image of the pixels, crops it and tokenizes the caption. Threads and buffers are those of CLIPA's defaults, which hold
two gigabytes of decoded images in each worker.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WORKERS = 2
CROP_AREA, CROP_RATIO = (0.4, 1.0), (3 / 4, 4 / 3)
BATCH = 256
CONTEXT_LENGTH = 77
TFDS_SHUFFLE, TFDS_PREFETCH = 8192, 1024  # decoded images of each worker
TFDS_THREADS = 8  # of all workers together
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Request:
    """What a side is asked for."""

    folder: str
    image_size: int
    samples: int
    warm: int
    start: int
    """Samples that our own side has seen before, so that no caption comes twice; the others draw at random."""
    processes: bool | None = None
    """How our own workers run; None leaves the choice to the loader."""


@dataclass(frozen=True)
class Answer:
    """What was measured."""

    samples: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of the side's process tree, finished processes included."""
    phases: dict[str, float]
    """Our own side's CPU seconds by phase."""


# ---- The sides: each takes a request and gives the number of samples of each batch -----------------------------------

Counted = Generator[tuple[int, dict[str, float]], None, None]
Batches = Callable[[Request], Counted]


def clipkit_side() -> Batches:
    from clipkit.formats.dataset import open_dataset
    from clipkit.train.loader.augment import Augmentation
    from clipkit.train.loader.loader import batches
    from clipkit.train.loader.samples import LoaderConfig
    from clipkit.train.sources.source import RecordSource

    def run(request: Request) -> Counted:
        config = LoaderConfig(request.image_size, CONTEXT_LENGTH, BATCH, Augmentation(crop_area=CROP_AREA))
        source = RecordSource(open_dataset(Path(request.folder) / "tfds"))
        loader = batches(source, config, request.start, workers=WORKERS, processes=request.processes)
        try:
            for batch in loader:
                yield len(batch.image_BHWC), batch.seconds
        finally:
            loader.close()

    return run


def openclip_transform(image_size: int) -> Any:
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=image_size), is_train=True, aug_cfg=AugmentationCfg(scale=CROP_AREA))


def openclip_side() -> Batches:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip_train import data as openclip
    from webdataset.tariterators import tar_file_expander

    # Newer webdatasets mark the end of each tar with an empty sample, at which OpenCLIP 3.3's grouping breaks.
    openclip.tar_file_expander = partial(tar_file_expander, eof_value=None)
    tokenizer = SimpleTokenizer()

    def run(request: Request) -> Counted:
        tars = sorted((Path(request.folder) / "tars").glob("*.tar"))
        arguments = SimpleNamespace(
            train_data=f"{request.folder}/tars/{{00000..{len(tars) - 1:05d}}}.tar",
            train_num_samples=1 << 40,
            dataset_resampled=True,
            train_data_upsampling_factors=None,
            seed=request.start,
            batch_size=BATCH,
            workers=WORKERS,
            world_size=1,
        )
        transform = openclip_transform(request.image_size)
        data = openclip.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
        for images, _ in data.dataloader:
            yield len(images), {}

    return run


def tfds_side() -> Batches:
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3")
    import_module("triton")  # torch's: loaded after TensorFlow it would end the process
    import tensorflow as tf
    import tensorflow_datasets as tfds
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from PIL import Image
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    tokenizer = SimpleTokenizer()

    @tfds.decode.make_decoder()
    def decoder(image: Any, feature: Any) -> Any:
        return tf.image.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE")

    class Pairs(IterableDataset):
        def __init__(self, request: Request) -> None:
            self.request, self.transform = request, openclip_transform(request.image_size)

        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            builder = tfds.builder_from_directory(str(next((Path(self.request.folder) / "tfds").glob("*/*"))))
            share = tf.distribute.InputContext(WORKERS, worker.id, 1)
            data = builder.as_dataset(
                split="train",
                shuffle_files=True,
                decoders={"jpg": decoder()},
                read_config=tfds.ReadConfig(shuffle_seed=self.request.start, input_context=share),
            )
            options = tf.data.Options()
            options.threading.private_threadpool_size = TFDS_THREADS // WORKERS
            options.threading.max_intra_op_parallelism = 1
            data = data.with_options(options).repeat().shuffle(TFDS_SHUFFLE, seed=worker.seed % (1 << 31))
            for sample in tfds.as_numpy(data.prefetch(TFDS_PREFETCH)):
                image = self.transform(Image.fromarray(sample["jpg"]))
                yield image, tokenizer(sample["txt"].decode("utf-8"))[0]

    def run(request: Request) -> Counted:
        torch.manual_seed(request.start)
        for images, _ in DataLoader(Pairs(request), batch_size=BATCH, num_workers=WORKERS):
            yield len(images), {}

    return run


# ---- The limit: libjpeg-turbo alone ----------------------------------------------------------------------------------


def decode_all(request: Request, worker: int) -> tuple[float, float]:
    """Wall and CPU seconds to decode a share of the samples that our side makes, at the scales that it decodes at."""
    import numpy as np
    import simplejpeg

    from clipkit.counter_rng import sample_keys
    from clipkit.formats.dataset import open_dataset
    from clipkit.formats.records import decode_example
    from clipkit.pixels.images import plain_jpeg_size
    from clipkit.train.loader.augment import geometry_draws
    from clipkit.train.loader.crop import crop_box, scaled_crop
    from clipkit.train.order import record_indices

    dataset = open_dataset(Path(request.folder) / "tfds")
    positions = np.arange(request.start + worker, request.start + request.samples, WORKERS, dtype=np.uint64)
    draws = geometry_draws(sample_keys(0, positions)).tolist()
    work = []
    for record, row in zip(record_indices(positions, dataset.num_records, 0).tolist(), draws, strict=True):
        data = decode_example(dataset.read(record), ("jpg",))["jpg"][0]
        height, width = plain_jpeg_size(data) or (0, 0)
        box = crop_box(height, width, CROP_AREA, CROP_RATIO, row)
        _, scale = scaled_crop(height, width, box, request.image_size)
        work.append((data, -(-height // scale), -(-width // scale), scale))
    start, spent = time.perf_counter(), time.process_time()
    for data, rows, columns, scale in work:
        simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns, min_factor=scale)
    return time.perf_counter() - start, time.process_time() - spent


def limit(pool: ProcessPoolExecutor, request: Request) -> Answer:
    shares = list(pool.map(decode_all, [request] * WORKERS, range(WORKERS)))
    return Answer(request.samples, max(wall for wall, _ in shares), sum(cpu for _, cpu in shares), {})


# ---- Measuring -------------------------------------------------------------------------------------------------------


def tree_seconds(process: int) -> float:
    """CPU seconds of a process and all below it, those that ended included."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS + sum(map(tree_seconds, children))


def measure(run: Batches, request: Request) -> Answer:
    """Samples and seconds of a stretch in the middle of a run."""
    loader = run(request)
    seen = 0
    while seen < request.warm:
        seen += next(loader)[0]
    start, spent, seen = time.perf_counter(), tree_seconds(os.getpid()), 0
    phases: dict[str, float] = {}
    while seen < request.samples:
        count, seconds = next(loader)
        seen += count
        for phase, value in seconds.items():
            phases[phase] = phases.get(phase, 0.0) + value
    answer = Answer(seen, time.perf_counter() - start, tree_seconds(os.getpid()) - spent, phases)
    loader.close()
    return answer


def main() -> None:
    name, answers = sys.argv[1], os.fdopen(int(sys.argv[2]), "w")
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    if name == "limit":
        with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
            for line in sys.stdin:
                print(json.dumps(asdict(limit(pool, Request(**json.loads(line))))), file=answers, flush=True)
        return
    run = {"clipkit": clipkit_side, "openclip": openclip_side, "tfds": tfds_side}[name]()
    for line in sys.stdin:
        print(json.dumps(asdict(measure(run, Request(**json.loads(line))))), file=answers, flush=True)


if __name__ == "__main__":
    main()
