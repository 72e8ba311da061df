"""Looking after a run.

- `metrics`: the numbers of a log line that come from the model and its last step.
- `diagnosis`: a loss that isn't finite, or stays at chance: what is written of it, and how the run goes on.
- `stopwatch`: the time spent waiting for data, and what would help.
- `captions`: what is said of the first captions, where there is nothing to learn from them.
"""
