"""Teachers whose embeddings are computed once and stored beside the dataset (dataset reinforcement; MobileCLIP, 2024).

- `stored`: what is stored of each record, the random numbers of its views, and the source that hands both along.
- `reinforce`: `clipkit reinforce`, which computes and stores them.
- `attach`: stored embeddings held to a recipe and its data.
"""
