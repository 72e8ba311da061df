"""Evaluation of checkpoints, and the page that tells a run's whole story.

- `labelled`: labelled images from a dataset, a folder for each class, parquet files, or webdataset tars.
- `labels`: what stands in a label column as numbers, and what the classes are called.
- `task`: labelled images, classes and the prompts of both, ready for any model.
- `zeroshot`: classification by class embeddings, as a command and while training.
- `metrics`: accuracies with their intervals and chance levels. A new metric belongs here.
- `results`: what an evaluation leaves in a run: numbers and guesses.
- `report_data`: what a run's folder and its dataset tell, as plain values.
- `report`: the page made of these.
"""
