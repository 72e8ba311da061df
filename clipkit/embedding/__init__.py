"""Images and texts to unit vectors, by any model.

- `encoder`: a model with all that it takes to use it, whoever made it; how it is to be computed, and by which ranks.
- `vectors`: many encoded images, decoded on all cores ahead of the model, counted and hashed; many texts, each
  different one encoded once, in batches of about equal length.
- `cached`: embeddings that were computed before, kept on the disk.
- `script`: a model in a script: images and texts in, arrays out.
"""
