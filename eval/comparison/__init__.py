"""Models side by side: what can be compared, what differs, and what was published.

- `compare`: results of several models, matched by task and metric, told apart by their hashes.
- `significance`: whether a difference is more than chance, by the guesses behind two numbers or by their intervals.
- `published`: the numbers of known models, and the line of ImageNet's relatives.
- `text`: a comparison as tables, CSV and JSON.
"""
