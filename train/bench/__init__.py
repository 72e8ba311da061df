"""`clipkit bench-data`: how fast the loader is on a dataset and a machine, and what to change.

- `command`: the measurements, of the loader as a whole, of reading, of a compact copy, and of a GPU's own pace.
- `findings`: what was measured, what follows from it, and how it is shown to people and scripts.
"""
