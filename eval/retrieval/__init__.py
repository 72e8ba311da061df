"""Retrieval: images find their captions among all captions, and captions their image among all images.

- `annotations`: files that name images and their captions: Karpathy's and COCO's JSON, Flickr's tables, others.
- `captioned`: images with their captions from such a file, a dataset, tars or parquet.
- `ranks`: the place of the right answer for every image and caption, in tiles of embeddings on the disk.
- `scores`: recall and median rank, with intervals and chance.
- `task`: captioned images, ready for any model.
"""
