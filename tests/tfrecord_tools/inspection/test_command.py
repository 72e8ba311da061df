"""The numbers are those of data made to have them, and the page is whole in a real browser."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from image_shards import picture
from PIL import Image
from small_dataset import PAIR_FEATURES, pair_columns, write_dataset, write_pairs

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import Dataset
from clipkit.formats.features import Feature
from clipkit.page.charts import histogram
from clipkit.storage.files import as_path
from clipkit.text.tokenizer import Tokenizer
from clipkit.text.tokens import reduce_text
from clipkit.tfrecord_tools.inspection import captions as inspection_captions
from clipkit.tfrecord_tools.inspection import pictures as inspection_pictures
from clipkit.tfrecord_tools.inspection.captions import _kept, caption_facts, pieces_of
from clipkit.tfrecord_tools.inspection.command import contents, inspect_dataset, stretches
from clipkit.tfrecord_tools.inspection.figures import inspect, sample_places
from clipkit.tfrecord_tools.inspection.histogram import histogram_of
from clipkit.tfrecord_tools.inspection.pictures import Pictures, neighbours

LONG = (
    "two brown dogs and a small black cat slowly walk along the old wooden fence of a green garden behind the house "
    "while the children of the neighbours happily play football in the warm evening sun"
)
FEATURES = PAIR_FEATURES | {"NSFW": Feature("text", optional=True), "width": Feature("int")}


def photo(seed, side=64, quality=90):
    """Smooth noise, of which no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    return encoded(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), quality)


def encoded(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty records: some repeat captions or pictures, one picture is broken, two captions are empty."""
    captions = ["a red bus"] * 5 + ["A  red bus", "", " ", LONG, "<b>bold & bad</b>"]
    captions += [f"picture number {n} of a tall tree" for n in range(30)]
    records = [
        pair_columns(n, txt=caption, jpg=photo(n, side=64 + 16 * (n % 3)), width=64)
        | {"NSFW": None if n % 4 == 0 else "UNSURE" if n % 4 == 1 else "UNLIKELY", "similarity": n / 100 if n else None}
        for n, caption in enumerate(captions)
    ]
    records[20]["jpg"] = records[21]["jpg"] = records[22]["jpg"]
    records[30]["jpg"] = photo(31, side=64 + 16, quality=60)
    records[31]["jpg"] = photo(31, side=64 + 16, quality=90)
    records[39]["jpg"] = photo(39)[:300]
    folder = tmp_path_factory.mktemp("inspected") / "data"
    write_dataset(folder, {"train": [records[:15], records[15:]]}, FEATURES)
    reasons = ["dns"] * 3 + ["http-4xx"] * 5
    pq.write_table(pa.table({"reason": reasons, "url": ["x"] * 8}), folder / "clipkit" / "failures.parquet")
    return folder


@pytest.fixture(scope="module")
def seen(data):
    return inspect(data)


def test_counts_of_the_whole(seen, data):
    assert (seen.name, seen.split, seen.records, seen.shards, seen.sampled) == ("pairs", "train", 40, 2, 40)
    assert seen.bytes == sum(file.stat().st_size for file in data.glob("*.tfrecord-*"))
    assert seen.failed == {"http-4xx": 5, "dns": 3}
    assert seen.skipped == {"no-caption": 2}


def test_a_split_that_was_not_downloaded_lacks_no_rows(tmp_path):
    """A download writes `train`; validation was built beside it."""
    write_dataset(tmp_path, {"train": [[pair_columns(1)]], "validation": [[pair_columns(2)]]})
    pq.write_table(pa.table({"reason": ["dns"]}), tmp_path / "clipkit" / "failures.parquet")
    assert inspect(tmp_path).failed == {"dns": 1}
    assert inspect(tmp_path, split="validation").failed == {}


def test_columns_and_what_is_missing(seen):
    columns = {column.name: (column.type, round(column.missing, 3)) for column in seen.columns}
    assert columns == {
        "NSFW": ("text, optional", 0.25),
        "jpg": ("image", 0),
        "key": ("text", 0),
        "similarity": ("float, optional", 0.025),
        "txt": ("text", 0),
        "url": ("text", 0),
        "width": ("int", 0),
    }


def test_captions(seen):
    captions = seen.captions
    assert (captions.column, captions.read, captions.empty, captions.repeated) == ("txt", 40, 2, 6)
    assert captions.frequent == (("a red bus", 6),)
    assert captions.words.high == len(LONG.split())
    assert captions.tokens.high == len(Tokenizer().encode([LONG])[0]) + 2
    assert (captions.tokens.low, captions.tokens.n) == (2, 40)


def test_captions_of_several_sources(tmp_path):
    added = {3: ["a tree"], 4: ["a tall tree", "and a bush"]}
    records = [pair_columns(n, clipkit_captions_synthetic=added.get(n)) for n in range(8)]
    features = PAIR_FEATURES | {"clipkit_captions_synthetic": Feature("text", is_list=True)}
    summary = inspect_dataset(write_dataset(tmp_path / "data", {"train": [records]}, features))
    original, synthetic = summary.inspection.sources
    assert (original.source, original.records, original.captions) == ("original", 8, 8)
    assert (synthetic.source, synthetic.records, synthetic.captions) == ("synthetic", 2, 3)
    assert synthetic.tokens.mean == pytest.approx((4 + 5 + 5) / 3)
    assert "captions of synthetic: in 25% of the records, mean 4.7 tokens" in summary.text()
    assert "8 records, " in summary.text() and " in 1 shard; looked at 8" in summary.text()
    page = summary.page.read_text()
    assert "By source" in page and "a tree" in page
    assert json.loads(summary.numbers.read_text())["sources"][1]["records"] == 2
    assert inspect(tmp_path / "data").captions.read == 8


def test_what_each_way_keeps(seen):
    rows = {(each.method, each.context_length): each for each in seen.captions.reductions}
    assert len(rows) == 4 * 3
    length = len(Tokenizer().encode([LONG])[0])
    for context in (8, 16, 32):
        kept = {rows[method, context].kept for method in ("truncate", "random", "block", "syntax")}
        assert len(kept) == 1, "all ways keep as many"
        assert rows["syntax", context].nouns >= max(rows[m, context].nouns for m in ("truncate", "random", "block"))
    assert rows["syntax", 16].nouns > rows["truncate", 16].nouns
    assert length > 30
    assert rows["truncate", 32].whole == pytest.approx(37 / 38)


@pytest.mark.parametrize("method", ["truncate", "random", "block", "syntax"])
@pytest.mark.parametrize("context", [8, 16])
def test_what_is_shown_as_kept_is_what_training_keeps(method, context):
    tokenizer = Tokenizer()
    ids = tokenizer.encode([LONG, "a red bus", LONG[40:]])
    keys = np.array([5, 6, 7], np.uint64)
    classes = [[len(str(token)) % 4 for token in row] for row in ids]
    masks = _kept(method, context, ids, keys, classes)
    rows = reduce_text(method, ids, context, keys, classes if method == "syntax" else None)
    for row, mask, whole in zip(rows, masks, ids, strict=True):
        told = [token for token, stays in zip(whole, mask, strict=True) if stays]
        assert told == row[1 : len(told) + 1].tolist()
        assert len(told) == min(len(whole), context - 2)


def test_pieces_are_the_caption():
    tokenizer = Tokenizer()
    text = "an unbelievably-nice café, 30€ <start_of_text>"
    shown = "".join(pieces_of(tokenizer, tokenizer.encode([text])[0]))
    assert shown.replace(" ", "") == text.replace(" ", "")
    assert stretches(["a ", "b", "c ", "d "], [True, True, False, True]) == [("a b", True), ("c ", False), ("d ", True)]


def test_without_the_tagger_the_other_ways_are_there(monkeypatch):
    def absent(_):
        raise UserError("syntax masking needs the package HanTa")

    monkeypatch.setattr(inspection_captions, "Syntax", absent)
    facts = caption_facts("txt", [LONG, "a red bus"], [0, 1])
    assert {each.method for each in facts.reductions} == {"truncate", "random", "block"}
    assert all(each.nouns is None for each in facts.reductions)
    assert "needs the package HanTa" in facts.note


def test_pictures(seen):
    pictures = seen.pictures
    assert (pictures.read, pictures.unreadable) == (40, 1)
    assert pictures.first_unreadable.startswith("record 39: ")
    assert pictures.formats == {"jpeg": 40}
    assert (pictures.shorter_side.low, pictures.shorter_side.high) == (64, 96)
    assert (pictures.repeated, [(group.count, group.places) for group in pictures.same]) == (3, [(3, (20, 21, 22))])
    assert [group.places for group in pictures.near] == [(30, 31)]
    assert (pictures.alike, pictures.compared) == (2, 37)


def test_pictures_of_one_colour_say_nothing_about_each_other():
    pictures = Pictures("jpg")
    for place, colour in enumerate([(0, 0, 0), (200, 30, 30), (30, 30, 200)]):
        pictures.add(place, encoded(Image.new("RGB", (32, 32), colour), 90))
    facts = pictures.facts()
    assert (facts.alike, facts.compared, facts.repeated) == (0, 0, 0)


def test_neighbours_are_all_pairs_within_the_distance(monkeypatch):
    monkeypatch.setattr(inspection_pictures, "_ROWS", 7)
    hashes = np.random.default_rng(0).integers(0, 2**20, 60).astype(np.uint64)
    expected = {i: [j for j in range(60) if j != i and int(hashes[i] ^ hashes[j]).bit_count() <= 6] for i in range(60)}
    assert neighbours(hashes, 6) == {i: others for i, others in expected.items() if others}


def test_scores_and_values(seen):
    assert list(seen.scores) == ["similarity"]
    assert seen.scores["similarity"].n == 39
    assert seen.scores["similarity"].mean == pytest.approx(sum(n / 100 for n in range(1, 40)) / 39)
    assert seen.values == {"NSFW": {"UNLIKELY": 20, "UNSURE": 10, "missing": 10}}


def test_a_sample_is_of_all_shards_and_the_same_each_time(data):
    some = inspect(data, sample=10)
    assert (some.sampled, some.records, len(some.places)) == (10, 40, 10)
    assert some.places == inspect(data, sample=10).places
    assert min(some.places) < 15 <= max(some.places)
    assert some.captions.read == 10
    assert len(sample_places(10**13, 1000)) == 1000, "and takes no room for each record"


def test_damaged_records_are_counted(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    path = copy / "pairs-train.tfrecord-00000-of-00002"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    assert inspect(copy).damaged == 1
    assert "1 damaged records" in inspect_dataset(copy).page.read_text()


def test_a_damaged_record_is_left_out_of_the_wall(tmp_path):
    data = write_pairs(tmp_path / "data", [4, 3])
    path = data / "pairs-train.tfrecord-00000-of-00002"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    summary = inspect_dataset(data)
    assert summary.inspection.damaged == 1
    assert sorted(tile["place"] for tile in contents(summary.inspection)["tiles"]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("values", "whole", "low", "high"),
    [([3.0], False, 3, 3), ([1, 1, 1], True, 1, 1), (list(range(500)), True, 0, 499), ([0.0, 0.0], False, 0, 0)],
)
def test_histograms_hold_every_value(values, whole, low, high):
    made = histogram_of(values, whole=whole)
    assert (sum(made.counts), made.n, made.low, made.high) == (len(values), len(values), low, high)
    assert len(made.edges) == len(made.counts) + 1
    assert "<svg" in histogram("title", made.counts, made.edges, x_name="x")
    assert not whole or all(edge == int(edge) for edge in made.edges)


def test_a_huge_value_does_not_flatten_a_histogram():
    made = histogram_of([*range(1000), 10**9], whole=True)
    assert made.edges[-1] < 1100
    assert sum(made.counts) == 1001
    assert histogram_of([float("nan")]) is None


def test_labelled_pictures_have_labels_and_no_captions(tmp_path, browser):
    features = {"image": Feature("image"), "label": Feature("label", num_classes=3), "file_name": Feature("text")}
    records = [{"image": picture(n * 12), "label": n % 2, "file_name": f"{n}.JPEG"} for n in range(9)]
    data = write_dataset(tmp_path / "d", {"validation": [records]}, features, manifest=False, image="image")
    (data / "label.labels.txt").write_text("tench\ngoldfish\nshark\n")
    summary = inspect_dataset(data, out=tmp_path / "out")
    seen = summary.inspection
    assert (seen.split, seen.captions, seen.values) == ("validation", None, {"label": {"tench": 5, "goldfish": 4}})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inspection.html", "inspection.json"]
    assert not (data / "clipkit").exists()
    browser.open(summary.page, 1200, "light")
    text = browser.evaluate("document.body.innerText")
    assert "goldfish" in text
    assert "Captions" not in text
    assert browser.problems() == []


def test_each_split_has_a_page_of_its_own(tmp_path):
    records = [[pair_columns(n) for n in range(4)]]
    data = write_dataset(tmp_path / "data", {"train": records, "validation": records})
    pages = [inspect_dataset(data, split=split).page.name for split in (None, "validation")]
    assert pages == ["inspection.html", "inspection-validation.html"]
    for name, split in (("inspection", "train"), ("inspection-validation", "validation")):
        assert json.loads((data / "clipkit" / f"{name}.json").read_text())["split"] == split
        assert f"<h1>pairs, {split}</h1>" in (data / "clipkit" / f"{name}.html").read_text()
        assert f"<code>{name}.json</code>" in (data / "clipkit" / f"{name}.html").read_text()


def test_an_output_that_takes_no_file_is_told_before_anything_is_read(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(Dataset, "read", lambda *_: pytest.fail("a record was read"))
    with pytest.raises(UserError, match=r"can't write .*choose another output"):
        inspect_dataset(data, out=tmp_path / "file" / "out")


def test_a_browser_shows_the_page(data, browser):
    page = inspect_dataset(data).page
    shots = []
    for width, scheme in ((1200, "light"), (390, "light"), (1200, "dark")):
        browser.open(page, width, scheme)
        pictures = browser.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(pictures) >= 24
        assert all(pictures)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        assert browser.evaluate("document.querySelectorAll('figure.chart svg').length") >= 5
        shots.append(browser.screenshot())
        assert browser.problems() == []
        assert browser.requests() == [page.as_uri()]
        text = browser.evaluate("document.body.innerText")
        for words in ("<b>bold & bad</b>", "What fewer text tokens keep", "UNSURE", "http-4xx", "seed 0", "no-caption"):
            assert words in text, words
        assert "NaN" not in text
        assert "None" not in text
        kept = browser.evaluate("document.querySelectorAll('.cuts mark').length")
        assert kept > 20
    assert shots[0].mean() > 180 > 90 > shots[2].mean(), "light is light and dark is dark"
    for outside in ("http://", "https://", 'src="/', "url("):
        assert outside not in page.read_text().replace("http://example.org", ""), outside


def test_the_numbers_beside_the_page_are_those_of_the_command(data, tmp_path):
    run = CliRunner().invoke(main, ["inspect", str(data), "--json", "--sample", "12", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    told, kept = json.loads(run.stdout), json.loads((tmp_path / "inspection.json").read_text())
    assert told.pop("page") == str(tmp_path / "inspection.html")
    assert told == kept
    assert (kept["sampled"], kept["captions"]["read"], kept["pictures"]["read"]) == (12, 12, 12)
    assert {each["method"] for each in kept["captions"]["reductions"]} == {"truncate", "random", "block", "syntax"}
    run = CliRunner().invoke(main, ["inspect", str(data), "--out", str(tmp_path)])
    assert run.stdout.splitlines()[-1] == f"the page: {tmp_path / 'inspection.html'}"
    assert "1 can't be read: clipkit verify says which" in run.stdout
    assert "captions: mean 9.3 tokens, 6 repeated\npictures: median shorter side 80 px, 3 repeated" in run.stdout


def test_a_dataset_in_a_store(tmp_path):
    local = write_pairs(tmp_path / "data", [4, 3])
    store = as_path("memory://test-inspect/data")
    for file in local.rglob("*"):
        if file.is_file():
            (store / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
    summary = inspect_dataset(store)
    assert json.loads((store / "clipkit" / "inspection.json").read_text())["records"] == 7
    assert summary.page.read_text().startswith("<!doctype html>")


def test_what_cannot_be_inspected(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        inspect(tmp_path / "nothing")
    empty = write_dataset(tmp_path / "empty", {"train": [[]]})
    with pytest.raises(UserError, match="holds no records"):
        inspect(empty)
    with pytest.raises(UserError, match="has no split 'test'"):
        inspect(empty, split="test")
