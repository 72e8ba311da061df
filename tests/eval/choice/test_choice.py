"""The suites of compositionality are read as their owners meant them, and scored by their own definitions."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_encoder import small_encoder, small_run

from clipkit.cli.main import main
from clipkit.cli.options import TaskKinds
from clipkit.device import pick
from clipkit.embedding.encoder import Compute, Encoder
from clipkit.embedding.script import LoadedModel
from clipkit.errors import UserError
from clipkit.eval.choice.questions import Question, read_picture, read_questions
from clipkit.eval.choice.task import choice_measures, guessed, jaccard, open_choice, right_choices
from clipkit.eval.open import KINDS
from clipkit.eval.report.page import report
from clipkit.eval.results import read_predictions, read_results
from clipkit.intervals import wilson

CPU = Compute(pick("cpu"), batch_size=16)


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return small_encoder()


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def sugar_crepe(folder: Path) -> Path:
    write_images(folder / "val2017", [f"{n}.png" for n in range(4)])
    for kind in ("add_att", "replace_obj"):
        rows = {
            str(3 * n): {"filename": f"{n}.png", "caption": f"a {kind} {n}", "negative_caption": f"no {kind} {n}"}
            for n in range(4)
        }
        write(folder / f"{kind}.json", rows)
    return folder


def winoground(folder: Path) -> list[dict[str, Any]]:
    names = [f"ex_{n}_img_{i}" for n in range(3) for i in (0, 1)]
    write_images(folder / "images", [f"{name}.png" for name in names])
    return [
        {
            "id": n,
            "image_0": names[2 * n],
            "image_1": names[2 * n + 1],
            "tag": "x",
            "caption_0": f"some {n} plants",
            "caption_1": f"plants {n} some",
            "collapsed_tag": "OR"[n % 2],
        }
        for n in range(3)
    ]


# ---- Suites ----------------------------------------------------------------------------------------------------------


def test_sugar_crepe(tmp_path: Path, encoder: Encoder) -> None:
    task = open_choice(sugar_crepe(tmp_path / "sc"))
    assert (task.name, len(task.questions), len(task)) == ("sc", 8, 4)
    question = task.questions[1]
    assert (question.key, question.category, question.captions) == (
        "add_att:3",
        "add_att",
        ("a add_att 1", "no add_att 1"),
    )
    outcome = task.measure(encoder, CPU, keep_guesses=True)
    by_name = {measured.metric: measured for measured in outcome.measures}
    assert set(by_name) == {"accuracy", "mean_per_category_accuracy", "accuracy:add_att", "accuracy:replace_obj"}
    model = LoadedModel(encoder, CPU.device)
    right = [
        model.encode_image(each.pictures[0].source) @ model.encode_text(list(each.captions)).T
        for each in task.questions
    ]
    expected = np.mean([scores[0] > scores[1] for scores in right])
    accuracy = by_name["accuracy"]
    assert (accuracy.value, accuracy.n, accuracy.chance) == (expected, 8, 0.5)
    assert (accuracy.low, accuracy.high) == wilson(expected, 8)
    assert by_name["accuracy:add_att"].n == 4
    assert outcome.guesses is not None
    rows = outcome.guesses.to_pylist()
    assert np.mean([row["correct"] for row in rows]) == expected
    np.testing.assert_allclose([row["scores"][0] for row in rows], right, atol=1e-6)
    assert rows[0]["pictures"][0][:4] == b"RIFF"
    one = open_choice(tmp_path / "sc" / "add_att.json", images=tmp_path / "sc" / "val2017")
    assert [measured.metric for measured in one.measure(encoder, CPU).measures] == ["accuracy"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_winoground(tmp_path: Path, encoder: Encoder, kind: str) -> None:
    rows = winoground(tmp_path)
    if kind == "jsonl":
        file = write(tmp_path / "examples.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        for row in rows:
            for name in ("image_0", "image_1"):
                row[name] = {"bytes": (tmp_path / "images" / f"{row[name]}.png").read_bytes(), "path": None}
        file = tmp_path / "examples.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    task = open_choice(file)
    assert [(each.key, each.category) for each in task.questions] == [("0", "O"), ("1", "R"), ("2", "O")]
    outcome = task.measure(encoder, CPU, keep_guesses=True)
    by_name = {measured.metric: measured for measured in outcome.measures}
    assert [by_name[name].chance for name in ("text_score", "image_score", "group_score")] == [1 / 4, 1 / 4, 1 / 6]
    assert by_name["text_score:O"].n == 2
    assert outcome.guesses is not None
    model = LoadedModel(encoder, CPU.device)
    counts = {"text_score": 0, "image_score": 0, "group_score": 0}
    for n in range(3):  # as facebookresearch's notebook has it
        images = model.encode_image([tmp_path / "images" / f"ex_{n}_img_{i}.png" for i in (0, 1)])
        (c0_i0, c1_i0), (c0_i1, c1_i1) = images @ model.encode_text([f"some {n} plants", f"plants {n} some"]).T
        text, image = c0_i0 > c1_i0 and c1_i1 > c0_i1, c0_i0 > c0_i1 and c1_i1 > c1_i0
        counts["text_score"] += text
        counts["image_score"] += image
        counts["group_score"] += text and image
    assert {name: round(3 * by_name[name].value) for name in counts} == counts


def test_aro_cuts_the_image_to_its_box(tmp_path: Path) -> None:
    write_images(tmp_path, ["7.jpg"])
    box = {"bbox_x": 2, "bbox_y": 3, "bbox_w": 10, "bbox_h": 5}
    texts = {"true_caption": "the dog is on the rug", "false_caption": "the rug is on the dog"}
    rows = [
        {"image_path": "vg/7.jpg", "relation_name": "on", **box, **texts},
        {"image_path": "vg/7.jpg", "attributes": ["red", "big"], **box, "bbox_x": 25, **texts},
    ]
    questions = read_questions(write(tmp_path / "a.json", rows), None)
    assert [question.category for question in questions] == ["on", "red_big"]
    cut = read_picture(questions[0].pictures[0])
    assert isinstance(cut, bytes)
    whole = Image.open(io.BytesIO(picture(0))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(cut))), np.asarray(whole.crop((2, 3, 12, 8))))
    assert questions[0].pictures[0] != questions[1].pictures[0]


def test_orders_of_aro_have_five_captions(tmp_path: Path, encoder: Encoder) -> None:
    write_images(tmp_path, ["7.jpg"])
    row = {"image": "7.jpg", "caption_options": ["a b c", "b a c", "c b a", "c a b", "b c a"]}
    task = open_choice(write(tmp_path / "order.json", [row] * 3))
    measured = task.measure(encoder, CPU).measures[0]
    assert (measured.metric, measured.n, measured.chance) == ("accuracy", 3, pytest.approx(0.2))


def test_mmvp_pairs_two_rows(tmp_path: Path, encoder: Encoder) -> None:
    write_images(tmp_path / "MLLM_VLM Images", [f"{kind}/{n}.jpg" for kind, n in zip("AABB", range(1, 5), strict=True)])
    text = 'Question ID,Type,Statement\n1,A,open\n2,A,"closed, shut"\n3,B,left\n4,B,right\n'
    write(tmp_path / "MLLM_VLM Images" / "Questions.csv", text)
    task = open_choice(tmp_path / "MLLM_VLM Images" / "Questions.csv")
    assert [(q.key, q.category, q.captions) for q in task.questions] == [
        ("1", "A", ("a photo of open", "a photo of closed, shut")),
        ("3", "B", ("a photo of left", "a photo of right")),
    ]
    assert [p.key for p in task.questions[1].pictures] == ["B/3.jpg", "B/4.jpg"]
    assert {m.metric for m in task.measure(encoder, CPU).measures} >= {"image_score", "image_score:A"}


def winogavil(folder: Path) -> list[dict[str, Any]]:
    """Questions of 5, 6, 10 and 12 candidates; the table has lists as text."""
    names = [f"thing {n}" for n in range(12)]
    write_images(folder / "winogavil_images", [f"{name}.jpg" for name in names])
    rows = [
        {"ID": n, "cue": cue, "candidates": names[:count], "associations": names[count - right : count]}
        for n, (count, right, cue) in enumerate([(5, 2, "Owl"), (6, 3, "wolf"), (10, 2, "iron"), (12, 5, "x-ray")])
    ]
    lines = [[row["ID"], row["cue"], str(row["candidates"]), str(row["associations"])] for row in rows]
    with (folder / "winogavil_dataset.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["ID", "cue", "candidates", "associations"], *lines])
    return rows


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_winogavil(tmp_path: Path, encoder: Encoder, kind: str) -> None:
    rows = winogavil(tmp_path)
    images = tmp_path / "winogavil_images"
    if kind == "parquet":
        (tmp_path / "winogavil_dataset.csv").unlink()
        for row in rows:
            encoded = [(images / f"{name}.jpg").read_bytes() for name in row["candidates"]]
            row["candidate_images"] = [{"bytes": each, "path": None} for each in encoded]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    task = open_choice(tmp_path)
    assert [question.captions[0] for question in task.questions] == ["An owl", "A wolf", "An iron", "A x-ray"]
    outcome = task.measure(encoder, CPU, keep_guesses=True)
    model = LoadedModel(encoder, CPU.device)
    expected = {}
    for row, question in zip(rows, task.questions, strict=True):  # as DataComp's script has it
        pictures = model.encode_image([images / f"{name}.jpg" for name in row["candidates"]])
        top = np.argsort((model.encode_text(list(question.captions)) @ pictures.T)[0])[-len(row["associations"]) :]
        chosen, right = {row["candidates"][number] for number in top}, set(row["associations"])
        expected[len(row["candidates"])] = len(chosen & right) / len(chosen | right)
    found = {measured.metric: (measured.value, measured.n) for measured in outcome.measures}
    assert found == {
        "jaccard": (pytest.approx(np.mean(list(expected.values()))), 4),
        "jaccard_5_6": (pytest.approx((expected[5] + expected[6]) / 2), 2),
        "jaccard_10_12": (pytest.approx((expected[10] + expected[12]) / 2), 2),
    }
    assert outcome.guesses is not None
    assert [row["correct"] for row in outcome.guesses.to_pylist()] == [value == 1 for value in expected.values()]


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(1, n - 1))))
def test_the_jaccard_index_is_by_its_definition(drawn: tuple[list[int], int]) -> None:
    places, count = drawn
    best = {number for number, place in enumerate(places) if place >= len(places) - count}
    right = set(range(count))
    found = jaccard(np.array(places, dtype=np.float32), sorted(right))
    assert found == pytest.approx(len(best & right) / len(best | right))


def test_chance_of_associations_is_what_random_scores_give() -> None:
    rng = np.random.default_rng(0)
    for candidates, right in ((5, 2), (12, 4), (10, 6)):
        drawn = [jaccard(rng.random(candidates, np.float32), range(right)) for _ in range(4000)]
        assert np.mean(drawn) == pytest.approx(guessed(candidates, right), abs=0.01)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_equal_scores_are_no_choice() -> None:
    assert right_choices(np.ones((1, 2), np.float32)) == {"accuracy": False}
    assert right_choices(np.ones((2, 2), np.float32)) == dict.fromkeys(
        ("text_score", "image_score", "group_score"), False
    )
    assert right_choices(np.array([[3.0, 1], [2, 4]])) == dict.fromkeys(
        ("text_score", "image_score", "group_score"), True
    )
    assert right_choices(np.array([[3.0, 1], [5, 6]])) == {
        "text_score": True,
        "image_score": False,
        "group_score": False,
    }


def test_chance_is_what_random_scores_give() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 2), (1, 5), (2, 2)):
        questions = [Question(str(n), "", (), tuple("abcde"[: shape[1]])) for n in range(4000)]
        for measured in choice_measures(questions, [rng.random(shape, np.float32) for _ in questions]):
            assert measured.value == pytest.approx(measured.chance, abs=0.025)


def test_many_categories_get_no_number_each(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question(str(n), f"c{n % 3}", (), ("a", "b")) for n in range(6)]
    scores: list[Any] = [np.array([[1.0, n % 2]]) for n in range(6)]
    assert len(choice_measures(questions, scores)) == 5
    monkeypatch.setattr("clipkit.eval.choice.task.MOST_CATEGORIES", 2)
    assert [m.metric for m in choice_measures(questions, scores)] == ["accuracy", "mean_per_category_accuracy"]


def test_a_question_with_a_broken_image_is_not_counted(tmp_path: Path, encoder: Encoder) -> None:
    names = [f"{n}.png" for n in range(150)]
    write_images(tmp_path, names)
    (tmp_path / "3.png").write_bytes(b"broken")
    rows = [{"image": name, "caption": f"a {name}", "negative_caption": f"no {name}"} for name in names]
    outcome = open_choice(write(tmp_path / "a.json", rows)).measure(encoder, CPU, keep_guesses=True)
    assert (outcome.measures[0].n, outcome.unreadable) == (149, 1)
    assert "1 image can't be read, so 1 question can't be counted" in outcome.notes[0]
    assert outcome.guesses is not None
    assert outcome.guesses.to_pylist()[3]["problem"]


# ---- Bad input and the command ---------------------------------------------------------------------------------------

GOOD = {"image": "0.png", "caption": "a", "negative_caption": "b"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{**GOOD, "image": "1.png"}], r"a\.json row 0: its image 1\.png isn't in"),
        ([{**GOOD, "image": None}], r"a\.json row 0 has captions without an image"),
        ([{**GOOD, "caption": " "}], "has an empty caption"),
        (
            [{**GOOD, "negative_caption_2": "c"}],
            "has a column 'negative_caption_2': put all its captions into caption_o",
        ),
        (
            [{"image": "0.png", "caption_options": ["a", "b", "c"], "label": 1}],
            "has label 1 beside caption_options, of which the first is the right one: put it there, and leave out",
        ),
        ([{**GOOD, "negative_caption": None}], "has 1 captions to choose from"),
        ([{"image": "0.png"}], "has 0 captions to choose from"),
        ([{"caption": "a", "negative_caption": "b"}], r"isn't a question \(caption, negative_caption\)"),
        ([], "has no questions"),
        (["x"], r"a\.json row 0 isn't an object with an image and captions"),
        (
            [GOOD, {"image_0": "0.png", "image_1": "0.png", "caption_0": "a", "caption_1": "b"}],
            "mixes questions of several kinds",
        ),
        ([{"cue": "x", "candidates": ["0", "1"], "associations": ["2"]}], "each association must be one of its cand"),
        ([{"cue": "x", "candidates": "0, 1", "associations": ["0"]}], r"0 candidates isn't a list of names: write"),
        (
            [{"cue": "x", "candidates": ["0", "1"], "associations": ["0"]}],
            r"json row 0 1: its image 1\.png isn't in",
        ),
    ],
)
def test_bad_questions(tmp_path: Path, content: object, says: str) -> None:
    write_images(tmp_path, ["0.png"])
    with pytest.raises(UserError, match=says) as caught:
        open_choice(write(tmp_path / "a.json", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "Question ID,Type,Statement\n1,A,x\n", "each two are a pair"),
        ("a.csv", "Question ID,Type,Statement\n1,A,x\n2,B,y\n", "are of two types"),
        ("a.csv", "Question ID,Type,Statement\n1,A,x\n2,A,y\n", r"its image A/1\.jpg isn't in"),
        ("a.csv", "image,caption,negative_caption\n0.png,x,y\n", r"a\.csv row 0: its image 0\.png isn't in"),
        ("a.jsonl", "{", "has a line that isn't JSON"),
        ("a.txt", "", "can't tell what"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_choice(write(tmp_path / name, content))


@pytest.mark.parametrize("answer", [{"label": 0}, {"Answer": "a"}, {"split": "test"}])
def test_options_whose_first_is_said_to_be_right(tmp_path: Path, answer: dict[str, Any]) -> None:
    write_images(tmp_path, ["0.png"])
    row = {"image": "0.png", "caption_options": ["a", "b"], **answer}
    assert open_choice(write(tmp_path / "a.json", [row])).questions[0].captions == ("a", "b")


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="doesn't exist"):
        open_choice(tmp_path / "none")
    with pytest.raises(UserError, match="holds no questions"):
        open_choice(tmp_path)
    write_images(tmp_path, ["a/0.png", "b/0.png"])
    file = write(tmp_path / "a.json", [GOOD])
    with pytest.raises(UserError, match="say which by --images"):
        open_choice(file)
    with pytest.raises(UserError, match=r"--images .*none isn't a folder"):
        open_choice(file, images=tmp_path / "none")


def test_the_command(tmp_path: Path) -> None:
    run, data = small_run(tmp_path / "run"), sugar_crepe(tmp_path / "sc")
    arguments = ["zeroshot", "--ckpt", run, "--data", data, "--task", "choice", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--images", str(data / "val2017")])
    assert result.exit_code == 0, result.output
    assert "sc: 8 questions" in result.stdout
    assert "accuracy, replace_obj" in result.stdout
    assert {each.kind for each in read_results(run)} == {"choice"}
    rows, about = read_predictions(run / "predictions-sc.parquet")
    assert (len(rows), about["kind"]) == (8, "choice")
    assert "accuracy, mean of categories" in report(run).read_text(encoding="utf-8")


def test_the_command_offers_every_kind() -> None:
    assert tuple(TaskKinds.choices) == KINDS
