"""`clipkit purge`: take the records of a list out of a dataset for good.

- `command`: the whole purge in order, and its summary
- `removals`: the list, its file and column, and a form of it that takes 16 bytes an entry
- `shard`: what a purge has begun, and what a worker does with one shard: find the records, and write it without them
- `ledger`: the same in the account that a download left
- `finish`: the log and the list of all that was purged, and what `rewriting` does at the end
"""
