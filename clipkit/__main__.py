"""`python -m clipkit` is the same as `clipkit`."""

from clipkit.cli.main import main

main()
