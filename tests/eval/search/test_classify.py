"""Probabilities of labels are those of zero-shot classification; the page shows the pictures, in any browser window."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_encoder import small_run

import clipkit
from clipkit.cli.main import main
from clipkit.eval.search.page import Tile, picture, write_page


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        Image.new("RGB", (80 + 40 * number, 60), (200, 90 * number, 30)).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(2)]


def run(*arguments):
    done = CliRunner().invoke(main, ["classify", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_probabilities_are_those_of_the_similarities(model, images, tmp_path):
    page = tmp_path / "page.html"
    done = run(
        *images, "--labels", "a cat,  a dog,fish", "--ckpt", model, "--templates", "{}", "--device", "cpu", "--json",
        "--page", page,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    loaded = clipkit.load(model, device="cpu")
    logit_NC = (
        float(loaded.encoder.scale) * loaded.encode_image(images) @ loaded.encode_text(["a cat", "a dog", "fish"]).T
    )
    expected_NC = torch.from_numpy(logit_NC).softmax(dim=1).numpy()
    for line, image, expected_C in zip(lines, images, expected_NC, strict=True):
        assert line["image"] == str(image)
        found = line["probabilities"]
        assert list(found.values()) == sorted(found.values(), reverse=True)
        np.testing.assert_allclose([found[label] for label in ("a cat", "a dog", "fish")], expected_C, atol=1e-5)
    html = page.read_text(encoding="utf-8")
    assert html.count("<img src=") == 2 and html.count("<span>fish</span>") == 2
    text = run(*images, "--labels", "a cat,a dog", "--ckpt", model, "--device", "cpu").stdout
    assert text.count("%") == 4 and text.startswith(f"{images[0]}: a ")


def test_the_averages_classify(model, images, tmp_path):
    averaged = small_run(tmp_path / "run", seed=4, averages=3)  # the averages are `model`'s weights
    asked = [images[0], "--labels", "a cat,a dog", "--device", "cpu", "--json"]
    last, averages = (run(*asked, "--ckpt", averaged, *more).stdout for more in ([], ["--ema"]))
    assert averages == run(*asked, "--ckpt", model).stdout != last


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("a cat,,a dog", "has a blank label"),
        ("", "has a blank label"),
        ("a cat", "is one label"),
        ("a, b, a", "'a' twice"),
    ],
)
def test_labels_that_say_nothing_are_refused(labels, words, images):
    done = run(images[0], "--labels", labels, "--ckpt", "none")
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_files_that_are_no_images_are_named(model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("no image")
    for path, words in ((text, f"{text}: "), (tmp_path / "gone.png", "can't read the image")):
        done = run(path, "--labels", "a, b", "--ckpt", model, "--device", "cpu")
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("Error: ") == 1
    assert CliRunner().invoke(main, ["classify", str(text), "--ckpt", str(model)]).exit_code == 2  # no labels


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, tmp_path, images, scheme, width):
    data = images[0].read_bytes()
    said = "a caption <b>that</b> is long " * 6
    tiles = [Tile(picture(data), "x" * 90, (said,), "0.312"), Tile("", "gone", bars=(("a cat", 0.9), ("dog", 0.1)))]
    page = tmp_path / "page.html"
    write_page(page, "a query <i>&</i>", "where", tiles)
    browser.open(page, width, scheme)
    assert browser.problems() == [] and browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.evaluate("document.querySelector('.words p').textContent") == said
    assert browser.evaluate("document.querySelector('h1').textContent") == "a query <i>&</i>"
    assert browser.evaluate("document.querySelectorAll('.words b').length") == 1
    shown = browser.screenshot()
    assert (shown[2, 2].mean() > 128) == (scheme == "light")
