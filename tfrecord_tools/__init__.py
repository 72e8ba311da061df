"""From image URLs to a dataset directory: download, read shards, build TFRecords with TFDS metadata."""
