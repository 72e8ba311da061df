"""The page that tells a run's whole story.

- `run_data`: what a run's folder and its dataset tell, as plain values.
- `page`: the page made of these.
"""
