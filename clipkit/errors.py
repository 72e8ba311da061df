"""The two kinds of failure that a person sees as one line.

Exit codes follow the kind: 2 for what the user can mend, 1 for what only we can.
"""


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and what to do."""


class InternalError(Exception):
    """Something clipkit did wrong and noticed. The message is one line: what, where, and where to report it."""
