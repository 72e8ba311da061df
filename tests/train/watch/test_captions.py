"""What a run says of its first captions."""

import csv
from pathlib import Path

import numpy as np
import pytest
from colour_pairs import picture

from clipkit.log import read_metrics
from clipkit.train.catalogue import debug
from clipkit.train.loader.loader import Batch
from clipkit.train.loader.samples import caption_hash
from clipkit.train.loop import train
from clipkit.train.sources.source import Pair
from clipkit.train.watch.captions import FirstCaptions


class Captions:
    """As much of a source as is looked at."""

    def __init__(self, captions):
        self.captions = captions
        self.num_records = len(captions)

    def pairs(self, records):
        yield from (Pair(b"", self.captions[record]) for record in records)


def report(captions, seen=None):
    """What is said when the records `seen` (all, twice) have been seen in batches of 4."""
    first = FirstCaptions(Captions(captions))
    records = [*range(len(captions))] * 2 if seen is None else seen
    for start in range(0, len(records), 4):
        part = records[start : start + 4]
        hashes = np.array([caption_hash(captions[record]) for record in part])
        wordless = [place for place, record in enumerate(part) if not any(map(str.isalnum, captions[record]))]
        none = np.zeros(len(part))
        first.take(Batch(none, none, None, hashes, none, np.array(part), wordless=wordless))
    return first.report()


@pytest.mark.parametrize(
    ("captions", "share", "says"),
    [
        (["a photo"] * 20, 1.0, "all 20 captions seen so far are the same ('a photo'): is that the right column?"),
        (["x" * 99] * 20, 1.0, f"('{'x' * 60}…')"),
        (["a photo"] * 15 + list("abcde"), 0.75, "75% of the 20 captions seen so far are the same ('a photo')"),
        (["red", "red", *"abcdefghijklmnopqr"], 0.1, None),
        ([word for word in "abcdefghij" for _ in range(2)], 1.0, None),  # say ten classes
        (["a"], 0.0, "the data have one record"),
        (["." * n for n in range(1, 21)], 0.0, "all 20 captions seen so far have no letter or digit ('.')"),
        (["." * n for n in range(1, 11)] + list("abcdefghij"), 0.0, "50% of the 20 captions seen so far have no"),
        (["猫", "ö", "7", *"abcdefghijklmnopq"], 0.0, None),
    ],
)
def test_equal_captions_are_counted_by_record(captions, share, says):
    found, warnings = report(captions)
    assert found == pytest.approx(share)
    assert len(warnings) == (says is not None)
    assert says is None or says in warnings[0]


def test_captions_that_are_equal_and_have_no_words_are_both_said():
    assert len(report(["..."] * 20)[1]) == 2


def test_a_few_captions_are_not_judged_by():
    assert report(["a photo"] * 100, seen=[1, 2, 3, 4] * 5) is None


def folder_of(path: Path, captions) -> Path:
    path.mkdir()
    with (path / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for number, caption in enumerate(captions):
            (path / f"{number}.jpg").write_bytes(picture(number, (200, 30, 30)))
            rows.writerow([f"{number}.jpg", caption])
    return path


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(
    ("captions", "says"),
    [
        (["a photo"] * 64, "Warning: all 16 captions seen so far are the same ('a photo')"),
        (["!" * (n + 1) for n in range(40)], "Warning: all 16 captions seen so far have no letter or digit"),
        (["only one"], "Warning: the data have one record"),
        ([f"number {n}" for n in range(40)], None),
    ],
)
def test_a_run_says_it_at_its_first_log_line(tmp_path, capsys, captions, says, workers):
    data = folder_of(tmp_path / "data", captions)
    train(debug(), data, tmp_path / "run", device_name="cpu", workers=workers)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning: ")]
    assert len(lines) == (says is not None)
    assert says is None or lines[0].startswith(says)
    metrics = read_metrics(tmp_path / "run")
    assert ["equal_captions" in line for line in metrics] == [True] + [False] * (len(metrics) - 1)
    assert metrics[0]["equal_captions"] == (1.0 if len(set(captions)) == 1 < len(captions) else 0.0)
