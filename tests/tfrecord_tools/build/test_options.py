"""What `build-tfds` does to samples on request, and that TFDS reads what comes of it."""

import errno
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from image_shards import pair, picture, write_tar, write_tars
from natural_images import encoded, natural
from PIL import Image
from tensorflow_process import with_tensorflow

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.manifest import read_manifest
from clipkit.jobs.passes import PassProgress
from clipkit.storage.files import write_beside
from clipkit.text.syntax import Syntax
from clipkit.text.tokenizer import Tokenizer
from clipkit.tfrecord_tools.build import command
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.pictures.compact import compact

SMALL = 0.02  # megabytes


def build(tmp_path, out="out", **options):
    options = {"shard_megabytes": SMALL, "progress": lambda _: None, **options}
    return build_tfds(tmp_path / "shards", tmp_path / out, "pairs", **options)


def examples(path, split="train"):
    dataset = open_dataset(path, split)
    return [dataset.example(i) for i in range(len(dataset))]


def keys(path):
    return [int(example["key"]) for example in examples(path)]


def test_where_takes_the_samples_whose_columns_fulfil_it(tmp_path):
    values = [0.1, 0.5, None, 0.9, 0.31]
    write_tar(
        tmp_path / "shards" / "0.tar",
        [pair(i, json={"similarity": value, "NSFW": "UNLIKELY"}) for i, value in enumerate(values)],
    )
    write_tar(
        tmp_path / "shards" / "1.tar",
        [
            pair(5, json={"similarity": 1, "NSFW": "NSFW"}),
            pair(6, json={"similarity": 1, "NSFW": "UNLIKELY"}),
            pair(7, json={"similarity": 1, "NSFW": "UNLIKELY"}, jpg=None),
            pair(8, json={"similarity": 0, "NSFW": "UNLIKELY"}, jpg=b"<html>"),
        ],
    )
    summary = build(tmp_path, where="similarity > 0.3 AND nsfw = 'UNLIKELY'")
    assert keys(tmp_path / "out") == [1, 3, 4, 6]
    assert summary.skipped == {"no-image": 1, "where": 4}
    assert summary.samples == 9
    # What wasn't wanted is counted and not listed, for it may be most of the data.
    lines = (summary.path / "clipkit" / "skipped-train.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000000007"]
    assert read_manifest(summary.path)["train"].options == {"where": "similarity > 0.3 AND nsfw = 'UNLIKELY'"}


def test_where_knows_the_caption_and_kinds_that_widen_later(tmp_path):
    # Behind those that are looked at before the build begins.
    values = [1, *[None] * 39, 2.5, "7", "x", None]
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, json={"n": n}) for i, n in enumerate(values)])
    build(tmp_path, where="try_cast(n AS DOUBLE) > 2 OR txt = 'picture number 3'", shard_megabytes=100)
    assert keys(tmp_path / "out") == [3, 40, 41]


@pytest.mark.parametrize("later", ["n/a", ["7"], 10**20])
def test_numbers_that_stand_beside_text_are_not_compared_as_text(tmp_path, later):
    """As text, 9 is more than 10, and the samples before were compared as numbers."""
    values = [1, *[10] * 40, later]
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, json={"n": n, "most": 9}) for i, n in enumerate(values)])
    with pytest.raises(UserError) as error:
        build(tmp_path, where="n > '9'", shard_megabytes=100)
    assert str(error.value) == (
        "--where \"n > '9'\": column 'n' holds text in some samples and int in others: "
        "write TRY_CAST(n AS DOUBLE) or CAST(n AS VARCHAR)"
    )
    build(tmp_path, where="TRY_CAST(n AS DOUBLE) BETWEEN 10 AND 99", shard_megabytes=100)
    assert keys(tmp_path / "out") == list(range(1, 41))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("similarty > 1", "names column 'similarty'; the table has"),
        ("similarity >", "isn't SQL that can be read"),
        ("width", "isn't a condition"),
    ],
)
def test_a_condition_that_cannot_be_asked_is_refused_before_anything_is_written(tmp_path, where, message):
    write_tars(tmp_path / "shards", [2])
    with pytest.raises(UserError, match=message):
        build(tmp_path, where=where)
    assert not list((tmp_path / "out").rglob("*.tfrecord*"))


def test_small_copies_have_their_sizes_in_the_columns(tmp_path):
    images = [
        encoded(natural(90, 120)),
        encoded(natural(120, 90), "PNG"),
        encoded(natural(40, 50)),
        encoded(natural(80, 80), "WEBP"),
        encoded(natural(99, 77))[:300],
    ]
    sizes = {"width": 120, "height": 90, "original_width": 1200, "original_height": 900}
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, jpg=image, json=sizes) for i, image in enumerate(images)])
    summary = build(tmp_path, resize=48, quality=80)
    found = examples(tmp_path / "out")
    assert [(e["width"], e["height"]) for e in found] == [(64, 48), (48, 64), (50, 40), (48, 48)]
    assert {(e["original_width"], e["original_height"]) for e in found} == {(1200, 900)}
    for example, image in zip(found, images, strict=False):
        assert example["jpg"] == compact(image, 48, 80).jpg
        assert Image.open(io.BytesIO(example["jpg"])).size == (example["width"], example["height"])
    assert found[2]["jpg"] == images[2]
    assert (summary.skipped, summary.formats) == ({"truncated": 1}, {"jpeg": 4})
    with pytest.raises(UserError, match="--resize 0"):
        build(tmp_path, "other", resize=0)
    with pytest.raises(UserError, match="--quality 101"):
        build(tmp_path, "other", resize=9, quality=101)


def test_shards_have_the_size_that_was_asked_for_whatever_is_left_of_the_samples(tmp_path):
    images = [encoded(natural(128, 128, seed), quality=95) for seed in range(8)]
    for shard in range(4):
        numbers = range(shard * 30, shard * 30 + 30)
        write_tar(
            tmp_path / "shards" / f"{shard}.tar", [pair(i, jpg=images[i % 8], json={"n": i % 3}) for i in numbers]
        )
    means = []
    for out, options in [("plain", {}), ("small", {"resize": 32}), ("some", {"where": "n = 1"})]:
        summary = build(tmp_path, out, shard_megabytes=0.04, **options)
        sizes = np.array([shard.bytes for shard in read_manifest(summary.path)["train"].shards])
        assert len(sizes) > 1
        assert np.abs(sizes / sizes.mean() - 1).max() < 0.4, (out, sizes)
        means.append(sizes.mean())
    assert np.abs(np.array(means) / means[0] - 1).max() < 0.4, means


def test_tokens_and_syntax_are_what_the_tokenizer_and_the_tagger_give(tmp_path):
    captions = ["a photo of a small cat", "Running &amp; jumping", "\u732b", "x" * 500]
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, txt=text, json=None) for i, text in enumerate(captions)])
    build(tmp_path, precompute=["syntax", "tokens"])
    found = examples(tmp_path / "out")
    ids = Tokenizer().encode(captions)
    assert [example["clipkit_tokens"] for example in found] == ids
    assert [example["clipkit_syntax"] for example in found] == Syntax(Tokenizer()).priorities(ids)
    assert read_manifest(tmp_path / "out" / "pairs" / "1.0.0")["train"].options == {"precompute": ["tokens", "syntax"]}
    features = open_dataset(tmp_path / "out").features
    assert features["clipkit_tokens"] == features["clipkit_syntax"] == Feature("int", is_list=True)
    with pytest.raises(UserError, match="can't precompute 'words': choose among tokens, syntax"):
        build(tmp_path, "other", precompute=["words"])


def test_a_dataset_of_a_dataset_has_the_same_records(tmp_path):
    columns = [{"x": 0.1, "n": None, "flag": True, "list": [1, 2]}, {"n": 3, "text": "", "flag": False, "list": []}]
    write_tar(tmp_path / "shards" / "0.tar", [pair(i, json=extra) for i, extra in enumerate(columns)])
    write_tar(tmp_path / "shards" / "1.tar", [pair(2, jpg=picture(2, "PNG"))])
    first = build(tmp_path, "first", precompute=["tokens"])
    again = build_tfds(tmp_path / "first", tmp_path / "again", "pairs", progress=lambda _: None)
    one, two = open_dataset(first.path), open_dataset(again.path)
    assert [one.read(i) for i in range(len(one))] == [two.read(i) for i in range(len(two))]
    assert one.features == two.features
    part = build_tfds(tmp_path / "first", tmp_path / "part", "pairs", where="n = 3", progress=lambda _: None)
    assert keys(part.path) == [1]


def test_changed_options_are_not_taken_for_the_same_build(tmp_path, monkeypatch):
    write_tars(tmp_path / "shards", [3, 3])
    build(tmp_path, where="width > 0")
    assert not build(tmp_path, where="width > 0").built
    with pytest.raises(UserError, match="already holds a split 'train' made with other options"):
        build(tmp_path, where="width > 1")
    with pytest.raises(UserError, match="already holds a split 'train' made with other options"):
        build(tmp_path)
    shutil.rmtree(tmp_path / "out")
    build(tmp_path)
    assert not build(tmp_path).built
    with pytest.raises(UserError, match="already holds a split 'train' made with other options"):
        build(tmp_path, where="width > 0")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(
        "clipkit.tfrecord_tools.writing.finish.write_manifest", lambda *_: os.kill(os.getpid(), 0) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        build(tmp_path, dedup="sha256")
    with pytest.raises(UserError, match="begun with other options or another shard size: remove that folder"):
        build(tmp_path, dedup="caption")
    with pytest.raises(UserError, match="begun with other options or another shard size"):
        build(tmp_path, dedup="sha256", shard_megabytes=2 * SMALL)


def test_passes_are_told_by_name(tmp_path):
    write_tars(tmp_path / "shards", [6, 6])
    seen: list[PassProgress] = []
    build(tmp_path, dedup="caption", shuffle=1, progress=seen.append, shard_megabytes=SMALL / 4)
    hashing, comparing, writing, sorting, gathering = dict.fromkeys(now.label for now in seen)
    assert (comparing, sorting) == ("build-tfds, comparing", "build-tfds, sorting")
    for label in (hashing, writing, gathering):
        last = [now for now in seen if now.label == label][-1]
        assert last.in_bytes and last.done == last.total > 0
        assert last.jobs_done == last.jobs_total > 1
        assert last.counts["records"] == 12


def test_the_disk_that_a_shuffle_takes_is_told_before(tmp_path, capsys):
    write_tars(tmp_path / "shards", [2])
    build_tfds(tmp_path / "shards", tmp_path / "out", "pairs", shuffle=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" · ")[2] for line in lines[1:]] == (
        ["1/1 shard, 2 records", lines[2].rpartition(" · ")[2], "1/1 shard, 2 records"]
    )
    assert re.match(r"build-tfds: ([1-9]\d*)/\1 kB · ", lines[1])
    assert lines[2].startswith("build-tfds, sorting: 1/1 shards · ")
    assert re.match(r"build-tfds: uses about \d+\.\d kB of disk besides the output, in ", lines[0])
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "build-tfds",
        "build-tfds, sorting",
        "build-tfds, gathering",
    ]


@pytest.mark.parametrize("pass_", ["hashing", "writing", "sorting", "gathering"])
def test_a_full_disk_in_any_pass_is_one_line_and_the_rest_goes_on(tmp_path, monkeypatch, pass_):
    write_tars(tmp_path / "shards", [6, 6])
    options = {"dedup": "caption", "shuffle": 3}
    build(tmp_path, "expected", **options)
    targets = {
        "hashing": ("clipkit.tfrecord_tools.build.dedup.write_sorted", _full_beside),
        "writing": ("clipkit.tfrecord_tools.writing.pair_writer.RecordWriter.write", _full),
        "sorting": ("clipkit.tfrecord_tools.build.shuffle.write_sorted", _full_beside),
        "gathering": ("clipkit.tfrecord_tools.build.shuffle.unframe", _full),
    }
    done: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(*targets[pass_])
        with pytest.raises(UserError) as caught:
            build(tmp_path, progress=lambda now: done.append(now.label), **options)
    assert done[-1] == ("build-tfds" if pass_ == "writing" else f"build-tfds, {pass_}")
    assert "disk is full" in str(caught.value)
    assert not (tmp_path / "out" / "pairs" / "1.0.0" / "dataset_info.json").exists()
    build(tmp_path, **options)
    for path in (tmp_path / "expected").rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_beside(path, _):
    with write_beside(path):
        _full()


def test_an_output_that_cannot_be_written_is_one_line_with_exit_code_2(tmp_path):
    write_tars(tmp_path / "shards", [1])
    result = CliRunner().invoke(main, ["build-tfds", str(tmp_path / "shards"), "/proc/x", "--name", "pairs"])
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: can't write /proc/x")


READ_WITH_TFDS = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])

def plain(value):
    value = value.numpy() if hasattr(value, "numpy") else value
    return value.decode() if isinstance(value, bytes) else value.tolist()

result = {}
for split, info in builder.info.splits.items():
    dataset = builder.as_dataset(split=split, read_config=tfds.ReadConfig(interleave_cycle_length=1))
    read = list(dataset)
    assert len(read) == info.num_examples == sum(info.shard_lengths)
    result[split] = {
        "types": {name: [str(spec.dtype.name), len(spec.shape)] for name, spec in dataset.element_spec.items()},
        "rows": [
            [plain(e["key"]), plain(e["clipkit_tokens"]), plain(e["clipkit_syntax"]), e["jpg"].shape[0]] for e in read
        ],
    }
"""


def test_tfds_reads_all_that_options_make(tmp_path):
    images = [encoded(natural(60, 80, seed)) for seed in range(4)]
    for shard in range(3):
        samples = [pair(10 * shard + i, jpg=images[i % 4], json={"n": i}) for i in range(10)]
        write_tar(tmp_path / "shards" / f"{shard}.tar", samples)
    summary = build(
        tmp_path,
        where="n < 9",
        dedup="caption",
        resize=30,
        shuffle=2,
        split="train=0.8,test=0.2",
        precompute=["tokens", "syntax"],
    )
    read = with_tensorflow(READ_WITH_TFDS, summary.path)
    assert sum(len(part["rows"]) for part in read.values()) == 27
    tokenizer, syntax = Tokenizer(), Syntax(Tokenizer())
    for split, part in read.items():
        assert part["types"]["clipkit_tokens"] == part["types"]["clipkit_syntax"] == ["int64", 1]
        assert part["types"]["width"] == part["types"]["n"] == ["int64", 0]
        expected = []
        for example in examples(summary.path, split):
            ids = tokenizer.encode([example["txt"]])
            expected.append([example["key"], ids[0], syntax.priorities(ids)[0], 30])
        assert part["rows"] == expected
    assert np.mean([len(row[1]) for row in read["train"]["rows"]]) > 2


def test_tfds_reads_what_comes_of_a_folder_of_images(tmp_path):
    (tmp_path / "shards").mkdir()
    for i in range(3):
        (tmp_path / "shards" / f"{i}.png").write_bytes(picture(i, "PNG", 30))
    (tmp_path / "shards" / "metadata.csv").write_text(
        "file_name,text,n\n0.png,a,1\n1.png,b,\n2.png,c,3\ngone.png,d,4\n"
    )
    summary = build(tmp_path, precompute=["tokens", "syntax"])
    assert summary.skipped == {"no-image": 1}
    read = with_tensorflow(READ_WITH_TFDS, summary.path)["train"]
    assert [row[0] for row in read["rows"]] == ["0.png", "1.png", "2.png"]
    assert read["types"]["n"] == ["int64", 0]
    assert [example["n"] for example in examples(summary.path)] == [1, None, 3]


def test_captions_that_were_mended_in_a_folders_table_are_not_taken_for_the_old_ones(tmp_path, monkeypatch):
    """The images keep their size, the table perhaps too."""

    def write(word):
        (tmp_path / "shards").mkdir(exist_ok=True)
        for i in range(3):
            (tmp_path / "shards" / f"{i}.png").write_bytes(picture(i, "PNG", 30))
        rows = "".join(f"{i}.png,{word} {i}\n" for i in range(3))
        (tmp_path / "shards" / "metadata.csv").write_text(f"file_name,text\n{rows}")

    def kill(*_, **__):
        raise KeyboardInterrupt

    write("cat")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(command, "finish_dataset", kill)
        build(tmp_path)
    write("dog")
    summary = build(tmp_path)
    assert [example["txt"] for example in examples(summary.path)] == ["dog 0", "dog 1", "dog 2"]
    assert not build(tmp_path).built
    write("cow")
    with pytest.raises(UserError, match="already holds a split 'train' made from other shards"):
        build(tmp_path)
    # An older clipkit didn't keep the table's hash.
    manifest = summary.path / "clipkit" / "manifest.json"
    manifest.write_text(re.sub(r'"table_sha256": "\w+"', "", manifest.read_text()))
    assert not build(tmp_path).built


def test_the_command_takes_every_option(tmp_path):
    write_tars(tmp_path / "shards", [4])
    arguments = "--where 'width > 1' --dedup caption --split a=0.5,b=0.5 --resize 8 --quality 70 --precompute tokens"
    arguments = [each.strip("'") for each in arguments.replace("'width > 1'", "'width~>~1'").split()]
    arguments = [each.replace("~", " ") for each in arguments]
    command = ["build-tfds", str(tmp_path / "shards"), str(tmp_path / "out"), "--name", "pairs", "--shuffle", "3"]
    result = CliRunner().invoke(main, [*command, *arguments, "--shard-megabytes", "1", "--workers", "1", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["records"], sum(told["by_split"].values())) == (4, 4)
    assert read_manifest(tmp_path / "out" / "pairs" / "1.0.0")["a"].options == {
        "where": "width > 1",
        "dedup": "caption",
        "shares": [["a", 0.5], ["b", 0.5]],
        "resize": 8,
        "quality": 70,
        "precompute": ["tokens"],
        "shuffle": 3,
    }
