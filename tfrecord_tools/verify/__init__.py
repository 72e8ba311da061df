"""`clipkit verify`: is a dataset, or a folder of img2dataset's tars, what its metadata say?

- `command`: the whole check in order, and its summary
- `problems`: what a problem is, and the remedy for each kind
- `metadata`: the files beside the shards
- `shard`: what a worker does with a TFRecord shard
- `tar`: what a worker does with a tar
"""
