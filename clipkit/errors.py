"""The two kinds of failure that are shown as one line.

Exit codes follow the kind: 2 for what the user can fix, 1 for what only we can.
"""


class UserError(Exception):
    """Something the user can fix. The message is one line: what, where, and what to do."""


class InternalError(Exception):
    """Something clipkit did wrong and noticed. The message is one line: what, where, and where to report it."""


def one_line(error: BaseException) -> str:
    """What an exception says, as part of a message; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
