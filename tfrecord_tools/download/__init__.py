"""`clipkit download`: from a table of URLs to a dataset, or to img2dataset's shards.

In the order in which a row passes through:

- `command`: the checks of tables and settings, before anything is fetched
- `plan`: the tables cut into shards, remembered for the next run
- `probe`: some rows fetched first, to say how the download will go
- `work`: what is missing, what is tried again, and the end
- `progress`: the line that shows how far it is
- `worker`: a batch of shards in a process that fetches
- `shard`: one shard whose rows are being fetched, and its files
- `output`: the records, the tar or the parquet file of a shard
- `finish`: the summary, and the files around a dataset
"""
