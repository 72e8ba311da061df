"""Balancing by half a million concepts: captions/s of one core, memory, and what ten million captions would take.

Concepts and captions are made up of words whose frequencies follow Zipf's law, as those of a language do; captions
have 3 to 24 words, concepts 1 to 5. Both passes are measured on the functions of `tfrecord_tools/build/choose.py`
without the reading of images: hashing keys and matching, counting, and drawing.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.storage.files import save_array
from clipkit.tfrecord_tools.build.choose import SURVEYED, Balance, choose, count_concepts, survey_path
from clipkit.tfrecord_tools.build.concepts import Matcher, hashes
from clipkit.tfrecord_tools.build.prepare import Stretch

WORDS = 300_000
STRETCH = 20_000  # captions
TARGET = 10_000_000


def phrases(rng: np.random.Generator, lengths: np.ndarray[Any, Any]) -> list[str]:
    """Rows of so many words each."""
    weights = 1 / np.arange(1, WORDS + 1)
    words = rng.choice(WORDS, int(lengths.sum()), p=weights / weights.sum()).tolist()
    found, start = [], 0
    for length in lengths.tolist():
        found.append(" ".join(f"w{word}" for word in words[start : start + length]))
        start += length
    return found


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=500_000)
    parser.add_argument("--seconds", type=float, default=40.0, help="of matching")
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    made: dict[str, None] = {}
    while len(made) < options.concepts:
        lengths = rng.choice([1, 2, 3, 4, 5], options.concepts, p=[0.35, 0.4, 0.15, 0.07, 0.03])
        made.update(dict.fromkeys(phrases(rng, lengths)))
    concepts = list(made)[: options.concepts]
    before, began = megabytes(), time.process_time()
    matcher = Matcher(concepts)
    setup = time.process_time() - began
    balance = Balance("made up", len(concepts), "", options.limit, 0)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[Stretch] = []
        matching, captions, matches = 0.0, 0, 0
        while matching < options.seconds:
            texts = phrases(rng, rng.integers(3, 25, STRETCH))
            began = time.process_time()
            found = [matcher.matches(text) for text in texts]
            rows = np.empty(STRETCH, SURVEYED)
            rows["number"], rows["concepts"] = np.arange(STRETCH), [len(each) for each in found]
            rows["key"] = np.array(hashes(str(captions + number) for number in range(STRETCH)), np.uint64)
            job = Stretch(len(jobs), Path(), Path(folder), (), 0)
            save_array(survey_path(job, ".npy"), rows)
            save_array(
                survey_path(job, "-concepts.npy"), np.array([number for each in found for number in each], np.uint32)
            )
            matching += time.process_time() - began
            captions, matches = captions + STRETCH, matches + sum(map(len, found))
            jobs.append(job)
        began = time.process_time()
        counts = count_concepts(jobs, None, concepts)
        save_array(Path(folder) / "concepts.npy", counts)
        kept = sum(choose(job, None, balance, Path(folder) / "concepts.npy")["kept"] for job in jobs)
        drawing = time.process_time() - began
    told = {
        "concepts": len(concepts),
        "captions": captions,
        "matches_per_caption": round(matches / captions, 1),
        "kept": kept,
        "setup_seconds": round(setup, 2),
        "captions_per_core_second": round(captions / (matching + drawing)),
        "matching_captions_per_core_second": round(captions / matching),
        "core_minutes_for_10_million": round((setup + (matching + drawing) * TARGET / captions) / 60, 2),
        "megabytes_of_matcher_and_more": round(megabytes() - before),
        "peak_megabytes": round(megabytes()),
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
