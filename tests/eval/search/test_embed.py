"""A file of vectors holds what the model gives, row by row; a run that was killed ends with the same bytes."""

import dataclasses
import io
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from ranks import run_ranks
from small_dataset import pair_columns, write_dataset
from small_encoder import SMALL, small_run

import clipkit
from clipkit.cli.main import main
from clipkit.cli.search import open_pictures
from clipkit.errors import UserError
from clipkit.eval.search.embed import embed
from clipkit.eval.search.find import find_in_file, find_in_pictures, query_vector
from clipkit.eval.search.pictures import Picture, Pictures
from clipkit.eval.search.vectors import matrix_of, open_vectors
from clipkit.interop.load import load
from clipkit.model.clip import build


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), seed=3)


def png(number: int) -> bytes:
    pixels_HWC = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A parquet file of pictures with captions, the last without words."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    captions = [f"picture {number} of {'many' * (number % 3)}" for number in range(39)] + [""]
    pq.write_table(pa.table({"image": [png(number) for number in range(40)], "caption": captions}), path)
    return path


def run(*arguments):
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("float32", 1e-6)])
def test_rows_are_what_the_model_gives(model, pairs, tmp_path, dtype, tolerance):
    out = tmp_path / "out.parquet"
    done = run("embed", pairs, out, "--ckpt", model, "--dtype", dtype, "--batch-size", 7, "--device", "cpu", "--json")
    summary = json.loads(done.stdout)
    assert (summary["records"], summary["unreadable"], summary["captions"], summary["dimensions"]) == (
        40,
        0,
        39,
        SMALL.embed_dim,
    )
    table = pq.read_table(out)
    loaded = clipkit.load(model, device="cpu")
    assert table.schema.field("image").type == pa.list_(
        pa.float16() if dtype == "float16" else pa.float32(), SMALL.embed_dim
    )
    expected_NE = loaded.encode_image([png(number) for number in range(40)])
    np.testing.assert_allclose(matrix_of(table["image"]), expected_NE, atol=tolerance)
    captions = [caption for row in table["captions"].to_pylist() for caption in row]
    texts_NE = matrix_of(table["texts"].combine_chunks().flatten())
    np.testing.assert_allclose(texts_NE, loaded.encode_text(captions), atol=tolerance)
    assert [len(row) for row in table["texts"].to_pylist()] == [1] * 39 + [0]
    assert len(set(table["key"].to_pylist())) == 40 and table["problem"].null_count == 40
    found = open_vectors(out)
    assert (found.rows, found.about["weights"], found.about["dtype"]) == (40, loaded.encoder.weights, dtype)
    assert found.about["precision"] == "float32" and open_vectors(pairs) is None


def embed_until_killed(model: str, pairs: str, out: str) -> None:
    """In a process of its own: see `killed_builds`."""
    import torch
    from killed_builds import kill_at_each_rename

    torch.set_num_threads(1)
    encoder, pictures = load(model), open_pictures(pairs, None, None)

    def build_file():
        with patch("clipkit.eval.search.embed.load", lambda *_, **__: encoder):
            return embed(pictures, Path(out) / "out.parquet", model, device="cpu", batch_size=4, part_rows=15).to_json()

    kill_at_each_rename(build_file, Path(out), least=4)


def test_a_run_that_was_killed_ends_with_the_same_file(model, pairs, tmp_path):
    (output,) = run_ranks(embed_until_killed, str(model), str(pairs), str(tmp_path / "out"), ranks=1)
    assert output.splitlines()[-1] == "the same"


def test_the_same_weights_with_another_activation_are_another_model(model, pairs, tmp_path, monkeypatch):
    """What a first try with the wrong one of two configurations made isn't kept, nor gone on with."""
    pictures, out, real = open_pictures(str(pairs), None, None), tmp_path / "out.parquet", load

    def quick(source, **options):
        encoder = real(source, **options)
        act = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, act="quick_gelu"))
        other = build(act, seed=3).eval()
        assert encoder.weights == dataclasses.replace(encoder, model=other).weights
        return dataclasses.replace(encoder, model=other)

    embed(pictures, out, model, device="cpu", batch_size=4, part_rows=12)
    open_vectors(out).require_model(real(model))
    with pytest.raises(UserError, match=r"the same weights run otherwise \(image tower, act: gelu -> quick_gelu\)"):
        open_vectors(out).require_model(quick(model))
    monkeypatch.setattr("clipkit.eval.search.embed.load", quick)
    with pytest.raises(UserError, match=r"another model \(image tower, act: gelu -> quick_gelu\): remove it"):
        embed(pictures, out, model, device="cpu", batch_size=4, part_rows=12)


def test_parts_that_are_there_are_not_made_again(model, pairs, tmp_path):
    pictures, out = open_pictures(str(pairs), None, None), tmp_path / "out.parquet"
    embed(pictures, out, model, device="cpu", batch_size=4, part_rows=12)
    whole = out.read_bytes()
    out.unlink()

    def broken(first):
        for place, picture in enumerate(pictures.read(first), first):
            if place == 25:
                raise KeyboardInterrupt
            yield picture

    with pytest.raises(KeyboardInterrupt):
        embed(dataclasses.replace(pictures, read=broken), out, model, device="cpu", batch_size=4, part_rows=12)
    assert len(list((tmp_path / ".out.parquet.parts").glob("*.parquet"))) == 2 and not out.exists()
    asked = []

    def watched(first):
        asked.append(first)
        return pictures.read(first)

    embed(dataclasses.replace(pictures, read=watched), out, model, device="cpu", batch_size=4, part_rows=12)
    assert asked == [20] and out.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_labelled_images_keep_their_labels(model, tmp_path):
    for label, numbers in (("cat", (1, 2)), ("dog", (3,))):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in numbers:
            (tmp_path / "set" / label / f"{number}.png").write_bytes(png(number))
    out = tmp_path / "out.parquet"
    done = run("embed", tmp_path / "set", out, "--ckpt", model, "--device", "cpu", "--precision", "float32")
    assert "images with labels" in done.stderr and "vectors of 3 images, 32 numbers each" in done.stdout
    assert pq.read_table(out)["label"].to_pylist() == ["cat", "cat", "dog"]
    assert open_vectors(out).about["precision"] == "float32"
    parquet = tmp_path / "kinds.parquet"
    pq.write_table(pa.table({"image": [png(1), png(2)], "caption": ["a", "b"], "kind": ["x", "y"]}), parquet)
    run("embed", parquet, tmp_path / "kinds-out.parquet", "--ckpt", model, "--device", "cpu", "--label", "kind")
    assert pq.read_table(tmp_path / "kinds-out.parquet")["label"].to_pylist() == ["x", "y"]


def with_a_bad_image(total: int) -> Pictures:
    def read(first):
        return (
            Picture(b"no image" if place == min(5, total - 1) else png(place), label="a")
            for place in range(first, total)
        )

    return Pictures(Path("set"), total, str, read, "identity", captioned=False)


def test_an_image_that_cannot_be_read_is_a_row_with_its_reason(model, tmp_path):
    summary = embed(with_a_bad_image(120), tmp_path / "out.parquet", model, device="cpu")
    assert summary.unreadable == 1 and "1 unreadable" in summary.text()
    table = pq.read_table(tmp_path / "out.parquet")
    assert [row for row, vector in enumerate(table["image"].to_pylist()) if vector is None] == [5]
    assert table["problem"][5].as_py() and table["problem"].null_count == 119
    hits = find_in_file(open_vectors(tmp_path / "out.parquet"), np.ones(SMALL.embed_dim, np.float32), 200)
    assert len(hits) == 119 and 5 not in {hit.record for hit in hits}
    with pytest.raises(UserError, match="1 of 2 images can't be read"):
        embed(with_a_bad_image(2), tmp_path / "few.parquet", model, device="cpu")


def test_a_file_of_other_things_is_not_replaced(model, pairs, tmp_path):
    out, other = tmp_path / "out.parquet", small_run(tmp_path / "other", seed=9)
    run("embed", pairs, out, "--ckpt", model, "--device", "cpu")
    before = out.read_bytes()
    for arguments, words in (
        (["--ckpt", other], "exists and has vectors of another model: remove it"),
        (["--ckpt", model, "--dtype", "float32"], "exists and has vectors of another dtype"),
    ):
        done = run("embed", pairs, out, *arguments, "--device", "cpu")
        assert done.exit_code == 2 and words in done.stderr
    for data, name, words in (
        (pairs, tmp_path / "out.txt", "call the output NAME.parquet"),
        (tmp_path / "absent", tmp_path / "x.parquet", "doesn't exist"),
        (pairs, pairs, "exists and isn't a file of vectors"),
    ):
        done = run("embed", data, name, "--ckpt", model, "--device", "cpu")
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("Error") == 1
    assert out.read_bytes() == before
    pictures = open_pictures(str(pairs), None, None)
    (tmp_path / ".new.parquet.parts").mkdir()
    (tmp_path / ".new.parquet.parts" / "about.json").write_text("{}")
    with pytest.raises(UserError, match=r"\.parts has vectors of another model.*which a run left"):
        embed(pictures, tmp_path / "new.parquet", model, device="cpu")


def labelled_table(path: Path, first: int) -> Path:
    pq.write_table(pa.table({"image": [png(first + n) for n in range(4)], "label": ["a", "a", "b", "b"]}), path)
    return path


def labelled_folders(path: Path, first: int) -> Path:
    for number, label in enumerate("ab"):
        (path / label).mkdir(parents=True)
        (path / label / "0.png").write_bytes(png(first + number) + bytes(first))  # noise is of one size
    return path


def captioned_dataset(path: Path, first: int) -> Path:
    """A dataset directory as `build-tfds` makes it: of one name and length whatever the images are."""
    records = [pair_columns(number, txt=f"a caption {number + first}") for number in range(4)]
    return write_dataset(path / "pairs" / "1.0.0", {"train": [records]})


@pytest.mark.parametrize("write_set", [labelled_table, labelled_folders, captioned_dataset])
def test_other_images_of_the_same_names_and_labels_are_other_data(model, tmp_path, write_set):
    """The file that is there isn't taken for one of other data, of which there are as many under the same keys."""
    out = tmp_path / "out.parquet"
    label = ["--label", "label"] if write_set is labelled_table else []
    sets = [write_set(tmp_path / f"{first}.parquet", first) for first in (0, 100)]
    assert run("embed", sets[0], out, "--ckpt", model, "--device", "cpu", *label).exit_code == 0
    before = out.read_bytes()
    done = run("embed", sets[1], out, "--ckpt", model, "--device", "cpu", *label)
    assert (done.exit_code, out.read_bytes() == before) == (2, True)
    assert f"{out} exists and has vectors of other data: remove it" in done.stderr
    assert run("embed", sets[0], out, "--ckpt", model, "--device", "cpu", *label).exit_code == 0


# ---- Search ----------------------------------------------------------------------------------------------------------


def test_a_file_and_its_data_give_the_same_images(model, pairs, tmp_path):
    pictures, out = open_pictures(str(pairs), None, None), tmp_path / "out.parquet"
    embed(pictures, out, model, device="cpu", dtype="float32", part_rows=12)
    loaded = clipkit.load(model, device="cpu")
    query_E = query_vector(loaded, None, write(tmp_path / "7.png", png(7)))
    cosine_N = loaded.encode_image([png(number) for number in range(40)]) @ query_E
    expected = np.argsort(-cosine_N, kind="stable")[:9].tolist()
    there = find_in_file(open_vectors(out), query_E, 9)
    live = find_in_pictures(loaded, pictures, query_E, 9, batch_size=7)
    assert [hit.record for hit in there] == [hit.record for hit in live] == expected and expected[0] == 7
    assert [hit.key for hit in there] == [hit.key for hit in live]
    assert [hit.said for hit in there] == [hit.said for hit in live]
    assert [hit.image for hit in live] == [png(number) for number in expected]
    np.testing.assert_allclose([hit.similarity for hit in there], cosine_N[expected], atol=1e-6)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_model_that_gives_no_numbers_finds_nothing(model, pairs):
    loaded = clipkit.load(model, device="cpu")
    torch.nn.init.constant_(loaded.encoder.model.state_dict()["image_projection.weight"], float("nan"))
    with pytest.raises(UserError, match="the model gives NaN"):
        find_in_pictures(loaded, open_pictures(str(pairs), None, None), loaded.encode_text("red"), 3, batch_size=7)


def test_the_command_finds_and_shows(model, pairs, tmp_path):
    out, page = tmp_path / "out.parquet", tmp_path / "found.html"
    run("embed", pairs, out, "--ckpt", model, "--device", "cpu")
    by_file = run("search", out, "picture 3 of ", "--top", 3, "--json", "--page", page, "--device", "cpu")
    rows = [json.loads(line) for line in by_file.stdout.splitlines()]
    assert len(rows) == 3 and set(rows[0]) == {"record", "key", "similarity", "said"}
    assert rows[0]["similarity"] >= rows[1]["similarity"] >= rows[2]["similarity"]
    html = page.read_text(encoding="utf-8")
    assert html.count('<img src="data:image/webp;base64,') == 3 and rows[0]["said"][0] in html
    live = run("search", pairs, "picture 3 of ", "--ckpt", model, "--top", 3, "--batch-size", 9, "--device", "cpu")
    assert [line.split()[1] for line in live.stdout.splitlines()] == [row["key"].split()[0] for row in rows]
    averaged = small_run(tmp_path / "run", seed=9, averages=3)
    asked = ["search", pairs, "picture 3 of ", "--ckpt", averaged, "--top", 3, "--device", "cpu"]
    assert run(*asked, "--ema").stdout == live.stdout != run(*asked).stdout
    image = write(tmp_path / "7.png", png(7))
    found = run("search", out, "--image", image, "--top", 1, "--ckpt", model, "--device", "cpu").stdout
    assert found.startswith("1.000  ") and "picture 7 of" in found


def test_a_page_has_the_pictures_that_the_vectors_are_of(model, tmp_path):
    """The data have another split of as many records, which is the one that is read unless said."""
    splits = {
        name: [[pair_columns(number, txt=f"{name} {number}") for number in range(4)]] for name in ("train", "test")
    }
    data, out, page = write_dataset(tmp_path / "1.0.0", splits), tmp_path / "out.parquet", tmp_path / "page.html"
    assert run("embed", data, out, "--ckpt", model, "--split", "test", "--device", "cpu").exit_code == 0
    asked = ["search", out, "a bird", "--top", 2, "--device", "cpu"]
    found = run(*asked).stdout
    shown = run(*asked, "--page", page)
    assert (shown.exit_code, page.exists()) == (2, False)
    assert f"{out} has vectors of other data than {data} gives now: name the split" in shown.stderr
    shown = run(*asked, "--page", page, "--split", "test")
    assert (shown.exit_code, shown.stdout) == (0, found) and "  test " in found


def test_what_cannot_be_searched_is_one_line(model, pairs, tmp_path):
    out, other = tmp_path / "out.parquet", small_run(tmp_path / "other", seed=9)
    run("embed", pairs, out, "--ckpt", model, "--device", "cpu")
    for arguments, words in (
        ([out, "a cat", "--ckpt", other], "has vectors of other weights"),
        ([pairs, "a cat"], "--ckpt is needed"),
        ([out, "a cat", "--ema"], "--ema needs --ckpt"),
        ([out], "search by one thing"),
        ([out, "a cat", "--image", "x.png"], "search by one thing"),
        ([out, " "], "the query is blank"),
        ([out, "--image", tmp_path / "gone.png"], "can't read the image"),
        ([out, "a cat", "--page", tmp_path / "page.txt"], "call it NAME.html"),
        ([tmp_path / "absent", "a cat", "--ckpt", model], "doesn't exist"),
    ):
        done = run("search", *arguments, "--device", "cpu")
        assert done.exit_code == 2 and words in done.stderr, arguments
        assert done.stderr.count("Error: ") == 1 and done.stderr.splitlines()[-1].startswith("Error: ")
