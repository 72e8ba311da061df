"""From encoded bytes to pixels, for training and evaluation alike.

- `images`: decoding, resizing and normalising
- `phash`: a perceptual hash, to find the same picture in other bytes
- `csrc/`: the compiled decoder that crops a JPEG while it decodes (optional)
"""
