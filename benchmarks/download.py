"""Images a second of `clipkit download` and of img2dataset from a local host, the memory of many rows, and the CPU.

Both sides fetch the same table in turn, round after round, with two processes on two cores that they share with the
host, over HTTP and over HTTPS (a certificate of our own, checked by both), 20 ms before each answer. The images are
2,000 natural-like JPEGs of 256 px; both sides are told 256 px, keep_ratio, only if bigger, quality 95, and either to
keep the bytes of what fits (img2dataset's `skip_reencode`) or to encode all again. img2dataset runs with each number of
threads that `--threads` names, and the best of them is compared. Rates are from the moment when the first shard is
begun to when the last is written, so nobody's imports count; those of the whole command stand beside.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.image_host import HOST, make_certificate
from support.pictures import captions, jpegs

LATENCY = 0.02
# img2dataset starts its processes anew after five shards each, imports and all: with so large shards none does.
SHARD = 2000
PROCESSES = 2
CONNECTIONS = 256  # clipkit's own default
MODES = {"keep": "JPEGs that fit are kept", "encode": "all encoded again"}
TICKS = os.sysconf("SC_CLK_TCK")

PEER = """
import sys
from img2dataset import download

if __name__ == "__main__":
    urls, out, threads, shard, keep = sys.argv[1:]
    download(
        url_list=urls, output_folder=out, processes_count=2, thread_count=int(threads), input_format="parquet",
        url_col="url", caption_col="caption", output_format="webdataset", image_size=256, resize_mode="keep_ratio",
        resize_only_if_bigger=True, encode_quality=95, skip_reencode=keep == "keep", number_sample_per_shard=int(shard),
        timeout=30,
    )
"""

OURS = """
import sys
from clipkit.tfrecord_tools.download.command import download
from clipkit.tfrecord_tools.web.settings import FetchSettings
from clipkit.tfrecord_tools.pictures.picture import PictureSettings

if __name__ == "__main__":
    urls, out, connections, shard, keep = sys.argv[1:]
    network = FetchSettings(
        allow_private_hosts=True, connections=int(connections), per_host=2 * int(connections), timeout=30
    )
    pictures = PictureSettings(reencode=keep != "keep")
    download(
        urls, out, format="webdataset", processes=2, samples_per_shard=int(shard), network=network, pictures=pictures
    )
"""

# CPU of this process for each row: with nothing done to what is fetched, and with all that a worker does.
CPU = """
import json, sys, time
from pathlib import Path
from clipkit.tfrecord_tools.download import work
from clipkit.jobs.local import run_here
from clipkit.tfrecord_tools.download.command import download
from clipkit.tfrecord_tools.download.worker import fetch_loop, picture_maker
from clipkit.tfrecord_tools.web.settings import FetchSettings
from clipkit.tfrecord_tools.pictures.picture import PictureSettings
import pyarrow.parquet as pq

urls, out, connections = sys.argv[1:]
network = FetchSettings(allow_private_hosts=True, connections=int(connections), per_host=int(connections), timeout=30)
picture_maker(PictureSettings())
rows = list(enumerate(pq.read_table(urls)["url"].to_pylist()))
loop = fetch_loop(network)
loop.fetch(rows, lambda fetched: None).result()
began = time.process_time()
loop.fetch(rows, lambda fetched: None).result()
alone = time.process_time() - began
work.run_jobs = lambda function, items, *, describe, **options: run_here(function, items, describe)
took = {}
for format in ("tfds", "webdataset", "parquet"):
    began = time.process_time()
    download(urls, Path(out) / format, format=format, processes=1, samples_per_shard=500, network=network)
    took[format] = time.process_time() - began
print(json.dumps({"network": alone / len(rows), **{name: each / len(rows) for name, each in took.items()}}))
"""


@dataclass(frozen=True)
class Measured:
    """One download: images a second, the same of the whole command, CPU seconds of the host an image."""

    rate: float
    whole_rate: float
    host_cpu: float


# ---------------------------------------------------------------------------------------------------------------------
# The host and its table
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host(folder: Path, latency: float, certificate: Path | None) -> Iterator[tuple[str, int]]:
    """A running host: its base URL and its process."""
    command = [sys.executable, str(Path(__file__).parent / "support" / "image_host.py"), str(folder), str(latency)]
    command += [str(certificate)] if certificate is not None else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        try:
            yield f"{'http' if certificate is None else 'https'}://{HOST}:{port}", process.pid
        finally:
            process.stdin.close()


def write_images(folder: Path, count: int) -> float:
    """Write the images; their mean size in bytes."""
    folder.mkdir()
    made = jpegs(count)
    for number, body in enumerate(made):
        (folder / f"{number}.jpg").write_bytes(body)
    return statistics.fmean(map(len, made))


def write_table(path: Path, base_url: str, rows: int, images: int) -> None:
    """`rows` different URLs of the images in turn."""
    texts = captions(1000)
    urls = [f"{base_url}/{number % images}.jpg?{number}" for number in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [texts[n % 1000] for n in range(rows)]}), path)


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def measure(script: str, urls: Path, out: Path, width: int, keep: str, host_pid: int, rows: int) -> Measured:
    """Run one side's download in a process of its own, and check that it fetched everything."""
    shutil.rmtree(out, ignore_errors=True)
    before = cpu_seconds(host_pid)
    command = [sys.executable, "-c", script, str(urls), str(out), str(width), str(SHARD), keep]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole = time.monotonic() - began
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    fetched = sum(each["successes"] for each in stats)
    if done.returncode or fetched != rows:
        sys.exit(f"{fetched} of {rows} images came:\n{done.stderr[-3000:]}")
    seconds = max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)
    return Measured(rows / seconds, rows / whole, (cpu_seconds(host_pid) - before) / rows)


def compare(
    title: str,
    sides: dict[str, tuple[str, int]],
    urls: Path,
    work: Path,
    host_pid: int,
    rows: int,
    rounds: int,
    keep: str,
) -> None:
    """All sides in turn; the medians, and ours against the best of the others with the spread of the rounds."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (script, width) in sides.items():
            found[name].append(measure(script, urls, work / "out", width, keep, host_pid, rows))
    print(f"\n{title}, {rows:,} images, {rounds} rounds")
    for name, runs in found.items():
        rates = [run.rate for run in runs]
        share = statistics.median(run.host_cpu * run.rate for run in runs)
        rate = f"{statistics.median(rates):7.0f} images/s ({min(rates):.0f} to {max(rates):.0f})"
        whole = statistics.median(run.whole_rate for run in runs)
        print(f"  {name:28}{rate}, {whole:.0f} of the whole command; the host took {share:.2f} cores")
    medians = {name: statistics.median(run.rate for run in runs) for name, runs in found.items()}
    best = max((name for name in medians if name != "clipkit"), key=medians.__getitem__)
    ratios = [ours.rate / theirs.rate for ours, theirs in zip(found["clipkit"], found[best], strict=True)]
    print(f"  clipkit / {best}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def write_many(path: Path, base_url: str, rows: int, images: int) -> None:
    """A table of made-up rows whose URLs point at a few images, in row groups of a million as published tables have."""
    texts, random = captions(1000), np.random.default_rng(0)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), ("n", pa.int64())])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(0, rows, 1_000_000):
            numbers = range(start, min(start + 1_000_000, rows))
            urls = [f"{base_url}/{n % images}.jpg?{n}" for n in numbers]
            words = [f"{texts[i]} {n}" for i, n in zip(random.integers(0, 1000, len(numbers)), numbers, strict=True)]
            writer.write_table(
                pa.table({"url": urls, "caption": words, "n": numbers}, schema), row_group_size=1_000_000
            )


def peak_memory(command: list[str], stop_after: int, out: Path) -> tuple[list[float], int]:
    """Peak resident memory in MB of each process of a command, ended when so many shards are there; their number."""
    peaks: dict[int, float] = {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    shards = 0
    while process.poll() is None:
        for pid in descendants(process.pid):
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{pid}/status").read_text()
                line = next(each for each in status.splitlines() if each.startswith("VmHWM"))
                peaks[pid] = int(line.split()[1]) / 1e3
        shards = len(list(out.glob("*_stats.json")))
        if shards >= stop_after:
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    # Helpers of Python's (the tracker of resources) are no workers.
    return sorted((peak for peak in peaks.values() if peak > 50), reverse=True), shards


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def memory(base_url: str, work: Path, images: int, many: int) -> None:
    """The peak memory of each process, for ten thousand rows and for many."""
    print(f"\nMemory, shards of 1,000 rows, {PROCESSES} processes")
    peaks = {}
    cases = [
        ("10 thousand rows, all fetched", 10_000, None, 10),
        (f"{many:,} rows, of which --where leaves 10 thousand, all fetched", many, f"n % {many // 10_000} = 0", 10),
        (f"{many:,} rows, stopped when 20 of the shards are there", many, None, 20),
    ]
    for title, rows, where, shards in cases:
        table, out = work / f"{rows}.parquet", work / "out"
        if not table.exists():
            write_many(table, base_url, rows, images)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "clipkit", "download", str(table), str(out), "--format", "webdataset"]
        command += ["--allow-private-hosts", "--per-host", "256", "--processes", str(PROCESSES)]
        command += ["--samples-per-shard", "1000", *(["--where", where] if where else [])]
        began = time.monotonic()
        peaks[title], made = peak_memory(command, shards if where is None and rows > 10_000 else 10**9, out)
        told = ", ".join(f"{peak:,.0f}" for peak in peaks[title])
        print(f"  {title}: {told} MB by process ({made} shards in {time.monotonic() - began:.0f} s)")
    first = max(next(iter(peaks.values())))
    for title, found in peaks.items():
        print(f"  largest process against the first case: {max(found) / first:.2f} ({title})")


# ---------------------------------------------------------------------------------------------------------------------
# CPU
# ---------------------------------------------------------------------------------------------------------------------


def cpu(urls: Path, work: Path, environment: dict[str, str]) -> None:
    """Milliseconds of a worker's CPU for each row, by format, over what the network part alone takes."""
    command = [sys.executable, "-c", CPU, str(urls), str(work / "cpu"), str(CONNECTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    took = json.loads(done.stdout.splitlines()[-1])
    print(f"\nCPU of a worker a row: {took['network'] * 1e3:.2f} ms for the network alone; over it:")
    for name in ("tfds", "webdataset", "parquet"):
        print(f"  {name:12}{(took[name] - took['network']) * 1e3:.2f} ms (asked: under 0.7)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--modes", nargs="+", default=["keep", "encode"], help="keep what fits, or encode all again")
    parser.add_argument("--many", type=int, default=10_000_000, help="rows of the large table of the memory's part")
    parser.add_argument("--parts", nargs="+", default=["http", "https", "cpu", "memory"])
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        mean = write_images(work / "images", arguments.images)
        print(f"{arguments.images:,} JPEGs of {mean / 1e3:.1f} KB on average, {LATENCY * 1e3:.0f} ms latency, 2 cores")
        make_certificate(work)
        os.environ["SSL_CERT_FILE"] = str(work / "ca.pem")  # both sides' default context reads it
        sides = {"clipkit": (OURS, CONNECTIONS)}
        sides |= {f"img2dataset, {count} threads": (PEER, count) for count in arguments.threads}
        urls = work / "urls.parquet"
        for part in arguments.parts:
            certificate = work / "server.pem" if part == "https" else None
            with host(work / "images", LATENCY, certificate) as (base_url, pid):
                write_table(urls, base_url, arguments.rows, arguments.images)
                if part in ("http", "https"):
                    for mode in arguments.modes:
                        title = f"{part.upper()}, {MODES[mode]}"
                        compare(title, sides, urls, work, pid, arguments.rows, arguments.rounds, mode)
                elif part == "cpu":
                    cpu(urls, work, dict(os.environ))
                else:
                    memory(base_url, work, 32, arguments.many)


if __name__ == "__main__":
    main()
