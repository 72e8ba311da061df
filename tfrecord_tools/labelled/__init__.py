"""`clipkit build-imagenet`: ImageNet as people have it, or any folder of labelled images, becomes a TFDS dataset.

- `imagenet`: the whole build in order, its checks and its summary
- `listing`: the images of a source, in tars, class folders or a heap
- `labels`: classes for a heap of images
- `split`: one split, its shards planned, built and accounted for
- `shard`: what a worker does with one shard
"""
