"""What simple classifiers read off a model's image features: they learn from training images, and no text is used.

- `ridge`: a linear probe in closed form, all its penalties from one decomposition.
- `neighbours`: the vote of the nearest training images.
- `task`: training and test images, ready for any model; seeded parts of the training images, to choose by and to draw.
"""
