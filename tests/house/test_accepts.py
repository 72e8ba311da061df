"""The section "What clipkit accepts" of docs/data.md says what the code's lists say."""

from docs_scripts import load_script
from rooms import ROOT


def test_the_section_is_that_of_the_lists():
    assert (ROOT / "docs" / "data.md").read_text(encoding="utf-8") == load_script("accepts").write(), "run `make docs`"
