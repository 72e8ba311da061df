"""Models in other projects' formats: written to a folder, and run there by that project's own package.

- `command`: `clipkit export`, from a checkpoint to a whole folder
- `openclip`, `hub`, `image_tower`, `graphs`: the formats of OpenCLIP, transformers, timm and ONNX
- `parity`: how far the exported model is from ours, on real images and texts
- `model_card`: the README.md beside the weights
"""
