"""Training, from a recipe and a dataset to a run's folder.

- `loop`: the training loop, which reads from top to bottom.
- `run`: what a run shares and where it stands; how it saves, evaluates and describes itself.
- `saving`: checkpoints that are written while the run goes on.
- `catalogue`: the recipes by name, and those from TOML files. A new recipe belongs here.
- `recipes`: what a recipe is, and which values its fields take; `augmentation`: its part for training images.
- `checks`: a recipe held to a device, data and a tokenizer before the run.
- `start`: where a run starts, and what may have changed when it goes on.
- `order`: which record comes when, from the seed and the samples seen.
- `step`: one optimizer step.
- `optimizer`: the optimizer of a recipe, the averages of the weights, and the learning rate of each step.
- `stopping`: how a signal ends a run in good order.

The rooms: `sources/` (training data from where people have them), `loader/` (records to batches), `fit/` (how a machine
runs a recipe), `watch/` (looking after a run), `teachers/` (embeddings of other models to learn from), `bench/` (how
fast the loader is on a machine), `plan/` (what a run costs and scores, before it), `sweep/` (sizes, token lengths and
budgets on one's own data, and the law that they follow).
"""
