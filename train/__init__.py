"""Training: recipes, data order and loading, the loop."""
