"""`clipkit plan` as a user meets it."""

import json
import resource
import subprocess
import sys

import pytest
from click.testing import CliRunner

from clipkit.cli.main import main
from clipkit.config import to_json
from clipkit.train.catalogue import debug, recipes

KEYS = {"hours", "device_hours", "money", "samples_per_s", "mfu", "accuracy"}


def plan(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def planned(*arguments):
    return json.loads(plan(*arguments, "--json"))


def test_it_answers_within_a_second_of_work_without_torch():
    code = (
        "import sys\nfrom clipkit.cli.main import main\n"
        "try: main(['plan', '--recipe', 'clipa-l16-i17-t16', '--json'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'cv2', 'pyarrow', 'scipy', 'timm'} & set(sys.modules), sys.modules\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", [name for name in recipes() if name not in ("debug", "emoji-demo", "emoji-dr")])
def test_every_recipe_has_a_plan(name):
    devices = "512xA100-80GB" if "h14" in name else "8xA100-80GB"
    values = planned("--recipe", name, "--devices", devices)
    for part in (values, *values["stages"]):
        assert set(part) >= KEYS
        assert 0 < part["mfu"] < 0.6
        assert 0 < part["accuracy"]["low"] < part["accuracy"]["value"] < part["accuracy"]["high"] < 1
    assert values["hours"] == pytest.approx(sum(stage["hours"] for stage in values["stages"]))
    assert values["device_hours"] == pytest.approx(values["hours"] * int(devices.split("x")[0]))
    assert set(values["stages"][0]["flops"]) == {"image", "text", "loss", "optimizer", "recomputation"}
    assert len(values["assumptions"]) >= 6


def test_a_recipe_with_teachers_says_what_they_cost_before():
    values = planned("--recipe", "clipa-b16-dr")
    assert values["teachers"]["disk_bytes"] == 12_800_000 * 11 * 1536
    assert 5 < values["teachers"]["seconds"] / 3600 < 9
    assert "teachers: clipkit reinforce of 10 views by two ViT-L/14 takes" in plan("--recipe", "clipa-b16-dr")
    assert "isn't priced" not in plan("--recipe", "clipa-b16-dr")
    assert "clipkit reinforce before the run isn't priced" in plan("--recipe", "emoji-dr", "--devices", "cpu")
    assert planned("--recipe", "clipa-b16-i50-t16")["teachers"] is None


def test_captions_of_several_sources_are_told_and_counted_with_the_teachers():
    weights = ("--set", "captions.original=1", "--set", "captions.synthetic=3", "--set", "captions.alt=0")
    values = planned("--recipe", "clipa-b16-dr", *weights)
    assert values["captions"] == {"original": 0.25, "synthetic": 0.75}
    assert values["teachers"]["disk_bytes"] == 12_800_000 * 12 * 1536
    assert "captions: 25% original, 75% synthetic" in plan("--recipe", "clipa-b16-dr", *weights)
    assert planned("--recipe", "clipa-b16-dr")["captions"] == {}


def test_the_text_has_what_the_json_has():
    text = plan("--recipe", "clipa-l16-i17-t16", "--price", 2)
    for said in (
        "ImageNet zero-shot 6",
        "micro-batch",
        "MB/s",
        "limited by",
        "checkpoints",
        "assumed: A100-80GB: 312",
    ):
        assert said in text


def test_price_and_settings_count():
    once, twice = (planned("--recipe", "clip-b16", "--price", price) for price in (1, 2))
    assert twice["money"] == pytest.approx(2 * once["money"]) == pytest.approx(2 * once["device_hours"])
    longer = planned(
        "--recipe", "clip-b16", "--set", "stages.0.samples=25600000000", "--set", "stages.0.batch_size=32000"
    )
    assert longer["hours"] > 1.9 * once["hours"]
    assert longer["accuracy"]["value"] > once["accuracy"]["value"] - 0.02


def test_data_where_training_takes_them(pairs_dataset, tmp_path):
    """A version's folder, the folder above it, as `build-tfds` was given it; and shards of a download."""
    for path in (pairs_dataset, pairs_dataset.parent, pairs_dataset.parents[1]):
        assert planned("--recipe", "debug", "--devices", "cpu", "--data", path)["data"]["pairs"] == 96
    (tmp_path / "clipkit").mkdir()
    (tmp_path / "clipkit" / "download.json").write_text('{"downloaded": 50, "image_bytes": 1000}')
    data = planned("--recipe", "debug", "--devices", "cpu", "--data", tmp_path)["data"]
    assert (data["pairs"], data["disk_bytes"]) == (50, 1000)


def test_a_users_recipe_file_and_data(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "clipa-b16-i50-t16"\n[stages.0]\nsamples = 655360000\n')
    folder = tmp_path / "pairs" / "1.0.0" / "clipkit"
    folder.mkdir(parents=True)
    split = {"shards": [{"file": "a", "records": 2_000_000, "bytes": 30_000_000_000, "crc32c": "0", "sources": []}]}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "splits": {"train": split}}))
    (folder.parent / "dataset_info.json").touch()
    values = planned("--recipe", tmp_path / "mine.toml", "--data", tmp_path / "pairs", "--dataset", "CC12M")
    assert values["data"]["pairs"] == 2_000_000
    assert values["data"]["disk_bytes"] == pytest.approx(3e10)
    assert "seen 393 times" in " ".join(values["accuracy"]["notes"])
    assert values["stages"][0]["data_mb_per_s"] == pytest.approx(values["stages"][0]["samples_per_s"] * 0.015)


def test_any_run_by_its_columns(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": "ViT-L-14", "dataset": "DataComp-1.4B", "samples_seen": 1.28e8}))
    values = planned("--run", path)
    assert set(values) >= KEYS
    assert values["accuracy"]["low"] < 0.518 < values["accuracy"]["high"]
    assert 0.1 < values["mfu"] < 0.6
    assert "ImageNet zero-shot 5" in plan("--run", path)
    path.write_text(json.dumps({"model": "ViTamin-L", "dataset": "DataComp-1B", "samples_seen": 1.28e10}))
    values = planned("--run", path)
    assert values["hours"] is None
    assert values["accuracy"]["value"] == pytest.approx(0.808, abs=0.02)


def test_what_a_run_costs_is_of_the_tokens_that_it_says(tmp_path):
    run = {"image_width": 1024, "image_depth": 24, "patch": 14, "text_width": 768, "text_depth": 12,
           "dataset": "DataComp-1B", "samples_seen": "1.28B"}  # fmt: skip
    path = tmp_path / "run.json"

    def stages(**columns):
        path.write_text(json.dumps({**run, **columns}))
        return planned("--run", path)

    by_tokens, by_px = stages(image_tokens=577), stages(image_px=336)
    assert by_tokens["stages"][0]["image_tokens"] == 577
    assert by_tokens["hours"] == pytest.approx(by_px["hours"])
    assert stages(image_tokens=65)["stages"][0]["image_tokens"] == 65  # masked
    both = stages(image_tokens=577, image_px=224)
    assert both["hours"] is None
    assert "577 image tokens are more than 224 px in patches of 14 make" in both["assumptions"][0]


def test_the_stages_of_a_run_add_up_to_the_samples_that_it_says(tmp_path):
    run = {"model": "ViT-L-14", "image_px": 84, "text_tokens": 8, "final_px": 224, "dataset": "DataComp-1B"}
    path = tmp_path / "run.json"

    def stages(**columns):
        path.write_text(json.dumps({**run, **columns}))
        return [(stage["samples"], stage["image_tokens"]) for stage in planned("--run", path)["stages"]]

    whole = stages(samples_seen=13.312e9, reduced_samples=12.8e9, full_samples=512e6)
    assert [tokens for _, tokens in whole] == [37, 257]
    assert sum(samples for samples, _ in whole) == pytest.approx(13.312e9, rel=1e-4)
    assert stages(samples_seen=13.312e9, reduced_samples=12.8e9) == whole
    assert stages(samples_seen=13.312e9, full_samples=512e6) == whole
    assert stages(reduced_samples=12.8e9, full_samples=512e6) == whole
    for more in ({"full_samples": 16e9}, {"reduced_samples": 12.8e9, "full_samples": 5e9}, {"reduced_samples": 2e10}):
        path.write_text(json.dumps({**run, "samples_seen": 13.312e9, **more}))
        output = plan("--run", path, code=2)
        assert "samples_seen is 13.3B" in output and len(output.strip().splitlines()) == 1


def test_a_run_with_a_rest_beside_its_patches_is_priced_without_it(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"model": "ViT-SO400M-14-SigLIP-384", "dataset": "WebLI (English)", "samples_seen": 4e10})
    )
    (stage,) = planned("--run", path)["stages"]
    assert stage["image_tokens"] in (729, 730)
    own = [f"model.image.{each}" for each in ("name=vit_so400m_patch14_siglip_384", "patch_size=none", "width=none")]
    settings = [part for each in (*own, "stages.0.image_size=384") for part in ("--set", each)]
    assert planned("--recipe", "siglip-b16", *settings)["stages"][0]["image_tokens"] == 729


def test_a_run_beside_its_plan(tmp_path):
    recipe = to_json(debug())
    device = {"kind": "cuda", "hardware": "NVIDIA A100-SXM4-80GB", "devices": 8, "arithmetic": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({"recipe": recipe, "device": device}))
    lines = [{"samples_seen": seen, "stage": "reduced", "samples_per_s": 50.0, "seconds": 1.0} for seen in (16, 32, 48)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = planned("--against", tmp_path)["against"]
    assert (row["stage"], row["samples_per_s"]) == ("reduced", 50.0)
    assert row["ratio"] == pytest.approx(50.0 / row["planned_samples_per_s"])
    assert "planned samples/s" in plan("--against", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--recipe", "clipa-b17"], "did you mean clip-b16"),
        ([], "plan takes one of"),
        (["--recipe", "debug", "--budget", "5"], "plan takes one of"),
        (["--run", "."], ". is a folder: --run takes"),
     (["--recipe", "clip-b32", "--devices", ""], "write it as NUMBERxNAME"),
     (["--recipe", "clip-b32", "--set", "stages.0.image_size=100"], "100 isn't a multiple of the patch size 32"),
     (["--recipe", "clip-b32", "--set", "stages.0.image_size=8"], "take 32"),
     (["--recipe", "clip-b32", "--set", "stages.0.image_keep=500"], "can't keep 500 of 49 patches"),
     (["--recipe", "clip-b32", "--devices", "8xA101"], "unknown device 'A101': did you mean"),
     (["--recipe", "clip-b32", "--devices", "7xH200"], "can't be divided over 7 devices"),
     (["--recipe", "clip-b32", "--set", "model.text.depth=0"], "model.text.depth is 0"),
     (["--recipe", "clip-b32", "--set", "model.image.name=convnext_base"], "vision transformers only"),
     (["--recipe", "clip-b32", "--data", "nowhere"], "no dataset"), (["--against", "nowhere"], "no config.json"),
     (["--recipe", "clipa-h14-datacomp", "--devices", "2xRTX-4090"], "not one pair fits"),
     (["--run", "nowhere.json"], "doesn't exist"),
     (["--run", "run.json", "--dataset", "LAION-400M"], "--dataset doesn't go with --run"),
     (["--run", "run.json", "--set", "seed=1"], "--set doesn't go with --run"),
     (["--run", "run.json", "--data", "pairs"], "--data doesn't go with --run"),
     (["--against", "run", "--price", "3"], "--price doesn't go with --against"),
     (["--against", "run", "--devices", "8xH200"], "--devices doesn't go with --against"),
     (["--budget", "5", "--data", "pairs"], "--data doesn't go with --budget"),
     (["--budget", "5", "--set", "seed=1"], "--set doesn't go with --budget")],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(arguments, said):
    output = plan(*arguments, code=2)
    assert said in output
    assert len(output.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def bought(tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "budget.html"
    return planned("--budget", 500, "--devices", "8xH100-SXM", "--page", page)["choices"], page.read_text()


def test_what_a_budget_buys_comes_with_those_that_no_cheaper_one_beats(bought):
    rows, page = bought
    assert max(row["money"] for row in rows) == pytest.approx(500, rel=0.01)
    front = [row for row in rows if row["is_best"]]
    values = [row["accuracy"]["value"] for row in front]
    assert values == sorted(values)
    assert values[-1] == max(row["accuracy"]["value"] for row in rows) > 0.6
    for row in rows:
        beaten = [each["accuracy"]["value"] for each in rows if each["money"] < row["money"] - 1]
        assert row["is_best"] <= (row["accuracy"]["value"] > max(beaten, default=0))
    assert front[-1]["recipe"] in page
    assert "<polyline" in page


def test_a_budget_pays_for_teachers_before_the_run():
    """`clipkit reinforce` of DataCompDR-12M costs more than the recipe's own length."""
    values = planned("--recipe", "clipa-b16-dr", "--devices", "8xH100-SXM")
    price = values["money"] / values["hours"]
    before = price * values["teachers"]["seconds"] / 3600
    assert before > values["money"]
    assert not [
        row for row in planned("--budget", before, "--devices", "8xH100-SXM")["choices"] if "-dr" in row["recipe"]
    ]
    budget = before + values["money"]
    rows = planned("--budget", budget, "--devices", "8xH100-SXM")["choices"]
    longest = max((row for row in rows if "-dr" in row["recipe"]), key=lambda row: row["samples"])
    assert longest["money"] == pytest.approx(budget, rel=0.01) == pytest.approx(price * longest["hours"], rel=0.01)
    assert longest["samples"] == pytest.approx(sum(stage["samples"] for stage in values["stages"]), rel=0.01)
    unknown = planned("--budget", budget, "--devices", "8xH100-SXM", "--dataset", "gadgets")["choices"]
    assert unknown and not [row for row in unknown if "-dr" in row["recipe"]]


def test_a_budget_too_small_and_a_page_without_a_budget_are_one_line():
    output = plan("--budget", 0.01, "--devices", "8xH100-SXM", code=2)
    assert "pays for no recipe on 8xH100-SXM: the least is" in output
    assert len(output.strip().splitlines()) == 1
    assert "needs a price" in plan("--budget", 5, "--devices", "cpu", code=2)
    assert "give --budget" in plan("--recipe", "clip-b32", "--page", "x.html", code=2)


@pytest.mark.parametrize("money", [["--recipe", "clip-b32", "--price"], ["--budget"]])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_money_is_finite(money, value):
    assert f"{value} isn't finite" in plan(*money, value, code=2)


def test_what_a_budget_buys_as_text():
    text = plan("--budget", 500, "--devices", "8xH100-SXM", "--dataset", "LAION-400M")
    assert "nothing as cheap" in text
    assert "DataComp" not in text
