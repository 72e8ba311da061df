"""`clipkit build-tfds`: image shards of any kind become a dataset directory that TFDS opens.

- `command`: the whole build in order
- `plan`: what is asked for, and how the line of image shards is cut
- `passes`: hashing, comparing, writing, sorting and gathering, each over all stretches
- `prepare`: what happens to each sample: `--where`, `--resize`, `--precompute`
- `shard`: what a worker does with one stretch
- `dedup`: `--dedup` in flat memory
- `shuffle`: `--shuffle` and several splits in flat memory
- `sorted_rows`: rows sorted by key, on the way of both
"""
