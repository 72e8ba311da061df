"""`--balance` and `--keep-best` keep the samples that the papers' own few lines keep, however the work is divided."""

import json
import math
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from folder_contents import contents
from hypothesis import given
from hypothesis import strategies as st
from image_shards import pair, write_tar

from clipkit.cli.main import main
from clipkit.counter_rng import sample_keys, uniform
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.manifest import read_manifest
from clipkit.tfrecord_tools.build import command, shard
from clipkit.tfrecord_tools.build.choose import DRAWS, Cut, select, sortable, unsorted_score
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.build.concepts import Matcher, builtin_concepts, hashes, read_concepts, spaced
from clipkit.tfrecord_tools.inspection.command import inspect_dataset

CONCEPTS = ["cat", "dog", "black cat", "St. Louis", "the", "cat sat on"]


def build(folder, out="out", **options):
    options = {"shard_megabytes": 0.3, "progress": lambda _: None, **options}
    return build_tfds(folder / "shards", folder / out, "pairs", **options)


def keys(folder, split="train"):
    dataset = open_dataset(folder, split)
    return [dataset.example(i)["key"] for i in range(len(dataset))]


def write_list(path, concepts):
    path.write_text("".join(f"{each}\n" for each in concepts), encoding="utf-8")
    return str(path)


# ---- The reference, from "Demystifying CLIP Data", section 3 and algorithm 1 -----------------------------------------


def has(concept, caption):
    """Substring matching: both between spaces, punctuation set apart, white space as one space."""

    def prepared(text):
        for mark in ",.;:?!`":
            text = text.replace(mark, f" {mark} ")
        return f" {' '.join(text.split())} "

    return prepared(concept) in prepared(caption)


def balanced(samples, concepts, limit, seed):
    """The keys that stay of (key, caption), with the same draws as `choose`."""
    matches = {key: [concept for concept in concepts if has(concept, caption)] for key, caption in samples}
    counts = Counter(concept for found in matches.values() for concept in found)

    def draw(key, concept):
        word = sample_keys(seed, hashes([key])) ^ np.array(hashes([spaced(concept)]), np.uint64)
        return uniform(word, 1, DRAWS)[0, 0]

    stay = [
        k for k, found in matches.items() if any(draw(k, each) < limit / max(counts[each], limit) for each in found)
    ]
    return stay, counts


# ---- Concepts --------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["cat", "Cat", "black", "on", "sat", "the", "St", "Louis", "a,b", "é", "猫", "cats"])
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", ".", ", ", "\n", "? "])), max_size=8).map(
    lambda parts: "".join(f"{word}{between}" for word, between in parts)
)


@given(st.lists(TEXTS, max_size=12), TEXTS)
def test_a_caption_has_the_concepts_that_are_substrings(texts, caption):
    concepts = list(dict.fromkeys(filter(None, map(spaced, texts))))
    found = Matcher(concepts).matches(caption)
    assert found == [number for number, concept in enumerate(concepts) if has(concept, caption)]


def test_the_built_in_list_is_of_names_and_words():
    concepts = builtin_concepts()
    assert len(set(concepts)) == len(concepts) > 40_000
    assert {"tench", "Tench", "great white shark", "bicycle", "Bicycle", "the"} <= set(concepts)
    assert all(concept == spaced(concept) != "" for concept in concepts)


def test_a_list_is_text_or_json_and_says_what_it_left_out(tmp_path):
    path = tmp_path / "list.txt"
    write_list(path, ["cat", "", "dog", "cat", " cat ", "St. Louis", ""])
    found = read_concepts(str(path))
    assert found.texts == ("cat", "dog", "St . Louis")
    assert found.note == f"{path}: 2 repeated concepts and 2 empty lines left out"
    (tmp_path / "list.json").write_text(json.dumps(["cat", "dog", "St. Louis"]))
    same = read_concepts(str(tmp_path / "list.json"))
    assert (same.texts, same.sha256, same.note) == (found.texts, found.sha256, "")
    for data, words in (
        (b"\n \n", "holds no concept"),
        (b"caf\xe9\n", "can't be read .*give UTF-8"),
        (b"", "holds no concept"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_concepts(str(path))
    (tmp_path / "list.json").write_text('{"cat": 1}')
    with pytest.raises(UserError, match="isn't a list of texts"):
        read_concepts(str(tmp_path / "list.json"))
    with pytest.raises(UserError, match=r"list of concepts .* doesn't exist"):
        read_concepts(str(tmp_path / "none.txt"))


# ---- Balance ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """240 captions in three tars: one concept is everywhere, some are rare, some captions have none."""
    folder = tmp_path_factory.mktemp("balance")
    rng = random.Random(0)
    samples = []
    for number in range(240):
        words = ["the"] * (number % 5 > 0) + rng.choices(["cat", "dog", "black cat", "Cat", "x"], k=number % 4)
        words += ["in St. Louis."] * (number % 60 == 1) + [f"picture {number}"]
        samples.append((f"{number:09d}", " ".join(words)))
    for tar in range(3):
        part = [pair(n, txt=samples[n][1], json={"score": (n * 7) % 50}) for n in range(80 * tar, 80 * tar + 80)]
        write_tar(folder / "shards" / f"{tar}.tar", part)
    return folder, samples


@pytest.mark.parametrize(("limit", "seed"), [(5, 0), (5, 3), (40, 0), (1000, 0)])
def test_the_rows_are_those_of_the_paper(pool, tmp_path, limit, seed):
    folder, samples = pool
    concepts = write_list(tmp_path / "list.txt", CONCEPTS)
    summary = build(folder, tmp_path / "out", balance=concepts, limit=limit, seed=seed, shard_megabytes=100)
    stay, counts = balanced(samples, CONCEPTS, limit, seed)
    assert keys(tmp_path / "out") == stay and (limit == 1000 or len(stay) < 180)
    bare = sum(not any(has(concept, caption) for concept in CONCEPTS) for _, caption in samples)
    assert summary.skipped == {
        reason: count for reason, count in (("balance", 240 - bare - len(stay)), ("no-concept", bare)) if count
    }
    told = read_manifest(summary.path)["train"].choice["balance"]
    captions = dict(samples)
    kept = Counter(concept for key in stay for concept in CONCEPTS if has(concept, captions[key]))
    for name, names in (
        ("head", [each for each in CONCEPTS if counts[each] > limit]),
        ("tail", [each for each in CONCEPTS if 0 < counts[each] <= limit]),
    ):
        matches = sum(counts[each] for each in names)
        assert told[name] == {"concepts": len(names), "matches": matches, "kept": sum(kept[each] for each in names)}
    assert (told["samples"], told["with_concept"], told["kept"]) == (240, 240 - bare, len(stay))
    assert told["frequent"][0] == ["the", counts["the"], kept["the"]]
    # A rare concept loses nothing.
    rare = [key for key, caption in samples if "St. Louis" in caption]
    assert limit < 5 or set(rare) <= set(stay)
    listed = summary.path / "clipkit" / "skipped-train.jsonl"
    assert listed.read_text() == ""


def test_neither_cuts_nor_workers_nor_the_order_of_anything_change_the_rows(pool, tmp_path):
    folder, samples = pool
    stay, _ = balanced(samples, CONCEPTS, 5, 1)
    options = {"limit": 5, "seed": 1}
    for name, megabytes, workers, concepts in [
        ("a", 0.15, 1, CONCEPTS),
        ("b", 100, 2, CONCEPTS[::-1]),
    ]:
        listed = write_list(tmp_path / f"{name}.txt", concepts)
        build(folder, tmp_path / name, balance=listed, shard_megabytes=megabytes, workers=workers, **options)
        assert keys(tmp_path / name) == stay
    (tmp_path / "shards").mkdir()
    for tar in range(3):
        (tmp_path / "shards" / f"{2 - tar}.tar").symlink_to(folder / "shards" / f"{tar}.tar")
    build(tmp_path, "c", balance=listed, **options)
    assert sorted(keys(tmp_path / "c")) == stay


def test_what_is_killed_goes_on_with_the_same_bytes(pool, tmp_path, monkeypatch):
    folder, _ = pool
    options = {
        "balance": write_list(tmp_path / "list.txt", CONCEPTS),
        "limit": 9,
        "keep_best": 0.7,
        "by": "score",
        "dedup": "caption",
        "shuffle": 3,
        "shard_megabytes": 0.3,
    }
    build(folder, tmp_path / "whole", **options)
    writing = shard._build_shard

    def broken(job, task, kinds):
        if job.number == 1:
            raise KeyboardInterrupt
        return writing(job, task, kinds)

    monkeypatch.setattr(shard, "_build_shard", broken)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "again", **options)
    monkeypatch.setattr(shard, "_build_shard", writing)
    work = tmp_path / "again" / "pairs" / "1.0.0" / "clipkit" / "build-train"
    assert (work / "shard-00000.json").exists()
    with pytest.raises(UserError, match="holds a build begun with other options"):
        build(folder, tmp_path / "again", **{**options, "limit": 8})
    build(folder, tmp_path / "again", **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_a_choice_by_other_counts_is_made_again(pool, tmp_path, monkeypatch):
    """A source is fetched again during a build: the counts change, and so do shards that were finished before."""
    _, samples = pool
    for tar, first in enumerate((0, 80)):
        part = [pair(n, txt=samples[n][1]) for n in range(first, first + 80)]
        write_tar(tmp_path / "shards" / f"{tar}.tar", part)
    options = {"balance": write_list(tmp_path / "list.txt", CONCEPTS), "limit": 9}
    with monkeypatch.context() as patch:
        patch.setattr(command, "finish_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, **options)
    changed = [(key, f"{caption} {'the dog ' * 100}") for key, caption in samples[80:160]]
    write_tar(tmp_path / "shards" / "1.tar", [pair(int(key), txt=caption) for key, caption in changed])
    build(tmp_path, **options)
    assert keys(tmp_path / "out") == balanced([*samples[:80], *changed], CONCEPTS, 9, 0)[0]


def test_a_survey_of_other_options_is_not_taken(pool, tmp_path, monkeypatch):
    folder, _ = pool
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_pass", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path / "out", keep_best=0.5, by="score", dedup="sha256")
    build(folder, tmp_path / "out", keep_best=0.5, by="height", dedup="caption")
    build(folder, tmp_path / "fresh", keep_best=0.5, by="height", dedup="caption")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# ---- The best --------------------------------------------------------------------------------------------------------

SCORES = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 0.25])


@given(st.lists(st.tuples(SCORES, st.integers(0, 2**64 - 1)), min_size=1, max_size=30), st.data())
def test_the_cut_is_that_of_sorting(pairs, data):
    kept = data.draw(st.integers(1, len(pairs)))
    chunk = data.draw(st.integers(1, 7))
    scores, tied = np.array([score for score, _ in pairs]), np.array([key for _, key in pairs], np.uint64)
    ordered = sortable(scores)

    def scored():
        return ((ordered[i : i + chunk], tied[i : i + chunk]) for i in range(0, len(pairs), chunk))

    found = select(scored, kept)
    expected = sorted(((score + 0.0, key) for score, key in pairs), reverse=True)[kept - 1]
    assert (unsorted_score(found.score), found.key) == expected
    assert found == Cut(int(sortable(np.array([expected[0]]))[0]), expected[1])


@pytest.mark.parametrize("table", [False, True])
def test_the_best_of_a_column_or_a_table(pool, tmp_path, table):
    folder, samples = pool
    scores = {key: (int(key) * 7) % 50 for key, _ in samples}
    expected = sorted(scores, key=lambda key: (scores[key], hashes([key])), reverse=True)[: math.ceil(0.3 * 240)]
    by = "score"
    if table:
        rows = {"key": [*scores, "another"], "similarity": [*map(float, scores.values()), 9e9]}
        pq.write_table(pa.table(rows), tmp_path / "scores.parquet")
        by = str(tmp_path / "scores.parquet")
    summary = build(folder, tmp_path / "out", keep_best=0.3, by=by)
    assert sorted(keys(tmp_path / "out")) == sorted(expected)
    assert summary.skipped == {"keep-best": 240 - 72}
    manifest = read_manifest(summary.path)["train"]
    told = manifest.choice["keep_best"]
    lowest = min(scores[key] for key in expected)
    assert (told["samples"], told["kept"], told["score"], told["without_score"]) == (240, 72, lowest, 0)
    assert manifest.options["keep_best"]["share"] == 0.3
    again = build(folder, tmp_path / "out", keep_best=0.3, by=by)
    assert not again.built
    if table:
        pq.write_table(pa.table({**rows, "similarity": [-1.0, *rows["similarity"][1:]]}), by)
        with pytest.raises(UserError, match="made with other options"):
            build(folder, tmp_path / "out", keep_best=0.3, by=by)


def test_few_samples_without_a_score_are_counted_and_many_are_refused(tmp_path):
    def write(values):
        samples = [pair(n, json={"score": value}) for n, value in enumerate(values)]
        write_tar(tmp_path / "shards" / "0.tar", samples)

    write([None, math.nan, *range(198)])
    summary = build(tmp_path, keep_best=0.5, by="score")
    assert keys(tmp_path / "out") == [f"{n:09d}" for n in range(101, 200)]
    assert summary.skipped == {"keep-best": 99, "no-score": 2}
    lines = (summary.path / "clipkit" / "skipped-train.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000000000", "000000001"]
    write([None, math.nan, 3, 4])
    with pytest.raises(UserError, match=r"2 of 4 samples have no score \(missing or NaN\) in column 'score'"):
        build(tmp_path, "few", keep_best=0.5, by="score")
    write([1, "good", 3])
    with pytest.raises(UserError, match=r"sample 000000001 has 'good', which isn't a number"):
        build(tmp_path, "text", keep_best=0.5, by="score")


def test_the_best_are_balanced(pool, tmp_path):
    """First the score over the whole, then the counts of what is left."""
    folder, samples = pool
    concepts = write_list(tmp_path / "list.txt", CONCEPTS)
    build(folder, tmp_path / "out", keep_best=0.4, by="score", balance=concepts, limit=9)
    score = sorted(samples, key=lambda sample: ((int(sample[0]) * 7) % 50, hashes([sample[0]])), reverse=True)
    best = sorted(score[:96])
    stay, counts = balanced(best, CONCEPTS, 9, 0)
    assert keys(tmp_path / "out") == stay
    page = inspect_dataset(tmp_path / "out" / "pairs" / "1.0.0", sample=5).page.read_text(encoding="utf-8")
    assert "How it was chosen" in page and "the 96 best" in page and "Balanced by 6 concepts (list.txt)" in page
    assert f'<td class="wide">the</td><td class="r">{counts["the"]}</td>' in page


def test_what_cannot_be_chosen_is_one_line(pool, tmp_path):
    folder, _ = pool
    scores = tmp_path / "scores.parquet"
    for columns, options, words in (
        ({}, {"keep_best": 0.5}, "--keep-best and --by go together"),
        ({}, {"by": "score"}, "--keep-best and --by go together"),
        ({}, {"keep_best": 1.5, "by": "score"}, "give the share to keep"),
        ({}, {"keep_best": 0.5, "by": "scroe"}, "no such column; they have .*score"),
        ({}, {"keep_best": 0.5, "by": "none.parquet"}, "table of scores none.parquet doesn't exist"),
        ({}, {"keep_best": 0.5, "by": "none.parquet:s"}, "table of scores none.parquet doesn't exist"),
        ({}, {"limit": 5}, "--limit is for --balance"),
        ({}, {"seed": 0}, "--seed is for --balance"),
        ({}, {"balance": "builtin", "limit": 0}, "give at least 1"),
        ({"key": ["a"], "s": [1.0]}, {}, "no column 'similarity', but key, s: give TABLE or TABLE:COLUMN"),
        ({"similarity": [1.0]}, {}, "no column 'key'"),
        ({"key": ["a"], "similarity": ["good"]}, {}, "isn't of numbers"),
        ({"key": ["a", "a"], "similarity": [1.0, 2.0]}, {}, "two scores for a key, 1 times"),
        ({"key": ["a"], "similarity": [1.0]}, {}, "240 of 240 samples have no score"),
        ({"key": pa.array([], pa.string()), "similarity": pa.array([], pa.float64())}, {}, "holds no row"),
    ):
        if columns:
            pq.write_table(pa.table(columns), scores)
        with pytest.raises(UserError, match=words):
            build(folder, tmp_path / "out", **(options or {"keep_best": 0.5, "by": str(scores)}))
    with pytest.raises(UserError, match=r"no-concept.*no caption has a concept of --balance"):
        build(folder, tmp_path / "none", balance=write_list(tmp_path / "list.txt", ["zebra"]))


def test_the_command_takes_the_options(pool, tmp_path):
    folder, samples = pool
    listed = write_list(tmp_path / "list.txt", [*CONCEPTS, "cat", ""])
    pq.write_table(pa.table({"key": [key for key, _ in samples], "s": list(range(240))}), tmp_path / "s.parquet")
    command = [
        "build-tfds",
        folder / "shards",
        tmp_path / "out",
        "--name",
        "pairs",
        "--balance",
        listed,
        "--limit",
        "9",
    ]
    command += ["--seed", "2", "--keep-best", "0.5", "--by", f"{tmp_path / 's.parquet'}:s", "--workers", "1", "--json"]
    done = CliRunner().invoke(main, [str(each) for each in command])
    assert done.exit_code == 0, done.output
    assert "list.txt: 1 repeated concept and 1 empty line left out" in done.stderr
    stay, _ = balanced(samples[120:], CONCEPTS, 9, 2)
    assert keys(tmp_path / "out") == stay and json.loads(done.stdout)["records"] == len(stay)
