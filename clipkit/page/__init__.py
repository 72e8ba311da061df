"""The pages that clipkit writes, each one HTML file: the report of a run, the inspection of a dataset.

- `render`: a page from a stage's template, which extends `page.html.j2`, and pictures in it
- `charts`: inline SVG that follows light and dark
"""
