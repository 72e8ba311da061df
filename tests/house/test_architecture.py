"""docs/architecture.md can't go stale: its picture is drawn from the table, and its walks name files that are there."""

import re

from docs_scripts import load_script
from rooms import MAY_IMPORT, ROOT

PAGE = ROOT / "docs" / "architecture.md"


def test_the_picture_is_that_of_the_table():
    assert (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8") == load_script("architecture").draw(), (
        "run `make docs`"
    )


def test_the_page_names_every_room_and_only_files_that_are_there():
    text = PAGE.read_text(encoding="utf-8")
    assert {room for room in MAY_IMPORT if f"`{room}/`" not in text} == set()
    named = set(re.findall(r"`((?:clipkit|tfrecord_tools|train|eval|tests)/[\w/.]+\.py)`", text))
    assert {name for name in named if not (ROOT / name).is_file()} == set()
