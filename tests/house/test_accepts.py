"""The section "What clipkit accepts" of docs/data.md says what the code's lists say."""

import importlib.util

from rooms import ROOT


def test_the_section_is_that_of_the_lists():
    spec = importlib.util.spec_from_file_location("accepts", ROOT / "docs" / "accepts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "data.md").read_text(encoding="utf-8") == module.write(), "run `make docs`"
