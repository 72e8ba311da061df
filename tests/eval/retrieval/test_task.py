"""Retrieval with a model: the numbers are those of its embeddings, and a run gets all that it needs to be believed."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from small_encoder import small_encoder, small_run

from clipkit import embedded
from clipkit.cli.main import main
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.script import LoadedModel
from clipkit.errors import UserError
from clipkit.eval.evaluation import evaluate
from clipkit.eval.report.page import report
from clipkit.eval.results import Result, read_predictions, read_results, verdict
from clipkit.eval.retrieval.task import Retrieval, open_retrieval

IMAGES = 120
CPU = Compute(pick("cpu"), batch_size=32)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return small_encoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrieval")


@pytest.fixture(scope="module")
def rows() -> list[tuple[bytes, list[str]]]:
    found = pq.read_table(embedded.emoji_parquet("heldout")).slice(0, IMAGES).to_pylist()
    return [
        (row["image"], [row["label"], f"a drawing of {row['group']}", f"{row['label']} again"][: 1 + place % 3])
        for place, row in enumerate(found)
    ]


@pytest.fixture(scope="module")
def data(folder: Path, rows: list[tuple[bytes, list[str]]]) -> Path:
    columns = {"image": [image for image, _ in rows], "caption": [captions for _, captions in rows]}
    pq.write_table(pa.table(columns), folder / "emoji.parquet")
    return folder / "emoji.parquet"


def test_recall_is_that_of_the_whole_matrix(encoder: Encoder, data: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    found = dict(evaluate(encoder, open_retrieval(data), CPU))
    model = LoadedModel(encoder, CPU.device)
    image_NE = torch.from_numpy(model.encode_image([image for image, _ in rows]))
    text_CE = torch.from_numpy(model.encode_text([text for _, captions in rows for text in captions]))
    image_of_C = np.repeat(np.arange(IMAGES), [len(captions) for _, captions in rows])
    order_CN = torch.argsort(text_CE @ image_NE.T, dim=1, descending=True, stable=True).numpy()
    order_NC = torch.argsort(image_NE @ text_CE.T, dim=1, descending=True, stable=True).numpy()
    for k in (1, 5, 10):
        to_image = (order_CN[:, :k] == image_of_C[:, None]).any(axis=1).mean()
        to_text = (image_of_C[order_NC[:, :k]] == np.arange(IMAGES)[:, None]).any(axis=1).mean()
        assert found[f"emoji/image_retrieval_recall@{k}"] == pytest.approx(to_image)
        assert found[f"emoji/text_retrieval_recall@{k}"] == pytest.approx(to_text)
    assert 0 < found["emoji/text_retrieval_recall@10"] < 1


def test_texts_of_many_chunks_are_the_same(encoder: Encoder, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dict(evaluate(encoder, open_retrieval(data), CPU))
    monkeypatch.setattr("clipkit.eval.retrieval.task.TEXTS_AT_ONCE", 50)
    assert dict(evaluate(encoder, open_retrieval(data), CPU)) == expected


def test_the_table_of_ranks_shows_examples_in_both_directions(encoder: Encoder, data: Path) -> None:
    task = open_retrieval(data)
    outcome = task.measure(encoder, CPU, keep_guesses=True)
    assert outcome.guesses is not None
    rows = outcome.guesses.to_pylist()
    images, captions = rows[:IMAGES], rows[IMAGES:]
    assert [row["key"] for row in images] == task.data.keys
    flat = [text for each in task.data.captions for text in each]
    assert [row["caption"] for row in captions] == flat
    assert [row["key"] for row in captions[:4]] == ["0#0", "1#0", "1#1", "2#0"]
    value = {measured.metric: measured.value for measured in outcome.measures}
    assert np.mean([row["correct"] for row in images]) == pytest.approx(value["text_retrieval_recall@1"])
    assert np.mean([row["rank"] <= 5 for row in captions]) == pytest.approx(value["image_retrieval_recall@5"])
    shown = [row for row in rows if row["guesses"]]
    assert len(shown) == 200
    for row in shown:
        assert row["image"][:4] == b"RIFF"
        assert len(row["guesses"]) == len(row["right"]) == len(row["scores"]) == 5
        assert row["scores"] == sorted(row["scores"], reverse=True)
        # The first right answer stands at the rank.
        assert [place for place, is_right in enumerate(row["right"], 1) if is_right][:1] == [row["rank"]] * (
            row["rank"] <= 5
        )
        is_caption = row["direction"] == "text to image"
        assert (len(row["pictures"]) == 5 and row["caption"] is not None) if is_caption else row["pictures"] is None
    again = open_retrieval(data).measure(encoder, CPU, keep_guesses=True)
    assert outcome.guesses.equals(again.guesses)


def test_an_image_that_cannot_be_read_is_left_out_with_its_captions(
    encoder: Encoder, tmp_path: Path, rows: list[tuple[bytes, list[str]]]
) -> None:
    images = [b"broken" if place == 4 else image for place, (image, _) in enumerate(rows)]
    pq.write_table(pa.table({"image": images, "caption": [each for _, each in rows]}), tmp_path / "a.parquet")
    outcome = open_retrieval(tmp_path / "a.parquet").measure(encoder, CPU, keep_guesses=True)
    left = [(image, each) for place, (image, each) in enumerate(rows) if place != 4]
    pq.write_table(pa.table({"image": [i for i, _ in left], "caption": [c for _, c in left]}), tmp_path / "b.parquet")
    without = open_retrieval(tmp_path / "b.parquet").measure(encoder, CPU)
    assert outcome.measures == without.measures
    assert outcome.unreadable == 1
    assert "1 image can't be read and left out with all captions" in outcome.notes[0]
    assert outcome.guesses is not None
    assert outcome.guesses.to_pylist()[-1]["key"] == "4"
    assert "not an image" in outcome.guesses.to_pylist()[-1]["problem"]


def test_hashes_tell_what_differs(encoder: Encoder, tmp_path: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    def hashes(images: list[bytes], captions: list[list[str]]) -> dict[str, str]:
        pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
        task = open_retrieval(tmp_path / "a.parquet")
        unmeasured = task.hashes(encoder.preprocess)
        task.measure(encoder, CPU)
        assert task.hashes(encoder.preprocess) == unmeasured
        return unmeasured

    images, captions = [image for image, _ in rows[:20]], [each for _, each in rows[:20]]
    base = hashes(images, captions)
    assert set(base) == {"texts", "split", "preprocessing"}
    assert base == hashes(images, captions)
    other_text = hashes(images, [["another"], *captions[1:]])
    assert (other_text["texts"] != base["texts"], other_text["split"] != base["split"]) == (True, True)
    other_image = hashes([images[1], *images[1:]], captions)
    assert (other_image["texts"] == base["texts"], other_image["split"] != base["split"]) == (True, True)


def test_long_captions_are_told(encoder: Encoder, tmp_path: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    columns = {"image": [image for image, _ in rows[:12]], "caption": [["dog " * (30 + n)] for n in range(12)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    outcome = open_retrieval(tmp_path / "a.parquet").measure(encoder, CPU)
    assert outcome.notes == ("11 captions are longer than the 32 text tokens of the model and were cut",)


def test_broken_weights_get_one_line(data: Path) -> None:
    encoder = small_encoder()
    for tensor in encoder.model.state_dict().values():
        tensor.fill_(torch.nan)
    with pytest.raises(UserError, match="the model gives NaN"):
        open_retrieval(data).measure(encoder, CPU)


def test_the_command_leaves_results_and_a_page(tmp_path: Path, folder: Path, data: Path) -> None:
    run = small_run(tmp_path / "run")
    arguments = ["zeroshot", "--ckpt", run, "--data", data, "--task", "retrieval", "--device", "cpu", "--name", "e"]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    assert "e: 120 images, 240 captions" in result.stdout
    assert "image to text, recall@1" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "median rank" in line)
    assert "%" not in line
    found = {each.metric: each for each in read_results(run)}
    assert set(found) == {
        *(f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)),
        *("text_retrieval_median_rank", "image_retrieval_median_rank", "mean_recall@1"),
    }
    assert found["mean_recall@1"].kind == "retrieval"
    assert found["image_retrieval_median_rank"].chance == 60
    rows, about = read_predictions(run / "predictions-e.parquet")
    assert (len(rows), about["kind"]) == (360, "retrieval")
    page = report(run).read_text(encoding="utf-8")
    assert "120 images, 240 captions" in page
    assert "text to image, median rank" in page


def test_less_is_better_for_a_rank() -> None:
    about = {"classes": 0, "task": "e", "data": "e", "samples_seen": 0, "checkpoint": "c", "kind": "retrieval"}
    rank = Result("image_retrieval_median_rank", 60, 50, 70, n=240, chance=60, **about)
    assert verdict(rank) == "not distinguishable from chance"
    assert verdict(dataclasses.replace(rank, value=2, low=1, high=3)) == ""
    worse = verdict(dataclasses.replace(rank, value=90, low=80, high=95))
    assert worse == "worse than chance: check which captions are of which image"


def test_a_task_for_training(data: Path) -> None:
    task = open_retrieval(data, name="mine")
    assert isinstance(task, Retrieval)
    assert (task.name, task.kind, len(task), task.path) == ("mine", "retrieval", IMAGES, data)
