"""Writing a dataset: pairs, and all that stands around the shards. Every command that makes a dataset ends here.

- `pair_writer`: image-text pairs as TFRecords, each column in its kind
- `pair_tar`: the same pairs as img2dataset's tars
- `finish`: index, list of skipped samples, manifest and TFDS's files, in this order
- `metadata`: `dataset_info.json` and `features.json`, without TFDS
- `summary`: what a build reports when it is done
"""
