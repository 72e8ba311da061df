"""A run's results as its page shows them, for tasks and models of any kind."""

from dataclasses import replace

from clipkit.eval.report.evaluations import Block, blocks, history, over_training, rows
from clipkit.eval.results import Result

TOP1 = Result("top1", 0.5, 0.4, 0.6, 100, 0.1, 10, "digits", "x", 100, "checkpoints/000000000100", {"templates": "a"})
RECALL = replace(TOP1, metric="mean_recall@1", kind="retrieval", task="coco", classes=0)
RANK = replace(RECALL, metric="text_retrieval_median_rank", value=4.0, low=3.0, high=5.0, chance=500.0)


def numbers(listed: list[Block]) -> list[tuple[str, str, list[float]]]:
    return [(block.model, block.task, [result.value for result in block.results]) for block in listed]


def test_the_newest_checkpoint_counts_and_other_models_stand_for_themselves() -> None:
    newer = replace(TOP1, samples_seen=200, checkpoint="checkpoints/000000000200", value=0.6)
    foreign = replace(TOP1, samples_seen=0, checkpoint="open_clip:ViT-B-32:openai", value=0.9)
    assert numbers(blocks([foreign, newer, TOP1])) == [
        ("", "digits", [0.6]),
        ("open_clip:ViT-B-32:openai", "digits", [0.9]),
    ]


def test_other_templates_are_another_measurement() -> None:
    other = replace(TOP1, hashes={"templates": "b"}, value=0.7)
    assert numbers(blocks([TOP1, other])) == [("", "digits", [0.5]), ("", "digits", [0.7])]
    # Another stage has another preprocessing and is the same measurement.
    later = replace(TOP1, samples_seen=200, hashes={"templates": "a", "preprocessing": "z"})
    assert len(blocks([TOP1, later])) == 1


def test_every_kind_has_a_headline() -> None:
    assert Block("coco", "", (RANK, RECALL)).headline == RECALL
    assert Block("coco", "", (RANK,)).headline == RANK
    assert Block("x", "", (replace(TOP1, metric="macro_f1", kind="linear-probe"),)).headline.metric == "macro_f1"


def test_ranks_are_numbers_without_a_scale() -> None:
    rank, recall = rows(Block("coco", "", (RANK, RECALL)))
    assert (rank["value"], rank["chance"], rank["strip"]) == ("4", "500", "")
    assert recall["value"] == "50.0%"
    # The scale is that of the shares: a rank of 500 doesn't squeeze it.
    assert 'x="79.37"' in recall["strip"] or 'x="78' in recall["strip"]


def test_curves_are_of_each_tasks_main_metric_and_of_the_runs_own_model() -> None:
    found = [replace(RECALL, samples_seen=seen, value=seen / 1000) for seen in (100, 200)]
    foreign = replace(RECALL, checkpoint="open_clip:x", samples_seen=150, value=0.99)
    metrics = [{"samples_seen": 50, "coco/mean_recall@1": 0.01, "coco/text_retrieval_median_rank": 9.0}]
    points = history(metrics, [*found, foreign])
    assert points["coco"]["mean_recall@1"] == {50.0: 0.01, 100.0: 0.1, 200.0: 0.2}
    (chart,) = over_training(metrics, [], [*found, foreign])
    assert "recall@1, mean of both" in chart
    assert "chance of recall@1, mean of both" in chart


def test_a_curve_keeps_to_one_set_of_templates() -> None:
    other = replace(TOP1, samples_seen=200, hashes={"templates": "b"}, value=0.7)
    assert history([], [TOP1, other])["digits"]["top1"] == {100.0: 0.5}
