"""`clipkit plan`: what a run costs and scores, before it is paid for. It answers in a second, without torch.

- `command`: the plan of a recipe, of the columns of any run, and against a run that was made.
- `step`: how long a sample takes on a chip, and what fits into its memory.
- `cost`: a recipe's stages on a number of chips: hours, money, data, cores, disk, and what limits them.
- `budget`: what a budget buys, as a list and as a picture.
- `columns`: a run in the columns of `published-runs.csv`, as numbers; what is missing is derived or assumed.
- `accuracy`: ImageNet accuracy from published runs, with an interval.
- `measure`: the calibration of the machine at hand, which needs torch.
- `published_times`: the runs whose times the calibration is held to.
- `report`: the plan as JSON and as text.
"""
