"""`python -m clipkit` is the same as `clipkit`."""

from clipkit.cli import main

main()
