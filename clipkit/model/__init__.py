"""The CLIP model and its losses.

- `clip`: the model: building, initial weights, loading a checkpoint's tensors; where to begin
- `config`: what a model is made of, as plain data
- `image_tower`, `text_tower`: the two encoders; `timm_tower`: image models of timm's that are no vision transformers
- `heads`: from frozen towers' vectors into a shared space
- `flops`: what a sample costs, in tokens and operations
- `loss`: InfoNCE and SigLIP's sigmoid loss, tile by tile, on one device or several; `global_loss`: FastCLIP's, with
  its running normalisers; `distill`: the affinities of teachers; `exchange`: what processes tell each other for them
"""
