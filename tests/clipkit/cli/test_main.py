"""The command's face: its options (frozen, so that none appears or goes unnoticed), exit codes, and one-line errors."""

import json

import pytest
from click.testing import CliRunner

from clipkit import __version__
from clipkit.cli.main import main

OPTIONS = {
    "add-captions": "path table --by --source --column --workers --engine --json",
    "bench-data": "data --image-size --recipe --set --tokenizer --split --cache --cache-gb --workers --seconds "
    "--need --json",
    "build-imagenet": "source out --name --split --labels --classes --subset --max-bad --allow-empty-classes --workers "
    "--engine --json",
    "build-tfds": "shards out --name --image-column --caption-column --captions --quoting --where --dedup --keep-best "
    "--by --balance --limit --seed --split --resize --quality --precompute --shuffle --shard-megabytes --in-place "
    "--workers --engine --json",
    "classify": "images --labels --ckpt --ema --tokenizer --templates --device --page --json",
    "compare": "runs --format --json",
    "demo": "--out --teacher",
    "doctor": "--json",
    "download": "urls out --preset --url-column --caption-column --keep --split --quoting --where --hash-column "
    "--hash-kind --drop-changed --image-size --resize-mode --quality --min-image-size --connections --per-host "
    "--timeout --deadline --max-megabytes --retries --resolver --allow-private-hosts --contact --robots-txt "
    "--format --name --samples-per-shard --probe --probe-floor --retry-failed --processes --engine --json",
    "embed": "data out --ckpt --split --label --ema --tokenizer --dtype --precision --batch-size --device --json",
    "export": "ckpt out --to --ema --json",
    "inspect": "path --split --sample --out --json",
    "plan": "--recipe --set --run --against --budget --page --devices --price --data --dataset --measure --json",
    "purge": "path --list --by --quoting --dry-run --workers --engine --json",
    "recipes": "name --set --json",
    "reinforce": "data --teacher --views --recipe --set --out --seed --split --cache --cache-gb --ema "
    "--precision --batch-size --device --json",
    "report": "runs --out",
    "score": "data --ckpt --out --split --ema --tokenizer --precision --batch-size --device --json",
    "search": "data query --image --ckpt --ema --tokenizer --top --split --label --batch-size --device --page --json",
    "sweep": "path --out --dry-run --devices --price --measure --engine --device --workers --json",
    "train": "--data --recipe --out --device --set --tokenizer --resume --allow-changes --init --from-stage --cooldown "
    "--log-to --overfit --reinforced --split --workers --cache --cache-gb --eval-data --eval-task --eval-train-data "
    "--eval-images --eval-label --eval-templates --eval-classes --eval-split --json",
    "verify": "path --decode --workers --engine --json",
    "zeroshot": "--ckpt --ema --tokenizer --data --suite --task --templates --label --classes --pooling --train-data "
    "--shots --images --split --allow-empty-classes --name --batch-size --precision --device --cache --cache-gb "
    "--no-cache --out --engine --format --json",
}


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def one_error_line(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


def test_the_options_are_these():
    assert set(main.commands) == set(OPTIONS)
    for name, command in main.commands.items():
        found = [parameter.opts[0] for parameter in command.params]
        assert " ".join(found) == OPTIONS[name], name


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_command_explains_itself(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert all(parameter.help for parameter in main.commands[name].params if parameter.opts[0].startswith("--"))


def test_the_version_is_told():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"clipkit, version {__version__}\n"


def test_recipes_are_listed_and_shown():
    listed = run("recipes")
    assert listed.exit_code == 0
    assert "clipa-b16-i50-t16: 63.2% ImageNet" in listed.output
    rows = json.loads(run("recipes", "--json").output)
    by_stage = {(row["recipe"], row["stage"]): (row["image_tokens"], row["text_tokens"]) for row in rows}
    assert by_stage["clipa-b16-i50-t16", "reduced"] == (50, 16)
    assert by_stage["clipa-l16-i17-t16", "reduced"] == (17, 16)
    assert by_stage["clipa-l16-i37-t8", "reduced"] == (37, 8)
    assert by_stage["clipa-l16-i37-t8", "full"] == (197, 32)
    assert by_stage["clip-b32", "full"] == (50, 77)
    shown = run("recipes", "debug", "--set", "stages.0.samples=1600")
    assert json.loads(shown.output)["stages"][0]["samples"] == 1600


def test_clipa_b16_is_the_published_recipe():
    recipe = json.loads(run("recipes", "clipa-b16-i50-t16").output)
    reduced, full = recipe["stages"]
    assert (reduced["image_size"], reduced["context_length"], reduced["batch_size"]) == (112, 16, 65_536)
    assert reduced["samples"] == pytest.approx(6 * 407_000_000, rel=1e-3)
    assert (reduced["learning_rate"], reduced["warmup_samples"]) == (2.048e-3, 782 * 65_536)
    assert (full["image_size"], full["batch_size"], full["samples"]) == (224, 8_192, 131_072_000)
    assert (full["learning_rate"], full["warmup_samples"]) == (2.56e-5, 3_072 * 8_192)
    assert [stage["augmentation"]["crop_area"] for stage in recipe["stages"]] == [[0.4, 1.0], [0.4, 1.0]]


EVALUATED = ["train", "--data", "DATASET", "--recipe", "debug", "--out", "run", "--eval-data", "HELDOUT"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--data", "none", "--recipe", "debug", "--out", "run"], "none doesn't exist"),
        (["train", "--data", ".", "--recipe", "debug", "--out", "run"], "dataset"),
        (["train", "--data", ".", "--recipe", "debgu", "--out", "run"], "unknown recipe 'debgu': did you mean debug?"),
        (["train", "--data", "DATASET", "--recipe", "debug", "--out", "run", "--set", "sede=1"], "did you mean seed"),
        (["train", "--data", "DATASET", "--recipe", "debug", "--out", "run", "--device", "npu"], "choose from auto"),
        (
            ["train", "--data", "DATASET", "--recipe", "debug", "--out", "run", "--set", "stages.0.samples=100"],
            "samples 100 is not a multiple of batch_size 16: set 96",
        ),
        (["train", "--data", "DATASET", "--recipe", "debug", "--out", "/proc/x"], "can't write /proc/x"),
        ([*EVALUATED, "--eval-label", "lable"], "(option --eval-label)"),
        ([*EVALUATED[:-2], "--eval-label", "lable"], "--eval-label is for --eval-data"),
        ([*EVALUATED[:-2], "--eval-task", "retrieval"], "--eval-task is for --eval-data"),
        ([*EVALUATED, "--eval-split", "test"], "--eval-split can't be heeded"),
        (["recipes", "nothing"], "unknown recipe 'nothing'"),
        (["zeroshot", "--ckpt", "none", "--data", "x.parquet"], "x.parquet doesn't exist"),
        (["zeroshot", "--ckpt", "none", "--data", "HELDOUT"], "checkpoint none doesn't exist"),
        (["zeroshot", "--ckpt", ".", "--data", "HELDOUT"], "no checkpoint in"),
        (["zeroshot", "--ckpt", ".", "--data", "HELDOUT", "--label", "lable"], "label"),
        (["zeroshot", "--ckpt", ".", "--data", "HELDOUT", "--templates", "openai-81"], "did you mean openai-80"),
        (
            ["zeroshot", "--ckpt", ".", "--data", "HELDOUT", "--task", "retrieval", "--pooling", "sum"],
            "--pooling can't",
        ),
        (["zeroshot", "--ckpt", ".", "--data", "HELDOUT", "--task", "choice", "--split", "test"], "--split can't be"),
        (["zeroshot", "--ckpt", ".", "--data", "HELDOUT", "--images", "."], "--images can't be heeded: a classif"),
        ([*EVALUATED, "--eval-task", "choice", "--eval-split", "a"], "choose --eval-task"),
        ([*EVALUATED, "--eval-task", "retrieval", "--eval-images", "a"], "--eval-images can't be heeded"),
        ([*EVALUATED, "--eval-task", "knn"], "own training images: give --eval-train-data"),
        ([*EVALUATED, "--eval-task", "knn", "--eval-train-data", "none"], "data none doesn't exist"),
        (["report", "none"], "none doesn't exist"),
        (["bench-data", "none"], "none doesn't exist"),
        (["bench-data", "DATASET", "--recipe", "debgu"], "unknown recipe 'debgu': did you mean debug?"),
        (["bench-data", "DATASET", "--set", "seed=1"], "name it with --recipe"),
        (["bench-data", "DATASET", "--recipe", "debug", "--set", "sed=1"], "sed"),
        (["download", "none.parquet", "out"], "none.parquet doesn't exist"),
        (["build-tfds", "none", "out", "--name", "x"], "shards none don't exist"),
        (["verify", "none"], "dataset none doesn't exist"),
        (["inspect", "none"], "dataset none doesn't exist"),
        (["purge", "none", "--list", "x.txt"], "dataset none doesn't exist"),
        (["build-tfds", "none", "--name", "x"], "build-tfds needs OUT"),
        (["build-tfds", "none", "--name", "x", "--in-place"], "none doesn't exist"),
        (["build-tfds", "none", "out", "--name", "x", "--in-place"], "OUT needs a copy: leave it or --in-place out"),
        (["build-tfds", ".", "--name", "x", "--in-place", "--shard-megabytes", "9"], "--shard-megabytes needs a copy"),
        (["build-imagenet", "none", "out"], "none isn't a folder"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, says, pairs_dataset, tmp_path, monkeypatch):
    from clipkit.embedded import emoji_parquet

    monkeypatch.chdir(tmp_path)
    real = {"DATASET": pairs_dataset, "HELDOUT": emoji_parquet("heldout")}
    result = run(*(real.get(each, each) for each in arguments))
    assert says in one_error_line(result)
    assert result.exit_code == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unknown_option_is_clicks_own_error():
    result = run("train", "--epochs", "3")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
