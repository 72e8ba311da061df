"""A purge in a process of its own, apart from the tests, so that the process starts without what they import."""

import os
from multiprocessing.connection import Connection
from pathlib import Path

from clipkit.tfrecord_tools.purge.command import purge


def purge_in_a_child(data: Path, listed: Path, pipe: Connection) -> None:
    """Say when it begins, and purge, the progress line going nowhere. A kill loses nothing that isn't flushed."""
    os.fsync = lambda descriptor: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pipe.send("begins")
    purge(data, listed)
