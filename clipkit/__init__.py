"""Train and evaluate CLIP models on a budget.

The core library; its stages are `clipkit.tfrecord_tools`, `clipkit.train` and `clipkit.eval`.
"""

__version__ = "0.1.0"
