import json

import pyarrow.parquet as pq
import pytest

from clipkit import embedded


def test_the_demos_pairs_are_what_their_readme_says():
    train, heldout = (
        pq.read_table(embedded.emoji_parquet(split), columns=["label", "vendor"]) for split in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == (8548, 1096)
    assert not set(train["vendor"].to_pylist()) & set(heldout["vendor"].to_pylist())
    assert set(heldout["label"].to_pylist()) <= set(train["label"].to_pylist())


def test_the_groups_are_those_of_the_training_pairs():
    groups = json.loads(embedded.emoji_groups().read_text(encoding="utf-8"))
    captions: dict[str, set[str]] = {}
    for row in pq.read_table(embedded.emoji_parquet("train"), columns=["group", "caption"]).to_pylist():
        captions.setdefault(row["group"], set()).add(row["caption"])
    assert groups == {group: sorted(captions[group]) for group in sorted(captions)}
    assert len(groups) == 10


def test_imagenets_classes_are_in_label_order():
    classes = embedded.imagenet_classes()
    wnids = [entry["wnid"] for entry in classes]
    assert len(wnids) == 1000
    assert wnids == sorted(wnids)
    assert classes[0] == {"wnid": "n01440764", "name": "tench"}


def test_the_templates_are_openais():
    templates = embedded.prompt_templates()
    assert {name: len(sentences) for name, sentences in templates.items()} == {"openai-80": 80, "openai-7": 7}
    assert all(sentence.count("{}") == 1 for sentences in templates.values() for sentence in sentences)


@pytest.mark.parametrize("name", ["clip", "emoji", "published"])
def test_licences_travel_with_the_data(name):
    assert "licence" in (embedded.folder(name) / "README.md").read_text(encoding="utf-8")


def test_the_published_numbers_are_of_121_models_on_datacomps_38_tasks():
    tasks = [row for row in embedded.published("datacomp-38") if row["in_average"] == "yes"]
    models = embedded.published("openclip-evals")
    assert (len(tasks), len({(row["model"], row["pretrained"]) for row in models})) == (38, 121)
    for row in models:
        values = [float(row[f"{task['name']}/{task['main_metric']}"]) for task in tasks]
        assert all(0 <= value <= 1 for value in values)
        assert sum(values) / 38 == pytest.approx(float(row["Average perf. on 38 datasets"]), abs=6e-5)
