"""Captions come to the records whose key or URL they have, all else stays, and a killed run is ended by the next."""

import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from image_shards import pair, write_tar
from small_dataset import PAIR_FEATURES, pair_columns, write_dataset
from tensorflow_process import with_tensorflow

from clipkit.cli.main import main
from clipkit.errors import UserError
from clipkit.formats.dataset import open_dataset
from clipkit.formats.features import Feature
from clipkit.formats.manifest import read_manifest
from clipkit.formats.records import encode_example, read_records
from clipkit.storage.files import as_path, read_json
from clipkit.tfrecord_tools.account.captions import refuse_added_captions
from clipkit.tfrecord_tools.build.command import build_tfds
from clipkit.tfrecord_tools.captions import command as adding
from clipkit.tfrecord_tools.captions.command import add_captions
from clipkit.tfrecord_tools.purge.command import purge
from clipkit.tfrecord_tools.rewriting import finish as ending
from clipkit.tfrecord_tools.rewriting.plan import work_folder
from clipkit.tfrecord_tools.rewriting.shard import ShardState
from clipkit.tfrecord_tools.verify.command import verify
from clipkit.train.loader.loader import batches
from clipkit.train.loader.samples import LoaderConfig, caption_hash
from clipkit.train.sources.open import open_source

COLUMN = "clipkit_captions_synthetic"


@pytest.fixture
def data(tmp_path):
    """Twelve pairs in three shards, one of them empty, and two in a split of their own."""
    train = [[pair_columns(n) for n in range(5)], [], [pair_columns(n) for n in range(5, 12)]]
    return write_dataset(tmp_path / "data", {"train": train, "test": [[pair_columns(n) for n in (3, 20)]]})


def write_table(path, rows, **columns):
    """A parquet table of a key and what is said of its image; other columns by name."""
    keys = [f"{number:09d}" for number in rows]
    pq.write_table(pa.table({"key": keys, "caption": list(rows.values()), **columns}), path)
    return path


def said(number):
    return f"a picture, number {number}, as a model sees it"


ROWS = {11: said(11), 3: said(3), 4: said(4), 500: said(500), 501: None, 5: "  ", 0: said(0)}


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "captions.parquet", ROWS)


def captions(data, split="train", column=COLUMN):
    dataset = open_dataset(data, split)
    return {int(dataset.example(i)["key"]): dataset.example(i)[column] for i in range(len(dataset))}


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_records_get_their_captions_and_are_otherwise_as_they_were(data, table):
    before = {split: [open_dataset(data, split).read(i) for i in range(n)] for split, n in (("train", 12), ("test", 2))}
    summary = add_captions(data, table)
    expected = {number: [said(number)] if number in (0, 3, 4, 11) else None for number in range(12)}
    assert captions(data) == expected
    assert captions(data, "test") == {3: [said(3)], 20: None}
    for split, records in before.items():
        for number, record in enumerate(records):
            columns = open_dataset(data, split).example(number)
            added = columns.pop(COLUMN)
            assert record == encode_example(columns)
            assert open_dataset(data, split).read(number) == encode_example({**columns, COLUMN: added})
    assert (summary.records, summary.joined, summary.without, summary.shards) == (14, 5, 9, 3)
    assert (summary.rows, summary.rows_joined, summary.rows_unmatched, summary.rows_without_caption) == (7, 4, 1, 2)
    assert summary.added
    assert summary.text().splitlines() == [
        f"captions of 'synthetic' in 5 of 14 records of {data}, {summary.bytes} B in 3 shards; 9 without one",
        "the table's 7 rows: 4 joined by key, 1 with a key that no record has, 2 without a caption",
    ]
    assert verify(data).problems == ()
    assert verify(data).leftovers == ()
    assert read_manifest(data)["train"].records == 12
    assert read_json(data / "clipkit" / "captions.json")["synthetic"]["rows_unmatched"] == 1


def test_several_captions_and_several_sources(data, tmp_path):
    add_captions(data, write_table(tmp_path / "a.parquet", {3: ["one", " ", "two"], 4: ["three"]}))
    urls = [f"http://example.org/{number}.jpg" for number in (3, 20)]
    (tmp_path / "alt.csv").write_text("url,alt\n" + "".join(f"{url},alt text\n" for url in urls))
    summary = add_captions(data, tmp_path / "alt.csv", source="alt", column="alt")
    assert (summary.by, summary.joined, summary.rows_unmatched) == ("url", 3, 0)
    assert captions(data)[3] == ["one", "two"]
    assert captions(data, column="clipkit_captions_alt") == {n: ["alt text"] if n == 3 else None for n in range(12)}
    source = open_source(data).source()
    assert source.caption_sources == ("original", "alt", "synthetic")
    (pair,) = source.pairs([3])
    assert pair.captions == ("picture number 3", "alt text", "one", "two")
    assert pair.added == {"alt": ["alt text"], "synthetic": ["one", "two"]}


def test_training_draws_what_was_added(data, table):
    add_captions(data, table)
    config = LoaderConfig(32, 16, 12, captions={"synthetic": 1, "original": 1})
    found = list(batches(open_source(data).source(), config, 0, 480, workers=0))
    drawn = {h for batch in found for h in batch.caption_B.tolist()}
    both = {text for n in range(12) for text in (f"picture number {n}", said(n) if n in (0, 3, 4, 11) else "")} - {""}
    assert drawn == {caption_hash(text) for text in both}
    plain = batches(open_source(data).source(), LoaderConfig(32, 16, 12), 0, 24, workers=0)
    originals = {caption_hash(f"picture number {n}") for n in range(12)}
    assert {h for batch in plain for h in batch.caption_B.tolist()} == originals


def test_the_same_command_again_changes_nothing(data, table):
    first = add_captions(data, table)
    before = contents(data)
    again = add_captions(data, table)
    assert contents(data) == before
    assert not again.added
    assert {**again.to_json(), "added": True} == first.to_json()
    assert "(there already)" in again.text()


def test_what_a_run_left_that_was_killed_at_its_very_end_is_removed(data, table):
    """The journal goes before the folder of the work: a kill between the two leaves the folder to the next run."""
    add_captions(data, table)
    before = contents(data)
    work = work_folder(data, "add-captions")
    work.mkdir()
    (work / "shard-00000.json").write_text("{}")
    assert not add_captions(data, table).added
    assert contents(data) == before and not work.exists()


def test_a_line_says_that_stored_teachers_become_stale(data, table, capsys):
    add_captions(data, table)
    assert "teachers" not in capsys.readouterr().err
    data.with_name("data.reinforced").mkdir()
    add_captions(data, table)  # nothing changes
    assert "teachers" not in capsys.readouterr().err
    add_captions(data, table, source="again")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "teachers" in line]
    assert line.startswith(f"Warning: {data}.reinforced has teachers' embeddings of the captions so far, and training")


def test_engines_and_workers_change_nothing(data, table, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    add_captions(data, table)
    add_captions(other, table, workers=2)
    one, two = contents(data), contents(other)
    assert {name: one[name] for name in one} == {name: two[name] for name in one}


def test_a_dataset_in_a_store(data, table):
    store = as_path("memory://test-captions/data")
    for name, content in contents(data).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    add_captions(data, table)
    assert add_captions(store, table).joined == 5
    assert {name: (store / name).read_bytes() for name in contents(data)} == contents(data)
    assert verify(store).leftovers == ()


def refusal(data, table, **options):
    before = contents(data)
    with pytest.raises(UserError) as error:
        add_captions(data, table, **options)
    assert contents(data) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_tables_are_refused_in_one_line_and_change_nothing(data, tmp_path):
    def table(rows, name="t.parquet", **columns):
        return write_table(tmp_path / name, rows, **columns)

    good = table({3: "a"}, "good.parquet")
    assert "is empty" in refusal(data, table({}, caption=pa.array([], pa.string())))
    assert "of 2 rows 2 have no caption, 0 others no key" in refusal(data, table({3: None, 4: " "}))
    assert "--column captoin" in (line := refusal(data, good, column="captoin")) and "did you mean caption?" in line
    assert "both key and url" in refusal(data, table({3: "a"}, url=["http://example.org/3.jpg"]))
    assert "not captions: name a column of text" in refusal(data, table({3: 0.5}))
    assert "structs of text, lang" in refusal(data, table({3: {"text": "a", "lang": "en"}}))
    pq.write_table(
        pa.table({"key": ["000000003", "000000004", "000000003"], "caption": list("abb")}), tmp_path / "twice"
    )
    (tmp_path / "twice").rename(tmp_path / "twice.parquet")
    line = refusal(data, tmp_path / "twice.parquet")
    assert "more than one row of 1 keys, such as '000000003': put the captions of an image into one row" in line
    pq.write_table(pa.table({"id": ["3"], "caption": ["a"]}), tmp_path / "id.parquet")
    assert "neither key nor url of the records (id, caption)" in refusal(data, tmp_path / "id.parquet")
    assert "--by key" in refusal(data, tmp_path / "id.parquet", by="key")
    assert "--source original" in refusal(data, good, source="original")
    assert "--source 'a b'" in refusal(data, good, source="a b")
    assert "none.parquet doesn't exist" in refusal(data, tmp_path / "none.parquet")


def test_keys_of_another_kind_are_shown_beside_the_records_own(data, tmp_path):
    """A folder of tars, and `clipkit embed`, number records by file: those aren't what the records have."""
    pq.write_table(pa.table({"key": ["00000.tar:3"], "caption": ["a"]}), tmp_path / "t.parquet")
    line = refusal(data, tmp_path / "t.parquet")
    assert "nothing was changed: the table has '00000.tar:3', the first record '000000003' in its column 'key'" in line
    assert verify(data).problems == ()


def test_rows_as_pandas_and_python_write_them(tmp_path):
    """Keys that are floats for want of some, text that is bytes, and NaN for what is missing."""
    features = PAIR_FEATURES | {"key": Feature("int")}
    data = write_dataset(tmp_path / "d", {"train": [[pair_columns(n, key=n) for n in range(4)]]}, features)
    table = pa.table({"key": [1.0, None, float("nan"), 3.0], "caption": [b"a", b"b", b"c", b"d"]})
    pq.write_table(table, tmp_path / "t.parquet")
    summary = add_captions(data, tmp_path / "t.parquet")
    assert (summary.joined, summary.rows_without_key, summary.rows_unmatched) == (2, 2, 0)
    assert captions(data) == {0: None, 1: ["a"], 2: None, 3: ["d"]}
    lines = [{"key": 0, "caption": float("nan")}, {"key": 2, "caption": "e"}, {"key": 3}]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = add_captions(data, tmp_path / "t.jsonl", source="b")
    assert (summary.joined, summary.rows_without_caption) == (1, 2)
    assert captions(data, column="clipkit_captions_b") == {0: None, 1: None, 2: ["e"], 3: None}


def test_records_without_keys_are_told_apart(tmp_path, table):
    features = {name: feature for name, feature in PAIR_FEATURES.items() if name not in ("key", "url")}
    data = write_dataset(tmp_path / "d", {"train": [[pair_columns(1, key=None, url=None)]]}, features)
    assert "neither key nor url of the records" in refusal(data, table)
    assert "the records have no column 'url' (jpg, similarity, txt)" in refusal(data, table, by="url")


def test_captions_of_another_table_need_another_name(data, table, tmp_path):
    add_captions(data, table)
    other = write_table(tmp_path / "other.parquet", {3: "b"})
    line = refusal(data, other)
    assert f"has captions of 'synthetic' from {table} already: give these another name with --source" in line
    assert add_captions(data, other, source="b").joined == 2


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=3),
    st.dictionaries(st.integers(0, 12), st.sampled_from([None, " ", "a", "b c"])),
)
def test_the_counts_add_up_on_both_sides(shards, rows):
    """Records may share a key, and rows may have keys of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_dataset(folder / "d", {"train": [[pair_columns(n) for n in shard] for shard in shards]})
        keys = [key for shard in shards for key in shard]
        filled = {key: text for key, text in rows.items() if text and text.strip()}
        table = write_table(folder / "t.parquet", rows) if rows else write_table(folder / "t.parquet", {1: ""})
        if not filled.keys() & set(keys):
            with pytest.raises(UserError, match=r"no key of|has no caption"):
                add_captions(data, table)
            assert open_dataset(data).features == PAIR_FEATURES
            return
        told = add_captions(data, table)
        assert [open_dataset(data).example(i)[COLUMN] for i in range(len(keys))] == [
            [filled[key]] if key in filled else None for key in keys
        ]
        assert told.joined == sum(key in filled for key in keys)
        assert told.joined + told.without == told.records == len(keys)
        assert told.rows_joined == len(filled.keys() & set(keys))
        assert told.rows == told.rows_joined + told.rows_unmatched + told.rows_without_caption == len(rows)
        assert verify(data).problems == ()


# ---- Killed ----------------------------------------------------------------------------------------------------------

# By its name, where each step is called from.
KILLED = {
    "write_plan": adding,
    "add_captions_to": adding,
    "write": ShardState,  # of a shard's state: the next step is its renaming
    "_finish": adding,
    "write_added": adding,
    "add_feature": adding,
    "write_index": ending,
    "write_manifest": ending,
    "_write_info": ending,
    "leave": ending,
}


@pytest.mark.parametrize("moment", KILLED)
def test_killed_at_any_step_nothing_is_lost(data, table, tmp_path, monkeypatch, moment):
    unbroken = shutil.copytree(data, tmp_path / "unbroken")
    add_captions(unbroken, table)
    whole, calls = getattr(KILLED[moment], moment), []

    def dies(*arguments, **options):
        calls.append(arguments)
        if moment == "write" or len(calls) == (2 if moment == "add_captions_to" else 1):
            if moment in ("write", "write_plan", "add_feature"):
                whole(*arguments, **options)  # killed just behind it
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(KILLED[moment], moment, dies)
        with pytest.raises(KeyboardInterrupt):
            add_captions(data, table)
    with pytest.raises(UserError, match=r"adding captions isn't finished, run the same clipkit add-captions command"):
        open_dataset(data)
    (problem,) = verify(data).problems
    assert (problem.file, problem.what) == ("clipkit/add-captions.json", "adding captions isn't finished")
    with pytest.raises(UserError, match="isn't finished"):
        purge(data, table, by="key")
    with pytest.raises(UserError, match=r"adding captions of 'synthetic' from .* isn't finished: run that command"):
        add_captions(data, table, source="other")
    assert add_captions(data, table).joined == 5
    assert contents(data) == contents(unbroken)


def test_a_dataset_of_tfds_itself_without_a_manifest(tmp_path, table):
    data = write_dataset(tmp_path / "d", {"train": [[pair_columns(n) for n in range(6)]]}, manifest=False)
    info = read_json(data / "dataset_info.json")
    info["citation"] = "kept as it is"
    size = sum(len(record) for record in read_records(data / "pairs-train.tfrecord-00000-of-00001"))
    info["splits"][0]["numBytes"] = str(size)
    (data / "dataset_info.json").write_text(json.dumps(info))
    summary = add_captions(data, table)
    after = read_json(data / "dataset_info.json")
    assert after["citation"] == "kept as it is"
    assert after["splits"][0]["numBytes"] == str(size + summary.bytes)
    assert captions(data)[4] == [said(4)]


READ_WITH_TFDS = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(arguments[0])
result = {
    split: [
        [int(each["key"]), [text.decode() for text in each[arguments[1]]]]
        for each in tfds.as_numpy(builder.as_dataset(split))
    ]
    for split in builder.info.splits
}
"""


def test_tfds_reads_them(data, table):
    add_captions(data, table)
    told = with_tensorflow(READ_WITH_TFDS, data, COLUMN)
    assert dict(told["train"]) == {n: [said(n)] if n in (0, 3, 4, 11) else [] for n in range(12)}
    assert told["test"] == [[3, [said(3)]], [20, []]]


def test_they_go_along_into_a_copy_and_stay_when_others_are_purged(data, table, tmp_path):
    add_captions(data, table)
    (tmp_path / "list.txt").write_text("http://example.org/4.jpg\n")
    assert purge(data, tmp_path / "list.txt").records == 1
    copy = build_tfds(data, tmp_path / "out", "copy", resize=32, progress=lambda _: None).path
    assert captions(copy) == captions(data) == {
        n: [said(n)] if n in (0, 3, 11) else None for n in range(12) if n != 4
    }  # fmt: skip
    assert open_source(copy).source().caption_sources == ("original", "synthetic")


def test_a_download_that_would_lose_them_is_refused(data, table):
    refuse_added_captions(data)
    add_captions(data, table)
    with pytest.raises(UserError, match="download into another folder, and add captions at the end"):
        refuse_added_captions(data)


def test_the_command_prints_the_counts_and_one_line_for_what_is_wrong(data, table):
    result = CliRunner().invoke(main, ["add-captions", str(data), str(table), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {name: told[name] for name in ("joined", "without", "rows_joined", "rows_unmatched")} == {
        "joined": 5, "without": 9, "rows_joined": 4, "rows_unmatched": 1,
    }  # fmt: skip
    wrong = CliRunner().invoke(main, ["add-captions", str(data), str(table), "--column", "text", "--source", "b"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("Error: --column text: ")


def test_lists_are_declared_as_tfds_declares_them(data, table):
    add_captions(data, table)
    assert open_dataset(data).features[COLUMN] == Feature("text", is_list=True)


def test_metadata_of_tars_may_hold_them_under_the_same_name(tmp_path):
    """webdataset reads KEY.json as it is, and a build takes its lists along as columns."""
    said_of = [{COLUMN: ["a cat", "a tabby"]}, {}, {COLUMN: ["a dog"]}]
    write_tar(tmp_path / "in" / "0.tar", [pair(n, txt=f"photo {n}", json=json) for n, json in enumerate(said_of)])
    copy = build_tfds(tmp_path / "in", tmp_path / "out", "copy", progress=lambda _: None).path
    source = open_source(copy).source()
    assert source.caption_sources == ("original", "synthetic")
    assert [found.captions for found in source.pairs(range(3))] == [
        ("photo 0", "a cat", "a tabby"), ("photo 1",), ("photo 2", "a dog"),
    ]  # fmt: skip
    config = LoaderConfig(32, 16, 3, captions={"synthetic": 1})
    with pytest.raises(UserError, match="the data have only captions of original: name one of these"):
        next(batches(open_source(tmp_path / "in").source(), config, workers=0))
