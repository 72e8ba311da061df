"""A model at work: a dataset's vectors in a file, images put under labels, images found for a query.

- `pictures`: images to embed, with captions or a label, in a fixed order, from any place on.
- `vectors`: the parquet file of vectors: its columns, what it was made by, how it is read.
- `embed`: all images and captions of a dataset into such a file, resumable.
- `score`: how similar each image and its caption are, into a table, by the same parts.
- `classify`: images and any labels.
- `find`: the images nearest to a text or an image, of a dataset or of such a file.
- `page`: the answers as a page with pictures.
"""
