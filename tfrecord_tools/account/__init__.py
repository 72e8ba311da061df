"""What a download leaves beside its data, so that it can be gone on with, retried, and purged.

- `ledger`: what became of each row of a shard
- `shard_state`: where a shard's files lie, the state that says that they are whole, and a shard in another's place
- `captions`: what `clipkit add-captions` has added, so that no later download takes it away
- `purged`: what was purged from a dataset and must not come back
"""
