"""Train and evaluate CLIP models on a budget.

The core library; its stages are `clipkit.tfrecord_tools`, `clipkit.train` and `clipkit.eval`.

- `config`: configurations, `--set key=value`, and JSON.
- `checkpoint`: folders with weights, optimizer state and the position in the data.
- `device`: CPU, CUDA and XLA, told apart here and nowhere else.
- `counter_rng`: random numbers that are a function of the sample's position.
- `log`: progress, warnings, and the metrics of a run.
- `errors`: the two kinds of failure that are shown as one line.
- `formatting`: sizes, times and shares as people read them.
- `intervals`: confidence intervals of what was counted.
- `embedded`: the data inside the package: the demo's emoji, CLIP's vocabulary, ImageNet's classes and templates.

The rooms: `cli/` (the commands), `model/`, `interop/` (others' weights), `text/`, `pixels/`, `formats/` (datasets,
tables, tars), `storage/` (files and stores), `jobs/` (one function over many shards), `page/` (HTML pages).
"""

__version__ = "0.1.0"
