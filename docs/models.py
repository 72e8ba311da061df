"""docs/models.md: which of OpenCLIP's models run in clipkit's own model, in OpenCLIP's code, or not at all.

`python docs/models.py` (or `make docs`) writes it; `tests/clipkit/interop/test_openclip_models.py` compares, and holds
each native one against OpenCLIP's own model.
"""

import copy
from pathlib import Path
from typing import Any

import open_clip

from clipkit.interop.openclip_config import NotNativeError, native_config, tokenizer_name

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Which models

Written by `make docs` from the configurations of open_clip_torch {version}; a test compares it.

- **native**: runs in clipkit's own model. The test gives each of these random weights, at reduced depth and width, and
  finds OpenCLIP's features to 1e-4. It can also begin a training run (`--init`).
- **adapter**: runs in OpenCLIP's code (`pip install "clipkit[openclip]"`), evaluated by clipkit in the same way.
- **not**: refused in one line, with the reason.

{counts}

| model | how | why |
|---|---|---|
"""


def kind_of(model_cfg: dict[str, Any]) -> tuple[str, str]:
    """`native`, `adapter` or `not`, and what of the model is the reason."""
    text = model_cfg["text_cfg"]
    if text.get("hf_model_name"):
        return "not", f"the text tower {text['hf_model_name']}"
    try:
        tokenizer_name(text)
    except NotNativeError as reason:
        return "adapter", f"{reason}, with its `tokenizer.json` beside the weights"
    try:
        native_config(model_cfg)
    except NotNativeError as reason:
        return "adapter", str(reason)
    return "native", ""


def kinds() -> dict[str, tuple[str, str]]:
    """`kind_of` each of OpenCLIP's configurations."""
    return {name: kind_of(copy.deepcopy(open_clip.get_model_config(name))) for name in open_clip.list_models()}


def write(found: dict[str, tuple[str, str]]) -> str:
    """The page."""
    counts = ", ".join(f"{sum(kind == each for kind, _ in found.values())} {each}" for each in ("native", "adapter"))
    rest = sum(kind == "not" for kind, _ in found.values())
    head = HEAD.format(version=open_clip.__version__, counts=f"Of {len(found)}: {counts}, {rest} not.")
    return head + "".join(f"| {name} | {kind} | {reason} |\n" for name, (kind, reason) in found.items())


if __name__ == "__main__":
    PAGE.write_text(write(kinds()), encoding="utf-8")
