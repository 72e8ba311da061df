"""Models side by side: what can be compared, what differs, and what was published.

- `compare`: results of several models, matched by task and metric, told apart by their hashes.
- `significance`: whether a difference is more than chance, by the guesses or by the intervals.
- `paired`: the difference of two numbers by the guesses behind them.
- `published`: the numbers of known models, and the line of ImageNet's relatives.
- `text`: a comparison as tables, CSV and JSON.
"""
