"""Where training reads its pairs of image and caption from.

- `open`: what `--data` names is found out, opened and mixed.
- `source`: what a source is; the sources over the records of a dataset, with captions or with labels.
- `tars`: webdataset tars.
- `parquets`: parquet files with images.
- `features`: the vectors that a frozen image tower made once.
- `folder`: a folder of images with a table.
- `index`: the index of shards that have none.
- `mixture`: several sources by weight, in an order that is a function of the position.
- `ahead`: fetching what the order wants next.
"""
