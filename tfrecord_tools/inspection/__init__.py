"""`clipkit inspect`: a page on which a person sees what is in a dataset.

- `command`: the page, and where it is written
- `figures`: the numbers of a sample, put together
- `captions`: what the captions are like, and what each way to shorten them keeps
- `pictures`: sizes, formats, and which pictures are the same
- `histogram`: many values in the form that a chart wants
"""
