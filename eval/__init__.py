"""Evaluation of models, and the page that tells a run's whole story.

- `evaluation`: one model on one task of any kind, as a command and while training.
- `metrics`: accuracies with their intervals and chance levels. A new metric belongs here.
- `results`: what an evaluation leaves in a run: numbers and guesses.

The rooms: `classification/`, and `report/` (the page).
"""
