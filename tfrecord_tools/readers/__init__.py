"""Image–text pairs out of files of any kind that `clipkit build-tfds` takes.

- `shards`: finds the files, cuts them into ranges and reads samples from a range.
- `tar`: webdataset tars.
- `parquet`: parquet files with images, and folders of images with a table.
- `records`: TFRecord files, of a dataset directory or of img2dataset.
"""
