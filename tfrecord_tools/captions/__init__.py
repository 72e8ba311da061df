"""`clipkit add-captions`: captions of another source, from a table, into the records of a dataset.

- `command`: the whole work in order, and its summary
- `table`: the table of captions: its columns, and a form of it that all workers look rows up in
- `shard`: what a worker does with one shard: find the rows, and write the records again with their captions
"""
