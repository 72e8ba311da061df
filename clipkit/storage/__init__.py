"""Files on a disk or in an object store: written whole or not at all, read in ranges, kept in a cache.

- `files`: paths, writing beside and renaming, JSON, arrays, locks; where to begin
- `stores`: the same for `s3://`, `gs://` and other stores, their errors, and the one loop that tries again
- `lease`: a lock on a folder of a store
- `ranges`: parts of local and remote files, for training
- `cache`: blocks of remote files on the local disk, shared by the processes of a machine
"""
