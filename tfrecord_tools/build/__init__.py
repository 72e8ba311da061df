"""`clipkit build-tfds`: image shards of any kind become a dataset directory that TFDS opens.

The image shards, one after the other, are one long line of samples. It is cut into stretches of equal size: what lies
between two cuts, be it a part of one image shard or many of them. A stretch is the unit of work of every pass.

- `command`: the whole build in order
- `plan`: what is asked for, and how the line is cut into stretches
- `passes`: hashing, comparing, surveying, choosing, writing, sorting and gathering, each over all stretches
- `prepare`: what happens to each sample: `--where`, `--resize`, `--precompute`
- `shard`: what a worker does with one stretch
- `dedup`: `--dedup` in flat memory
- `choose`: `--keep-best` and `--balance`, over the whole dataset
- `concepts`: what `--balance` balances by, and which of it a caption has
- `shuffle`: `--shuffle` and several splits in flat memory
- `sorted_rows`: rows sorted by key, which both use
"""
