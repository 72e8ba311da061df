"""The CLIP model and its losses.

- `clip`: the model: building, initial weights, loading a checkpoint's tensors; where to begin
- `config`: what a model is made of, as plain data
- `image_tower`, `text_tower`: the two encoders
- `flops`: what a sample costs, in tokens and operations
- `loss`: InfoNCE and SigLIP's sigmoid loss, on one device or several
"""
