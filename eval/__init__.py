"""Evaluation: zero-shot classification, its results, and the report page."""
