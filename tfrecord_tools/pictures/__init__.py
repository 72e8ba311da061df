"""Encoded images: what they are, whether they are whole, and how they become what is stored.

- `sniff`: the format by the first bytes, and whether a file was cut off.
- `picture`: from a fetched body to the JPEG that is stored, or the reason why not.
- `decode`: the decoding under `picture`, with damage told from oddities.
- `resizer`: img2dataset's Resizer, imported without what its package drags in.
- `compact`: small copies for training on few tokens.
- `hash_check`: whether a body is the one that a table's hash was made of.
"""
