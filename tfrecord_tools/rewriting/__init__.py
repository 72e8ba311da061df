"""Writing the shards of a dataset again where they lie, for the commands that change records: purge and add-captions.

A kill at any moment loses nothing, and the same command given again ends what it began.

- `plan`: the journal that says what has been begun, and the folder of what it takes
- `shard`: one shard written again beside its place, and the state by which the next run knows that it is done
- `finish`: index and metadata after the shards, and the journal last
"""
