"""Duplicates: the first of all in the order of the sources stays, however the work is divided."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_shards import pair, picture, write_tar
from natural_images import encoded, natural

from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.manifest import read_manifest
from clipkit.pixels.phash import distance, perceptual_hash_of
from clipkit.tfrecord_tools.build import command, dedup
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.build.dedup import NEAR_BITS, near_duplicates, near_earlier, place, rotated, runs_of


def keys(folder, split="train"):
    dataset = open_dataset(folder, split)
    return [int(dataset.example(i)["key"]) for i in range(len(dataset))]


def build(tmp_path, method, **options):
    options = {"shard_megabytes": 0.005, **options}
    return build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", dedup=method, progress=lambda _: None, **options)


def test_equal_bytes_are_duplicates_over_all_shards(tmp_path):
    same = {"jpg": picture(77), "json": {"sha256": None}}
    write_tar(tmp_path / "shards" / "0.tar", [pair(0), pair(1, **same, txt=" "), pair(2, **same), pair(3)])
    write_tar(tmp_path / "shards" / "1.tar", [pair(4, **same), pair(5), pair(6, jpg=picture(3))])
    summary = build(tmp_path, "sha256")
    # Sample 1 can't be used, so it takes nobody's place.
    assert keys(tmp_path / "out") == [0, 2, 3, 5]
    assert summary.skipped == {"duplicate": 2, "empty-caption": 1}
    assert summary.samples == summary.records + 3
    lines = (summary.path / "clipkit" / "skipped-train.jsonl").read_text().splitlines()
    found = [(line["source"], int(line["key"])) for line in map(json.loads, lines) if line["reason"] == "duplicate"]
    assert found == [("1.tar", 4), ("1.tar", 6)]
    assert not list(summary.path.rglob("build-*"))


@pytest.mark.parametrize("options", [{}, {"shuffle": 1}, {"keep_best": 0.5, "by": "similarity"}])
def test_duplicates_are_those_of_the_sources_with_which_a_killed_build_ends(tmp_path, monkeypatch, options):
    """What isn't touched by a shard that was fetched again may have other duplicates after it."""

    def write(caption):
        write_tar(tmp_path / "shards" / "0.tar", [*map(pair, range(8)), pair(8, txt=caption)])

    def kill(*_, **__):
        raise KeyboardInterrupt

    last = pair(14, txt="twice", json={"similarity": -5.0})
    write_tar(tmp_path / "shards" / "1.tar", [*map(pair, range(9, 14)), last, pair(15)])
    write("twice")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(command, "finish_dataset", kill)
        build(tmp_path, "caption", **options)
    write("once " * 300)
    summary = build(tmp_path, "caption", **options)
    found = keys(tmp_path / "out")
    assert "duplicate" not in summary.skipped
    shutil.rmtree(tmp_path / "out")
    build(tmp_path, "caption", **options)
    assert sorted(found) == sorted(keys(tmp_path / "out"))


def test_captions_are_the_same_when_the_model_sees_the_same(tmp_path):
    captions = ["A  cat", "a cat", "a CAT ", "a cat.", "caf\u00e9", "cafe\u0301", "a dog", "caf\u00c9"]
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, txt=caption, json=None) for i, caption in enumerate(captions)])
    build(tmp_path, "caption")
    assert keys(tmp_path / "out") == [0, 3, 4, 6]


@pytest.mark.parametrize(("method", "rows"), [("phash", 100), ("phash", 1), ("sha256", 100)])
def test_a_duplicate_counts_once_however_many_comparisons_find_it(tmp_path, method, rows, monkeypatch):
    """Each hash is compared four times, and a duplicate is one whether one comparison finds it or all."""
    monkeypatch.setattr(dedup, "PART_ROWS", rows)
    scenes = [natural(96, 128, seed) for seed in range(4)]
    images = [encoded(scenes[number], quality=quality) for number, quality in [(0, 95), (1, 95), (0, 80), (1, 40)]]
    for shard in range(2):
        samples = [pair(10 * shard + i, jpg=image) for i, image in enumerate([*images, encoded(scenes[2 + shard])])]
        write_tar(tmp_path / "shards" / f"{shard}.tar", samples)
    seen = []
    summary = build_tfds(
        tmp_path / "shards", tmp_path / "out", "pairs", dedup=method, shard_megabytes=0.005, progress=seen.append
    )
    assert summary.skipped["duplicate"] == (6 if method == "phash" else 4)
    if method != "phash":
        assert [now.counts["duplicates"] for now in seen if now.label == "build-tfds, comparing"][-1] == 4


def test_a_picture_is_a_duplicate_of_one_that_was_encoded_anew(tmp_path):
    scenes = [natural(96, 128, seed) for seed in range(4)]
    made_of = [(0, 95), (1, 95), (0, 80), (2, 95), (1, 40)]
    images = [encoded(scenes[number], quality=quality) for number, quality in made_of]
    flat = [encoded(np.full((64, 64, 3), grey, np.uint8)) for grey in (0, 0, 90, 120)]
    hashes = [perceptual_hash_of(image) for image in images]
    assert (distance(hashes[0], hashes[2]), distance(hashes[1], hashes[4])) == (0, 2)
    samples = [pair(i, jpg=image) for i, image in enumerate([*images, *flat])]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    summary = build(tmp_path, "phash", shard_megabytes=0.02)
    # Pictures of one colour have the same hash and are left alone.
    assert keys(tmp_path / "out") == [0, 1, 3, 5, 6, 7, 8]
    assert summary.skipped == {"duplicate": 2}


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=5)), max_size=40), st.data())
def test_near_hashes_are_found_wherever_they_differ(bases, data):
    hashes = []
    for base, flips in bases:
        hashes += [base, base ^ sum(1 << bit for bit in flips)]
    hashes = data.draw(st.permutations(hashes))
    places = np.arange(len(hashes), dtype=np.uint64)
    found: set[int] = set()
    for run in range(runs_of("phash")):
        keys_ = rotated(np.array(hashes, np.uint64), 16 * run)
        order = np.lexsort((places, keys_))
        keys_, ordered = keys_[order], places[order]
        again = np.zeros(len(keys_), np.bool_)
        again[1:] = keys_[1:] == keys_[:-1]
        found |= set(ordered[again].tolist()) | set(near_duplicates(keys_[~again], ordered[~again]).tolist())
    expected = {i for i, each in enumerate(hashes) if any(distance(each, other) <= NEAR_BITS for other in hashes[:i])}
    assert found == expected


def test_comparing_in_blocks_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64) & np.uint64(0xFFFF)
    expected = [any(distance(int(a), int(b)) <= NEAR_BITS for b in hashes[:i]) for i, a in enumerate(hashes)]
    assert 0 < sum(expected) < 300
    for rows, columns in [(1024, 8192), (7, 11), (11, 7), (1, 1), (64, 64)]:
        monkeypatch.setattr(dedup, "COMPARED_ROWS", rows)
        monkeypatch.setattr(dedup, "COMPARED_COLUMNS", columns)
        assert near_earlier(hashes).tolist() == expected


@pytest.mark.parametrize("stretches", [1, 2, 3, 1000, 60_000])
def test_places_rise_and_leave_room(stretches):
    some = {0, 1, stretches // 2, stretches - 1, stretches}
    places = [place(stretch, stretches) for stretch in sorted(some)]
    assert all(b - a >= 1 << 32 for a, b in pairwise(places))
    assert places[-1] <= 1 << 64


@pytest.mark.parametrize("method", ["sha256", "caption", "phash"])
def test_neither_shards_nor_parts_nor_workers_change_what_is_a_duplicate(tmp_path, method, monkeypatch):
    rng = np.random.default_rng(1)
    scenes = [encoded(natural(96, 128, seed)) for seed in range(12)]
    numbers = rng.integers(0, 12, 40)
    for shard in range(4):
        samples = [
            pair(i, jpg=scenes[numbers[i]], txt=f"caption {numbers[i]}", json=None)
            for i in range(10 * shard, 10 * shard + 10)
        ]
        write_tar(tmp_path / "shards" / f"{shard}.tar", samples)
    firsts = sorted({int(n): i for i, n in reversed(list(enumerate(numbers)))}.values())
    expected = None
    for name, megabytes, workers, rows in [("a", 100, 1, 100), ("b", 0.02, 1, 3), ("c", 0.05, 2, 1)]:
        monkeypatch.setattr(dedup, "PART_ROWS", rows)
        summary = build_tfds(
            tmp_path / "shards",
            tmp_path / name,
            "pairs",
            dedup=method,
            shard_megabytes=megabytes,
            workers=workers,
            progress=lambda _: None,
        )
        assert keys(tmp_path / name) == firsts
        counts = (summary.samples, summary.records, summary.skipped)
        expected = expected or counts
        assert counts == expected
        for source in read_manifest(summary.path)["train"].all_sources:
            assert source.samples == source.records + sum(source.skipped.values())


def test_an_unknown_method_is_named(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [pair(0)])
    with pytest.raises(UserError, match="--dedup md5: choose among sha256, caption, phash"):
        build(tmp_path, "md5")
    assert not (tmp_path / "out").exists()
