"""`clipkit sweep`: sizes, token lengths and budgets trained on one's own data, and the law that they follow.

- `command`: a sweep from its file to its report, here or on a cluster, and what it is predicted to cost.
- `grid`: the TOML file, and the configurations that it comes to.
- `branches`: one trunk at a constant rate, and a cool-down from it for each budget.
- `run`: one configuration trained and measured, each result written once.
- `law`: how accuracy goes with size, tokens and compute, and what it predicts of a run before that is made.
- `pictures`: the charts and the page.
"""
