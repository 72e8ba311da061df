"""Zero-shot classification: labelled images, class names in prompts, and what the model guesses.

- `images`: labelled images of any kind as one thing.
- `labelled`: labelled images from a dataset, a folder for each class, parquet files, or webdataset tars.
- `webdataset`: the tars, in the layout of CLIP_benchmark and DataComp.
- `imagenet`: which classes ImageNet's relatives have; ReaL.
- `labels`: what stands in a label column as numbers, and what the classes are called.
- `prompts`: class names in templates, and the classifier that the model makes of them.
- `task`: labelled images, classes and the prompts of both, ready for any model.
"""
