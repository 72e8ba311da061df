"""What a folder holds, to compare it before and after."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """Every file below by its path, with a hash; lock files are left out, being empty marks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
