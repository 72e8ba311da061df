"""`clipkit reinforce` and a run that learns from what it stored: kills, ranks, and what can be wrong with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from ranks import command, run_ranks
from safetensors.torch import load_file
from small_encoder import SMALL, small_encoder, small_run

import clipkit.train.teachers.reinforce as module
from clipkit import checkpoint
from clipkit.cli.main import main
from clipkit.cli.search import open_pictures
from clipkit.errors import UserError
from clipkit.eval.search.embed import embed
from clipkit.log import read_metrics
from clipkit.model.clip import build
from clipkit.train import loop
from clipkit.train.catalogue import clipa_b16_i50_t16, debug, find_recipe
from clipkit.train.loop import train
from clipkit.train.recipes import Distill
from clipkit.train.teachers.reinforce import reinforce
from clipkit.train.teachers.stored import read_stored

RECIPE = replace(debug(), distill=Distill(weight=0.75))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def stored(pairs_dataset, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    summary = reinforce(pairs_dataset, folder, [str(teacher)], RECIPE, views=3, part_records=40, device="cpu")
    assert (summary.records, summary.unreadable, summary.views, summary.teachers) == (96, 0, 3, 1)
    assert summary.bytes == pytest.approx(96 * (3 + 1) * 32, rel=0.15)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


class KilledError(Exception):
    """Stands for SIGKILL."""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(pairs_dataset, teacher, stored, tmp_path, monkeypatch):
    real, made = module.make_part, []

    def killed(*arguments):
        made.append(None)
        if len(made) in (1, 3):
            raise KilledError
        return real(*arguments)

    monkeypatch.setattr(module, "make_part", killed)
    again = {"views": 3, "part_records": 40, "device": "cpu", "batch_size": 256}
    for _ in range(2):
        with pytest.raises(KilledError):
            reinforce(pairs_dataset, tmp_path, [str(teacher)], RECIPE, **again)
    with pytest.raises(UserError, match="lacks 2 of 3 parts"):
        train(RECIPE, pairs_dataset, tmp_path / "run", device_name="cpu", reinforced=tmp_path)
    reinforce(pairs_dataset, tmp_path, [str(teacher)], RECIPE, **again)
    assert len(made) == 5
    assert files(tmp_path) == files(stored)


def test_ranks_share_the_parts(pairs_dataset, teacher, tmp_path):
    out = ["--out", str(tmp_path), "--views", "1", "--device", "cpu", "--recipe", "debug", "--json"]
    printed = run_ranks(command, "reinforce", str(pairs_dataset), "--teacher", str(teacher), *out)
    assert json.loads(printed[0])["records"] == 96
    assert set(files(tmp_path)) == {"reinforced.json", "000000.npy"}


@pytest.fixture(scope="module")
def unbroken(pairs_dataset, stored, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    assert train(RECIPE, pairs_dataset, run, device_name="cpu", workers=1, reinforced=stored).finished
    return run


def weights(run):
    return load_file(checkpoint.find(run) / "model.safetensors")


def test_a_run_learns_and_goes_on_to_the_same_weights(unbroken, pairs_dataset, stored, tmp_path, monkeypatch):
    losses = [line["loss"] for line in read_metrics(unbroken)]
    assert losses[-1] < losses[0]
    real, taken = loop.train_step, []

    def killing(*arguments):
        if len(taken) == 13:
            raise KilledError
        taken.append(None)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(KilledError):
        train(RECIPE, pairs_dataset, tmp_path, device_name="cpu", workers=1, reinforced=stored)
    monkeypatch.setattr(loop, "train_step", real)
    train(RECIPE, pairs_dataset, tmp_path, device_name="cpu", resume=True, workers=0, reinforced=stored)
    ours, theirs = weights(tmp_path), weights(unbroken)
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert [line["loss"] for line in read_metrics(tmp_path)] == losses


def test_two_ranks_and_micro_batches_train_alike(unbroken, pairs_dataset, stored, tmp_path):
    settings = ["--device", "cpu", "--recipe", "debug", "--set", "distill.weight=0.75", "--reinforced", str(stored)]
    run_ranks(command, "train", "--data", str(pairs_dataset), "--out", str(tmp_path / "ranks"), *settings)
    train(
        replace(RECIPE, micro_batch=4),
        pairs_dataset,
        tmp_path / "micro",
        device_name="cpu",
        workers=0,
        reinforced=stored,
    )
    expected = [line["loss"] for line in read_metrics(unbroken)]
    for name in ("ranks", "micro"):
        assert [line["loss"] for line in read_metrics(tmp_path / name)] == pytest.approx(expected, rel=2e-3), name


def test_weight_0_is_the_run_without_teachers_and_weight_1_has_another_loss(pairs_dataset, stored, tmp_path):
    first = {}
    for name, weight in (("plain", 0.0), ("half", 0.5), ("whole", 1.0)):
        recipe = replace(
            RECIPE, distill=Distill(weight), stages=(replace(RECIPE.stages[0], samples=16, warmup_samples=0),)
        )
        where = {"reinforced": stored} if weight else {}
        train(recipe, pairs_dataset, tmp_path / name, device_name="cpu", workers=0, **where)
        first[name] = read_metrics(tmp_path / name)[0]["loss"]
    # Other views are drawn without teachers, so the contrastive part is only about the same.
    assert first["half"] == pytest.approx((first["plain"] + first["whole"]) / 2, rel=0.02)
    assert first["whole"] < first["plain"] / 2


def test_a_reference_model_shifts_the_global_loss(pairs_dataset, stored, tmp_path):
    """Also in micro-batches, and without a share of the distillation."""
    stage = replace(RECIPE.stages[0], samples=16, warmup_samples=0)
    plain = replace(RECIPE, distill=Distill(), loss="global_contrastive", stages=(stage,))
    recipe = replace(plain, global_contrastive=replace(plain.global_contrastive, reference=True))
    first = {}
    for name, each in (("plain", plain), ("whole", recipe), ("micro", replace(recipe, micro_batch=4))):
        where = {"reinforced": stored} if each.has_teachers else {}
        train(each, pairs_dataset, tmp_path / name, device_name="cpu", workers=0, **where)
        first[name] = read_metrics(tmp_path / name)[0]["loss"]
    assert first["micro"] == pytest.approx(first["whole"], rel=1e-5)
    assert abs(first["whole"] - first["plain"]) > 0.01


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"views": 4}, "has other embeddings (views: 3 -> 4): choose another --out"),
        ({"wide": True}, "has other embeddings (teachers.0.weights: "),
        ({"data": "other"}, "has other embeddings (data.name: colours -> other"),
    ],
)
def test_a_folder_of_other_embeddings_is_refused(change, says, pairs_dataset, teacher, stored, tmp_path, monkeypatch):
    if "data" in change:
        monkeypatch.setattr(module, "open_source", lambda *_, **__: other_data(pairs_dataset))
    if "wide" in change:
        wide = {"width": 64, "weights": "0"}
        monkeypatch.setattr(module, "describe", lambda *given: replace(REAL_DESCRIBE(*given), **wide))
    with pytest.raises(UserError) as raised:
        how = {"views": change.get("views", 3), "part_records": 40, "device": "cpu"}
        reinforce(pairs_dataset, stored, [str(teacher)], RECIPE, **how)
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_teacher_with_another_activation_does_not_go_on(pairs_dataset, teacher, stored, tmp_path, monkeypatch):
    """Its weights are the same, and half of the parts would be of each."""
    config = replace(SMALL, text=replace(SMALL.text, act="quick_gelu"))
    monkeypatch.setattr(module, "load", lambda *_, **__: replace(small_encoder(), model=build(config, seed=1).eval()))
    how = {"views": 3, "part_records": 40, "device": "cpu"}
    with pytest.raises(UserError, match=r"has other embeddings \(teachers\.0: text tower, act: gelu -> quick_gelu\): "):
        reinforce(pairs_dataset, stored, [str(teacher)], RECIPE, **how)
    # A folder of an older clipkit doesn't say.
    manifest = json.loads((stored / "reinforced.json").read_text())
    for each in manifest["teachers"]:
        del each["towers"]
    old = shutil.copytree(stored, tmp_path / "old")
    (old / "reinforced.json").write_text(json.dumps(manifest))
    assert reinforce(pairs_dataset, old, [str(teacher)], RECIPE, **how).records == 96
    assert read_stored(old).digest() != read_stored(stored).digest()


REAL_DESCRIBE, REAL_OPEN = module.describe, module.open_source


def other_data(path):
    found = REAL_OPEN(path)
    (part,) = found.parts
    return replace(found, parts=(replace(part, identity={**part.identity, "name": "other"}),))


def failure(*arguments):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_what_can_be_wrong_with_a_run_is_one_line(pairs_dataset, stored, teacher, tmp_path):
    run = ["train", "--data", pairs_dataset, "--recipe", "debug", "--out", tmp_path / "run", "--device", "cpu"]
    distil = ["--set", "distill.weight=0.5"]
    reference = ["--set", "loss=global_contrastive", "--set", "global_contrastive.reference=true"]
    said = [
        (distil, "1.0.0.reinforced has no reinforced.json: make it with clipkit reinforce"),
        (["--reinforced", stored], "is for recipes that distill: set distill.weight above 0"),
        ([*distil, "--data", pairs_dataset], "is for one --data, not for a mixture"),
        ([*distil, "--reinforced", stored, "--set", "stages.1.augmentation.flip=0"], "stage full's (flip: 0.5 -> 0.0)"),
        ([*distil, "--set", "loss=sigmoid"], "goes with loss=info_nce"),
        ([*reference, "--data", pairs_dataset], "global_contrastive.reference is for one --data, not for a mixture"),
        (reference[2:], "loss=info_nce doesn't use global_contrastive"),
        (["--set", "distill.weight=2", "--reinforced", stored], "distill.weight is 2.0: set a number from 0 to 1"),
    ]
    for options, says in said:
        assert says in failure(*run, *options), options
    small = tmp_path / "small"
    manifest = json.loads((stored / "reinforced.json").read_text())
    small.mkdir()
    for path in stored.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    (small / "reinforced.json").write_text(json.dumps({**manifest, "data": {**manifest["data"], "records": 97}}))
    assert "embeddings of other data (records: 97 -> 96)" in failure(*run, *distil, "--reinforced", small)
    uneven = ["--recipe", "debug", "--set", "stages.1.augmentation.flip=0"]
    said = failure("reinforce", pairs_dataset, "--teacher", teacher, "--out", tmp_path / "x", *uneven)
    assert "stage full has another augmentation than reduced (flip: 0.5 -> 0.0)" in said


def test_vectors_have_no_views(teacher, pairs_dataset, tmp_path):
    vectors = tmp_path / "vectors.parquet"
    embed(open_pictures(str(pairs_dataset), None, None), vectors, str(teacher), device="cpu")
    said = failure("reinforce", vectors, "--teacher", teacher, "--recipe", "debug", "--out", tmp_path / "x")
    assert "vectors.parquet has stored vectors and no images: give the data that clipkit embed was given" in said
    assert not (tmp_path / "x").exists()


def test_other_embeddings_are_not_resumed_with(unbroken, pairs_dataset, teacher, tmp_path):
    reinforce(pairs_dataset, tmp_path, [str(teacher)], RECIPE, views=1, device="cpu")
    with pytest.raises(UserError, match="trained on another dataset"):
        train(RECIPE, pairs_dataset, unbroken, device_name="cpu", resume=True, reinforced=tmp_path)


def test_the_recipes_with_teachers():
    small, large = find_recipe("emoji-dr"), find_recipe("clipa-b16-dr")
    assert small.samples * 2 <= find_recipe("emoji-demo").samples
    assert small.distill.weight > 0
    assert large.distill == Distill(1.0, 100.0)
    assert large.samples == 30_000 * 8_192
    assert clipa_b16_i50_t16().distill == Distill()
    assert len({stage.augmentation for stage in large.stages}) == 1


def test_it_is_found_beside_the_dataset(teacher, tmp_path, pairs_dataset):
    data = Path(shutil.copytree(pairs_dataset, tmp_path / "data"))
    told = ["--teacher", str(teacher), "--recipe", "debug", "--views", "1", "--device", "cpu"]
    result = CliRunner().invoke(main, ["reinforce", str(data), *told])
    assert result.exit_code == 0, result.output
    assert f"{data}.reinforced: 1 views of 96 records, by 1 teacher, in 6." in result.stdout
    stage = replace(RECIPE.stages[0], samples=16, warmup_samples=0)
    train(replace(RECIPE, stages=(stage,)), data, tmp_path / "run", device_name="cpu", workers=0)
