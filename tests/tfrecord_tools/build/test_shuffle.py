"""The shuffle: every record once, in an order that tells nothing of the sources; shares by the hash of the key."""

import hashlib

import numpy as np
import pytest
from image_shards import pair, write_tar, write_tars

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.manifest import read_manifest
from clipkit.tfrecord_tools.build import shuffle
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.build.sorted_rows import read_sorted, write_sorted
from clipkit.tfrecord_tools.verify.command import verify

SAMPLES, SHARDS = 600, 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six hundred samples in six tars, some of them of no use."""
    folder = tmp_path_factory.mktemp("shuffle")
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS)
        write_tar(
            folder / f"{shard}.tar", [pair(n, **({"txt": " "} if n % 50 == 7 else {"json": {"n": n}})) for n in numbers]
        )
    return folder


def build(shards, out, **options):
    return build_tfds(
        shards, out, "pairs", **{"shard_megabytes": 0.1, "shuffle": 5, "progress": lambda _: None, **options}
    )


def order_of(path, split="train"):
    dataset = open_dataset(path, split)
    return [int(dataset.example(i)["key"]) for i in range(len(dataset))]


USED = [n for n in range(SAMPLES) if n % 50 != 7]


def test_the_order_says_nothing_of_the_sources(shards, tmp_path):
    summary = build(shards, tmp_path)
    order = order_of(tmp_path)
    assert sorted(order) == USED
    places = np.arange(len(order))
    # Of a random permutation of 588 the correlation has a standard deviation of 0.041.
    assert abs(np.corrcoef(places, order)[0, 1]) < 0.15
    sources = np.array(order) * SHARDS // SAMPLES
    assert abs(np.mean(sources[1:] == sources[:-1]) - 1 / SHARDS) < 0.06
    # Each shard has records of each source, about as many.
    lengths = [shard.records for shard in open_dataset(tmp_path).shards]
    assert len(lengths) > 3
    start = 0
    for length in lengths:
        counts = np.bincount(sources[start : start + length], minlength=SHARDS)
        assert counts.min() > 0.3 * length / SHARDS
        start += length
    assert max(lengths) < 1.5 * min(lengths)
    manifest = read_manifest(summary.path)["train"]
    assert manifest.options["shuffle"] == 5
    assert [(s.file, s.samples, s.records, s.skipped) for s in manifest.sources] == [
        (f"{i}.tar", 100, 98, {"empty-caption": 2}) for i in range(SHARDS)
    ]
    assert (summary.samples, summary.records, summary.skipped) == (600, 588, {"empty-caption": 12})
    assert verify(summary.path).problems == ()
    assert not list(summary.path.rglob("build-*"))


def test_the_order_is_that_of_the_seed_alone(shards, tmp_path, monkeypatch):
    build(shards, tmp_path / "a")
    expected = order_of(tmp_path / "a")
    monkeypatch.setattr(shuffle, "INDEX_RECORDS", 50)
    monkeypatch.setattr(shuffle, "_MAX_OPEN", 2)
    build(shards, tmp_path / "b", workers=2, shard_megabytes=0.03)
    assert order_of(tmp_path / "b") == expected
    build(shards, tmp_path / "c", shuffle=6)
    other = order_of(tmp_path / "c")
    assert sorted(other) == sorted(expected)
    assert sum(a == b for a, b in zip(other, expected, strict=True)) < 10


def test_records_are_those_of_the_unshuffled_dataset(shards, tmp_path):
    build(shards, tmp_path / "plain", shuffle=None)
    build(shards, tmp_path / "shuffled")
    plain, shuffled = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "shuffled")
    assert plain.features == shuffled.features
    assert sorted(plain.read(i) for i in range(len(plain))) == sorted(shuffled.read(i) for i in range(len(shuffled)))


def test_shards_that_were_gathered_from_other_records_are_gathered_anew(tmp_path, monkeypatch):
    tars = write_tars(tmp_path / "shards", [20, 20])
    gathered = []

    def gather_one(job):
        if gathered:
            raise KeyboardInterrupt
        gathered.append(job.path)
        return shuffle.gather(job)

    with monkeypatch.context() as patch:
        patch.setattr("clipkit.tfrecord_tools.build.passes.gather", gather_one)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "shards", tmp_path / "out", shard_megabytes=0.015)
    assert gathered[0].exists()
    write_tar(tars[1], [pair(100 + i) for i in range(22)])
    build(tmp_path / "shards", tmp_path / "out", shard_megabytes=0.015)
    assert sorted(order_of(tmp_path / "out")) == [*range(20), *range(100, 122)]


def test_shares_are_by_the_hash_of_the_key_and_keep_the_order(shards, tmp_path):
    summary = build(shards, tmp_path, shuffle=None, split="train=0.8,validation=0.15,test=0.05")
    found = {split: order_of(tmp_path, split) for split in ("train", "validation", "test")}
    assert summary.by_split == {split: len(order) for split, order in found.items()}
    assert sorted(n for order in found.values() for n in order) == USED
    assert all(order == sorted(order) for order in found.values())
    assert abs(len(found["train"]) / len(USED) - 0.8) < 0.06
    for n in USED:
        point = int.from_bytes(hashlib.blake2b(f"{n:09d}".encode(), digest_size=8).digest(), "big") / 2**64
        split = "train" if point < 0.8 else "validation" if point < 0.95 else "test"
        assert n in found[split]
    manifests = read_manifest(summary.path)
    assert sum(manifest.samples for manifest in manifests.values()) == SAMPLES
    for split, manifest in manifests.items():
        assert manifest.records == len(found[split])
        assert manifest.samples == manifest.records + sum(manifest.skipped.values())
        lines = (summary.path / "clipkit" / f"skipped-{split}.jsonl").read_text().splitlines()
        assert len(lines) == sum(manifest.skipped.values())
    assert len(open_dataset(tmp_path, "train").shards) > len(open_dataset(tmp_path, "test").shards) == 1
    assert "train 4" in summary.text()
    assert not build(shards, tmp_path, shuffle=None, split="train=0.8,validation=0.15,test=0.05").built
    with pytest.raises(UserError, match="already holds a split 'train' made with other options"):
        build(shards, tmp_path, shuffle=None)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train=0.9", "must add up to 1"),
        ("train=0.9,test=0.2", "must add up to 1"),
        ("train=1,test=0", "must add up to 1"),
        ("train=0.5,train=0.5", "named twice"),
        ("train=much,test=0.1", "'much' is not a share"),
        ("train=0.5,te st=0.5", "split 'te st': TFDS allows a letter"),
    ],
)
def test_shares_that_cannot_be_are_refused(shards, tmp_path, split, message):
    with pytest.raises(UserError, match=message):
        build(shards, tmp_path, split=split)
    assert not list(tmp_path.iterdir())


def test_a_range_of_keys_is_read_without_the_rest(tmp_path):
    dtype = np.dtype([("key", "<u8"), ("n", "<u4")])
    rows = np.empty(5000, dtype)
    rows["key"] = np.sort(np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64))
    rows["key"][0], rows["key"][-1] = 0, 2**64 - 1
    rows["n"] = np.arange(5000)
    path = tmp_path / "some.rows"
    write_sorted(path, rows)
    assert read_sorted(path, dtype).tolist() == rows.tolist()
    for low, high in [(0, 1), (0, 2**63), (2**63, 2**64), (2**64 - 1, 2**64), (5, 5), (2**60 + 7, 2**62 - 9)]:
        keys = [int(key) for key in rows["key"]]
        expected = [n for n, key in enumerate(keys) if low <= key < high]
        assert read_sorted(path, dtype, low, high)["n"].tolist() == expected
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        read_sorted(path, dtype)
