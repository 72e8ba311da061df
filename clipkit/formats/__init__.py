"""What clipkit's data look like on the disk: datasets, and the tables and tars that they are made of.

- `tables`: which files are tables, which columns are image, caption, URL and key, and the reader of all of them.
- `captions`: what a caption may look like: text, bytes, a list of several.
- `text_file`: the first line of a CSV or TSV file, and how a field of it is quoted.
- `text_quotes`: what the quotes of a whole file mean.
- `folders`: which folders are splits or classes, and which files in them are images.
- `shards`: which files of a folder hold pairs, by kind and split.
- `kinds`: the types of metadata columns, found while records are written.
- `records`: TFRecord files and the tf.train.Examples in them.
- `tar`: headers of tars, and where the members of each sample stand.
- `features`: what a dataset's columns hold.
- `manifest`: what went into each shard, and what was left out and why.
- `dataset`: a dataset directory, opened for reading any record.
"""
