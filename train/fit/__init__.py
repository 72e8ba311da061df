"""How a machine runs a recipe: what is found by real steps before the run, and models set up by it.

- `stages`: the arithmetic and the micro-batch of each stage; stored with checkpoints.
- `setup`: a stage's model on the device, compiled and sharded as the recipe and the machine say.
- `trial`: steps on made-up pairs.
"""
