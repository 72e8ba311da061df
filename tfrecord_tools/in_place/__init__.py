"""`clipkit build-tfds --in-place`: img2dataset's TFRecord shards become a dataset where they lie, without a copy.

- `command`: the whole conversion in order, and its summary
- `shard`: what a worker does with one shard: scan it, and rewrite it if it must be
- `columns`: which columns TFDS can't read as they are, and their kinds
- `example_wire`: the forms of a record's columns, without decoding it
"""
