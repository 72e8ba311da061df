"""Looking after a run.

- `metrics`: the numbers of a log line that come from the model and its last step.
- `diagnosis`: a loss that isn't finite, or stays at chance: what is written of it, and how the run goes on.
- `overfit`: a health check: can a recipe learn a few samples by heart?
- `trackers`: W&B and MLflow, beside the run's own metrics.
- `stopwatch`: the time spent waiting for data, and what would help.
- `static_shapes`: stops a run whose step is compiled again and again.
- `captions`: what is said of the first captions, where there is nothing to learn from them.
"""
