"""Train and evaluate CLIP models on a budget. The stages are `clipkit.tfrecord_tools`, `clipkit.train`, `clipkit.eval`."""

__version__ = "0.1.0"
