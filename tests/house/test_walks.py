"""The ways of a URL row, of a record and of a checkpoint are short, and docs/architecture.md tells them as they are."""

import json

import pytest
from ranks import run_ranks
from rooms import ROOT
from walks import main

# What stands here may only fall. Of a checkpoint 12 were aimed at, when it was of one origin and for one task; what
# every model and every task shares (`clipkit/embedding/`, `eval/evaluation.py`) is three more.
MOST = {"row": 25, "record": 15, "checkpoint": 17}


@pytest.fixture(scope="module")
def walks() -> dict[str, list[str]]:
    """Measured in a process that has imported everything but has called nothing yet."""
    (printed,) = run_ranks(main, ranks=1)
    return json.loads(printed)


@pytest.mark.parametrize("name", MOST)
def test_a_walk_is_short_and_described(walks, name):
    assert 5 < len(walks[name]) <= MOST[name]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [file for file in walks[name] if f"`{file}`" not in page] == []
