"""From image URLs to a dataset directory, and what is done to one: a room for each command.

- `reasons`: why a row or a sample gave no record: the closed list. A new reason belongs here.
- `outcome`: what became of one row of a URL table.
- `sample`: one pair of image and caption on its way from an image shard into a dataset.

The commands' rooms: `download/`, `build/`, `in_place/`, `labelled/`, `purge/`, `captions/`, `verify/`, `inspection/`.
What they share: `web/` (fetching), `tables/` (of URLs, and others), `readers/` (of pairs), `pictures/` (from a body to
the image that is stored), `writing/` (shards and a dataset's files), `account/` (what became of each row).
"""
