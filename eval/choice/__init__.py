"""Compositionality: the right one of a few captions of an image, or of a few images for a caption.

- `questions`: the questions of SugarCrepe, Winoground, ARO, MMVP, WinoGAViL and what looks like them.
- `task`: questions, ready for any model, and what counts as right of them.
"""
