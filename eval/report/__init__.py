"""The pages that tell a run's whole story, and several runs side by side.

- `run_data`: what a run's folder and its dataset tell, as plain values.
- `evaluations`: a run's results as a page shows them.
- `guesses`: what the guesses of a task show: pictures, classes, calibration, what is found.
- `page`: the page of one run.
- `side_by_side`: the page of several.
"""
