"""Evaluation of models, and the page that tells a run's whole story.

- `evaluation`: one model on one task of any kind, as a command and while training.
- `datasets`: what the names of DataComp's 38 datasets promise.
- `open`: data and a kind of task to what is measured.
- `suite`: many datasets in one command, and their average.
- `fleet`: many models on many datasets on a Ray cluster.
- `metrics`: accuracies with their intervals and chance levels. A new metric belongs here.
- `results`: what an evaluation leaves in a run: numbers, guesses, and these counted by class.
- `tables`: results as text, Markdown, LaTeX and CSV.

The rooms: `classification/`, `retrieval/`, `choice/` (compositionality), `probe/` (linear probes, few shots, nearest
neighbours), `comparison/` (several models), `report/` (the page), and `search/` (a model at work).
"""
