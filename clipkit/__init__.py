"""Train and evaluate CLIP models on a budget.

The core library; its stages are `clipkit.tfrecord_tools`, `clipkit.train` and `clipkit.eval`.

`load` gives a model of any origin.

- `config`: configurations, `--set key=value`, and JSON.
- `checkpoint`: folders with weights, optimizer state and the position in the data.
- `device`: CPU, CUDA and XLA, told apart here and nowhere else; `hardware`: the chips by their data sheets.
- `choices`: the closed lists that recipes and models choose from.
- `counter_rng`: random numbers that are a function of the sample's position.
- `log`: progress, warnings, and the metrics of a run.
- `errors`: the two kinds of failure that are shown as one line.
- `formatting`: sizes, times and shares as people read them.
- `intervals`: confidence intervals of what was counted.
- `embedded`: the data inside the package: the demo's emoji, CLIP's vocabulary, ImageNet's classes and templates,
  published numbers.

The rooms: `cli/` (the commands), `model/`, `interop/` (others' weights), `export/` (ours in others' formats),
`embedding/` (images and texts to vectors), `text/`, `pixels/`, `formats/` (datasets, tables, tars), `storage/` (files
and stores), `jobs/` (one function over many shards), `page/` (HTML pages).
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.embedding.script import LoadedModel

__version__ = "0.1.0"


def load(
    source: str | Path, *, ema: bool = False, tokenizer: Path | None = None, device: str = "auto"
) -> "LoadedModel":
    """The model that `source` names, of any origin (`clipkit zeroshot --ckpt`), ready to encode images and texts.

    `tokenizer` is the vocabulary's file where the model comes without.
    """
    from clipkit.device import pick
    from clipkit.embedding.script import LoadedModel
    from clipkit.interop.load import load

    return LoadedModel(load(source, ema=ema, vocabulary=tokenizer), pick(device))
