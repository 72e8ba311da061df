"""Predictions from published runs: as good as promised on what was left out, robust to what isn't said."""

import json

import numpy as np
import pytest
from docs_scripts import load_script

from clipkit.errors import UserError
from clipkit.train.plan.accuracy import Z80, evidence, groupings, known_runs, predict, predict_all, read_fit, validate
from clipkit.train.plan.columns import check_columns, facts_of, pairs_of, read_run

RUN = {"model": "ViT-B-16", "dataset": "DataComp-1.4B", "samples_seen": 1.28e9}


@pytest.fixture(scope="module")
def left_out():
    ways = groupings()
    return validate({name: ways[name] for name in ("data set", "model size", "paper")}, read_fit())


@pytest.mark.parametrize("grouping", ["data set", "model size", "paper"])
def test_groups_that_were_left_out_are_told_within_two_points_and_the_intervals_hold(grouping, left_out):
    known, (means, deviations) = evidence(), left_out[grouping]
    points = 100 * np.abs(1 / (1 + np.exp(-means)) - known.top1)
    holds = np.abs(known.logits - means) <= Z80 * read_fit().widening * deviations
    assert np.median(points) <= 2
    assert np.median(points[known.top1 > 0.2]) <= 2
    assert 0.75 <= holds.mean() <= 0.90


def test_the_fit_and_the_docs_are_of_these_runs(left_out):
    """A run added or changed must be followed by `python docs/plan.py --fit`, or without `--fit` at least."""
    plan, fit = load_script("plan"), read_fit()
    page = plan.PAGE.read_text(encoding="utf-8")
    for table in (plan.times_table(), plan.headline_table()):
        assert table in page
    for name, found in left_out.items():
        assert plan.accuracy_row(name, *found, fit) in page
    means, deviations = left_out["model size"]
    pulls = np.abs(evidence().logits - means) / deviations
    assert np.quantile(pulls, 0.8) / Z80 == pytest.approx(fit.widening, abs=5e-5)
    assert set(fit.doubt) <= set(evidence().ids)


def test_leaving_out_in_closed_form_is_leaving_out(left_out):
    known, fit, groups = evidence(), read_fit(), groupings()["data set"]
    from clipkit.train.plan import accuracy

    rows = [row for row, group in enumerate(groups) if group == "LAION-400M"]
    rest = [row for row, group in enumerate(groups) if group != "LAION-400M"]
    some = [known.runs[row] for row in rows]
    others = [known.runs[row] for row in rest]
    noise = accuracy.noise([known.ids[row] for row in rest], others, fit)
    inside = accuracy.covariance(others, others, fit.kernel) + np.diag(noise)
    means = accuracy.covariance(some, others, fit.kernel) @ np.linalg.solve(inside, known.logits[rest])
    np.testing.assert_allclose(left_out["data set"][0][rows], means, rtol=1e-6, atol=1e-6)


def test_a_run_needs_only_a_name_a_length_and_data():
    said = predict(check_columns(RUN, "here"))
    assert said.low < 0.668 < said.high
    shape = {"image_width": 768, "image_depth": 12, "patch": 16, "text_width": 512, "text_depth": 12}
    full = {**RUN, **shape, "image_tokens": 197, "text_tokens": 77, "loss": "softmax", "init": "scratch"}
    assert predict(check_columns(full, "here")).value == pytest.approx(said.value, abs=0.002)
    unnamed = {"samples_seen": 1.28e9, "dataset": "DataComp-1.4B", **shape}
    assert predict(check_columns(unnamed, "here")).value == pytest.approx(said.value, abs=0.02)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("ViT-B/16", "ViT-B-16"), ("ViTB16", "ViT-B-16"), ("vit_base_patch16_224", "ViT-B-16"),
     ("openai/clip-vit-base-patch16", "ViT-B-16"), ("ViT-G/14", "ViT-bigG-14"), ("ViT-g/14", "ViT-g-14"),
     ("vit_giant_patch14_clip_224", "ViT-g-14"), ("vit_gigantic_patch14_clip_224", "ViT-bigG-14"),
     ("convnext-base", "convnext_base")],
)  # fmt: skip
def test_a_models_size_is_known_however_its_name_is_spelled(spelled, meant):
    found, same = (facts_of({**RUN, "model": name}, known_runs()) for name in (spelled, meant))
    assert (found.image_weights, found.image_tokens, found.shape) == (same.image_weights, same.image_tokens, same.shape)
    assert predict({**RUN, "model": spelled}).value == pytest.approx(predict({**RUN, "model": meant}).value, abs=0.01)


def test_the_resolution_in_a_models_name_is_the_runs_where_it_says_no_other():
    for name in ("ViT-L/14@336px", "ViT-L-14-336", "vit_large_patch14_clip_336", "ViT-L/14 (336)"):
        facts = facts_of({**RUN, "model": name}, known_runs())
        assert (facts.image_px, facts.final_px, facts.image_tokens) == (336, 336, 577)
    said = facts_of({**RUN, "model": "ViT-L/14@336px", "image_px": 224.0, "final_px": 336.0}, known_runs())
    assert (said.image_px, said.final_px, said.image_tokens) == (224, 336, 257)


def test_a_size_that_nothing_tells_is_not_guessed():
    found = predict({**RUN, "model": "DINOv2-L"})
    assert found.value is None
    assert "nothing tells the image tower's size: give image_width" in found.notes[0]
    shape = {"image_width": 768.0, "image_depth": 12.0, "samples_seen": 1e9}
    with pytest.raises(UserError, match="give patch or image_tokens"):
        predict(shape)
    with pytest.raises(UserError, match="give patch or image_tokens"):
        predict({"model": "ViT-L", "samples_seen": 1e9})
    assert predict({"model": "ViT-L", "patch": 14.0, "samples_seen": 1e9}).value == pytest.approx(
        predict({"model": "ViT-L-14", "samples_seen": 1e9}).value, abs=0.01
    )


def test_missing_columns_move_predictions_little():
    runs = [run for run in known_runs() if "samples_seen" in run][::9]
    top1 = np.array([run["imagenet_top1"] for run in runs])
    for dropped in (("source", "id", "notes"), ("gmacs_image", "gmacs_total"), ("dataset_pairs",), ("text_width",)):
        found = predict_all([{key: value for key, value in run.items() if key not in dropped} for run in runs])
        errors = [abs(each.value - true) for each, true in zip(found, top1, strict=True) if each.value is not None]
        assert len(errors) >= len(runs) - 1
        assert np.median(errors) < 0.02


def test_repetition_and_less_data_cost_accuracy_and_are_said():
    runs = [{**RUN, "dataset": "my pairs", "dataset_pairs": pairs} for pairs in (1.28e9, 1.28e8, 1.28e7)]
    found = predict_all(runs)
    assert found[0].value > found[1].value > found[2].value
    assert "seen 100 times" in " ".join(found[2].notes)
    assert "no published run is on my pairs" in " ".join(found[0].notes)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("LAION-2B", "LAION-2B-en"), ("laion2b_en", "LAION-2B-en"), ("LAION400M", "LAION-400M"), ("cc-12m", "CC12M"),
     ("datacomp_1b", "DataComp-1B"), ("WIT", "WIT-400M (OpenAI)"), ("yfcc15m", "YFCC-15M")],
)  # fmt: skip
def test_a_data_set_is_known_however_it_is_spelled(spelled, meant):
    found, same = predict_all([{**RUN, "dataset": name} for name in (spelled, meant)])
    assert found[:3] == pytest.approx(same[:3])
    assert "no published run" not in " ".join(found.notes)
    is_longer = len(meant) > len(spelled) + 2
    assert (f"assumed that {spelled} is {meant}" in found.notes) == is_longer


@pytest.mark.parametrize(
    ("dataset", "pairs"),
    [("LAION-2B", 2.32e9), ("LAION-40M", 4e7), ("LAION-800M", 8e8), ("DataComp-14M", 1.4e7), ("CC3M+CC12M", 1.5e7),
     ("DataComp-L", 1.4e8), ("gadgets_7m_clean", 7e6), ("LAION", None), ("YFCC", None), ("DataComp-XL", None),
     ("2B of our 5B", None), ("CC12M + mine", None)],
)  # fmt: skip
def test_pairs_are_those_of_the_name_and_not_of_a_name_that_looks_alike(dataset, pairs):
    assert pairs_of(dataset, known_runs()) == pairs


def test_unfamiliar_data_widen_the_interval():
    known, strange = predict(RUN), predict({**RUN, "dataset": "gadgets"})
    assert strange.high - strange.low > 1.3 * (known.high - known.low)


@pytest.mark.parametrize(("column", "value"), [("samples_seen", 1e4), ("samples_seen", 1e13), ("image_width", 2e4)])
def test_outside_of_what_was_published_nothing_is_said(column, value):
    found = predict({**RUN, "image_depth": 12.0, "patch": 16.0, column: value})
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "not enough is known" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"sampels_seen": 5}', "did you mean samples_seen"), ('{"samples_seen": "many"}', 'is "many": give a'),
     ('{"samples_seen": true}', "give a positive number"), ('{"patch": -16}', "give a positive number"),
     ('{"samples_seen": "12,8B"}', 'is "12,8B": give a'), ('{"samples_seen": ","}', 'is ",": give a'),
     (f'{{"samples_seen": 1{"0" * 400}}}', "give a positive number"), ('{"image_tokens": 0.5}', "is 0.5: give a"),
     ('{"text_tokens": "0.4"}', 'is "0.4": give a'), ('{"patch": NaN}', "give a positive number"),
     ('{"model": 7}', "model is 7: give text"), ("[1]", "not a list"),
     ("{", "can't be read as JSON")],
)  # fmt: skip
def test_columns_that_mean_nothing_are_refused_in_a_line(text, said, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_run(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("init", ["Scratch", "from scratch", "trained from scratch", "random", "random init"])
def test_towers_from_scratch_are_so_however_it_is_said(init):
    scratch = predict(RUN)
    assert predict({**RUN, "init": init}) == scratch
    assert predict({**RUN, "init": "image tower pretrained, text from scratch"}).value > scratch.value + 0.03


def test_empty_columns_are_as_good_as_none(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({**RUN, "samples_seen": "1,280,000,000", "hours": "", "gmacs_total": None, "init": "none"})
    )
    assert read_run(path) == RUN
    path.write_text(json.dumps({**RUN, "samples_seen": "1.28B"}))
    assert read_run(path) == RUN
