"""The command `clipkit`: each subcommand parses its arguments, imports its stage, and calls one function.

- `main`: the group, and the commands to train
- `evaluate`: the commands that evaluate models and show what was found
- `plan`: the commands `plan` and `sweep`
- `search`: the commands that put a model to work: vectors, labels, search
- `data`: the commands that make and maintain datasets
- `download`: the command `download`
- `options`: types, options and errors that the commands share
- `demo`: the command `demo`, which runs all the others
- `demo_server`: the web server from which the demo downloads
- `doctor`: the command `doctor`: versions, devices and what doesn't work together
"""
