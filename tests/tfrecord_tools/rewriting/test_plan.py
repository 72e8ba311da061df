"""A journal, and the states of shards, that another version of clipkit has left."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_contents import contents
from small_dataset import pair_columns, write_dataset

from clipkit.errors import UserError
from clipkit.storage.files import read_json
from clipkit.tfrecord_tools.captions.command import add_captions
from clipkit.tfrecord_tools.purge.command import purge
from clipkit.tfrecord_tools.purge.shard import PurgePlan
from clipkit.tfrecord_tools.rewriting import finish
from clipkit.tfrecord_tools.rewriting.plan import read_plan, write_plan


@pytest.fixture
def data(tmp_path):
    shards = [[pair_columns(number) for number in range(start, start + 4)] for start in (0, 4, 8)]
    return write_dataset(tmp_path / "data", {"train": shards})


@pytest.fixture
def commands(tmp_path):
    """By its name, each command that writes shards again."""
    (tmp_path / "list.txt").write_text("".join(f"http://example.org/{number}.jpg\n" for number in (1, 9)))
    pq.write_table(pa.table({"key": ["000000001", "000000009"], "caption": ["one", "nine"]}), tmp_path / "t.parquet")
    return {
        "purge": lambda folder: purge(folder, tmp_path / "list.txt"),
        "add-captions": lambda folder: add_captions(folder, tmp_path / "t.parquet"),
    }


def change(path, values):
    path.write_text(json.dumps({**read_json(path), **values}))


@pytest.mark.parametrize("command", ["purge", "add-captions"])
def test_what_the_first_format_has_begun_is_ended(data, commands, tmp_path, monkeypatch, command):
    """It had more fields, which can be told from the others."""
    unbroken = shutil.copytree(data, tmp_path / "unbroken")
    commands[command](unbroken)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        commands[command](data)
    journal, work = data / "clipkit" / f"{command}.json", data / "clipkit" / command
    change(journal, {"format": 1} | ({"lengths": {"train": [4, 4, 4]}} if command == "purge" else {}))
    states = sorted(work.glob("shard-*.json"))
    assert len(states) == (2 if command == "purge" else 3)
    for state in states:
        change(state, {"records": 3, "contents": 9, "removed": 1} if command == "purge" else {"added": 9})
    if command == "add-captions":
        plan = read_json(journal)
        change(journal, {"shards": [{k: v for k, v in shard.items() if k != "purged"} for shard in plan["shards"]]})
    commands[command](data)
    there, wanted = contents(data), contents(unbroken)
    assert there.keys() == wanted.keys()
    # The others have the name of the purge.
    assert {name for name in wanted if there[name] != wanted[name]} <= {
        "clipkit/purge-log.jsonl", "clipkit/purged.parquet", "clipkit/skipped-train.jsonl",
    }  # fmt: skip


def test_a_journal_of_another_version_is_refused(tmp_path):
    assert read_plan(tmp_path, PurgePlan) is None
    plan = PurgePlan({"train": "12"}, (), "now", "list.txt", "abc", "key", 0)
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path, PurgePlan) == plan
    change(tmp_path / "clipkit" / "purge.json", {"format": 3})
    with pytest.raises(UserError, match=r"purge\.json is of another version of clipkit: finish purge with the version"):
        read_plan(tmp_path, PurgePlan)
