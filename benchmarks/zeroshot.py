"""Zero-shot classification against clip_benchmark: processes from start to end, one model, one webdataset.

B/32 with random weights in float32 on JPEGs of 500 × 375, ImageNet's first classes and OpenAI's 80 templates. In each
round three processes work in turn: clip_benchmark's own command in an environment of its own, `clipkit zeroshot` with
an empty cache, and the same with the embeddings kept. Ratios are those of a round, as median (smallest to largest), by
wall clock and by processor time; on a busy machine the processor's is the one to look at. Top-1 must be the same.

At the full size, `--images 10000 --classes 1000`, clip_benchmark works for hours on two cores. `--at-most 5` stops it
when it has taken five times the processor time of clipkit's first run; its ratios are then lower bounds. `--costs`
extrapolates: beside the size that is asked for it runs one of five times the images and one of five times the classes.
From the differences it takes what an image and a prompt cost each side in processor time, and from these what the full
size would.
"""

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import open_clip
import simplejpeg
import torch
from safetensors.torch import save_file
from support.pictures import picture

from clipkit import embedded

ROOT = Path(__file__).parents[1]
PEER = Path(os.environ.get("CLIPKIT_CLIP_BENCHMARK_PYTHON", ROOT / ".venv-clip-benchmark" / "bin" / "python"))
MODEL, SIZE, QUALITY, UNIQUE, SHARDS = "ViT-B-32", (500, 375), 90, 500, 4
FULL, TEMPLATES = (10_000, 1_000), 80


def write_data(folder: Path, images: int, classes: int) -> None:
    """A webdataset in clip_benchmark's layout; after UNIQUE images they repeat, each time with other bytes."""
    random = np.random.default_rng(0)
    unique = min(UNIQUE, images)
    pictures = [cv2.resize(picture(random), SIZE, interpolation=cv2.INTER_AREA) for _ in range(unique)]
    names = [each["name"] for each in embedded.imagenet_classes()[:classes]]
    templates = [each.replace("{}", "{c}") for each in embedded.prompt_templates()["openai-80"]]
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    (folder / "test" / "nshards.txt").write_text(str(SHARDS))
    for shard in range(SHARDS):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, images, SHARDS):
                rolled = np.roll(pictures[number % unique], 8 * (number // unique), axis=1)
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(rolled), QUALITY, colorsubsampling="420")
                for suffix, data in (("jpg", jpeg), ("cls", str(number % classes).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))


def timed(command: list[str], at_most: float = math.inf) -> tuple[float, float, bool]:
    """Seconds by the wall clock and of the processor that a command and its processes took, and whether it ended before
    `at_most` seconds of the processor, at which it is stopped. Raises where it fails.
    """
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        while child.poll() is None and processor_seconds(child.pid) < at_most:
            time.sleep(0.2)
        ended = child.poll() is not None
        if not ended:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if ended and child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended


def processor_seconds(pid: int) -> float:
    """What a process has taken of the processor, without its children; 0 of one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_sides(folder: Path, name: str, workers: int, at_most: float = math.inf) -> dict[str, tuple[float, float, bool]]:
    """The times of each side in one round, and whether it ended. Raises where their top-1 differ."""
    weights, data, cache = folder / "weights.safetensors", folder / "data", folder / name / "cache"
    peer = [str(PEER), "-m", "clip_benchmark.cli", "eval", "--dataset", "wds/bench", "--dataset_root", str(data)]
    peer += ["--task", "zeroshot_classification", "--model", MODEL, "--pretrained", str(weights), "--no_amp"]
    peer += ["--num_workers", str(workers), "--output", str(folder / name / "peer.json")]
    own = [sys.executable, "-m", "clipkit", "zeroshot", "--ckpt", f"open_clip:{MODEL}:{weights}", "--data", str(data)]
    own += ["--device", "cpu", "--precision", "float32", "--cache", str(cache)]
    commands = {
        "clipkit, cold": [*own, "--out", str(folder / name / "cold")],
        "clipkit, cached": [*own, "--out", str(folder / name / "warm")],
        "clip_benchmark": peer,
    }
    (folder / name).mkdir()
    found: dict[str, tuple[float, float, bool]] = {}
    for side, command in commands.items():
        bound = at_most * found["clipkit, cold"][1] if side == "clip_benchmark" else math.inf
        found[side] = timed(command, bound)
        wall, cpu, _ = found[side]
        print(f"{name}, {side}: {wall:.1f} s, {cpu:.1f} s of the processor", file=sys.stderr, flush=True)
    top1 = {}
    for run in ("cold", "warm"):
        lines = map(json.loads, (folder / name / run / "results.jsonl").read_text().splitlines())
        top1[run] = {line["metric"]: line["value"] for line in lines}["top1"]
    if found["clip_benchmark"][2]:
        top1["peer"] = json.loads((folder / name / "peer.json").read_text())["metrics"]["acc1"]
    assert max(top1.values()) - min(top1.values()) < 1e-6, f"top-1 differs: {top1}"
    return found


def costs(runs: list[float], images: int, prompts: int) -> tuple[float, float, float]:
    """Seconds of an image, of a prompt, and of all else, from those of three runs: one, with 5 times the images, with 5
    times the prompts."""
    one, more_images, more_prompts = runs
    image, prompt = (more_images - one) / (4 * images), (more_prompts - one) / (4 * prompts)
    return image, prompt, one - image * images - prompt * prompts


def extrapolate(folder: Path, images: int, classes: int, rounds: int, workers: int) -> None:
    """Print what the full size would cost, once a round."""
    sizes = ((images, classes), (5 * images, classes), (images, 5 * classes))
    for place, size in enumerate(sizes):
        write_data(folder / str(place) / "data", *size)
        (folder / str(place) / "weights.safetensors").symlink_to(folder / "weights.safetensors")
    for number in range(rounds):
        found = [run_sides(folder / str(place), f"round-{number}", workers) for place in range(len(sizes))]
        full = {}
        for name in found[0]:
            image, prompt, rest = costs([each[name][1] for each in found], images, TEMPLATES * classes)
            full[name] = image * FULL[0] + prompt * TEMPLATES * FULL[1] + rest
            print(
                f"{name:16}{1e3 * image:8.1f} ms an image{1e3 * prompt:8.2f} ms a prompt{rest:7.1f} s beside them: "
                f"{full[name]:8,.0f} s at the full size, extrapolated: {full['clip_benchmark'] / full[name]:.2f}",
                flush=True,
            )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of clip_benchmark's loader")
    parser.add_argument(
        "--at-most", type=float, default=math.inf, help="stop clip_benchmark at so many times clipkit's processor time"
    )
    parser.add_argument("--costs", action="store_true", help="what an image and a prompt cost, and so the full size")
    options = parser.parse_args()
    if not PEER.is_file():
        raise SystemExit(f"{PEER} isn't there: name clip_benchmark's Python in CLIPKIT_CLIP_BENCHMARK_PYTHON")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = open_clip.create_model(MODEL, load_weights=False)
        save_file(model.state_dict(), Path(folder) / "weights.safetensors")
        if options.costs:
            extrapolate(Path(folder), options.images, options.classes, options.rounds, options.workers)
            return
        write_data(Path(folder) / "data", options.images, options.classes)
        rounds = [
            run_sides(Path(folder), f"round-{number}", options.workers, options.at_most)
            for number in range(options.rounds)
        ]
    print(f"{options.images:,} images, {options.classes:,} classes, {torch.get_num_threads()} threads")
    bound = "" if all(each["clip_benchmark"][2] for each in rounds) else "more than "
    for name in rounds[0]:
        wall, cpu = (statistics.median(each[name][clock] for each in rounds) for clock in (0, 1))
        line = f"{name:16}{wall:9.1f} s by wall clock{cpu:9.1f} s of the processor"
        if name != "clip_benchmark":
            for clock, what in enumerate(("by wall clock", "by processor")):
                ratios = [each["clip_benchmark"][clock] / each[name][clock] for each in rounds]
                line += f"   {bound}{spread(ratios)} {what}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
