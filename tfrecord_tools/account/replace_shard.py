"""Put a new version of a shard in the place of the old one, so that a kill leaves one of them and never half of each.

A shard is several files, and no disk renames several at once. So the new ones are made in a folder of their own, their
state last, and then moved one by one, the state last again. A folder with a state is whole, and whoever finds it moves
what is still there: doing that twice does no harm. A folder without one was left by a kill, and is removed.
"""

import secrets
from pathlib import Path

from clipkit.storage.files import disk_errors, is_remote, remove, sync_file
from clipkit.storage.stores import as_upath, retry, store_errors
from clipkit.tfrecord_tools.account.shard_state import Layout, ShardFiles


def new_folder(layout: Layout, number: int) -> Path:
    """A folder for the new files of a shard, `ShardFiles.inside` of it."""
    return layout.pending / f"{layout.shard(number)}.{secrets.randbits(60)}"


def commit(folder: Path, final: ShardFiles) -> None:
    """Move the files of a whole folder to their places and remove it. Raises UserError when the disk refuses."""
    made = final.inside(folder)
    for source, target in zip((*made.written(), made.state), (*final.written(), final.state), strict=True):
        with disk_errors(target):
            if source.exists():
                move(source, target)
    remove(folder)


def move(source: Path, target: Path) -> None:
    """Rename a file over another; in a store copy it, and then remove the source."""
    if is_remote(source):
        path = as_upath(source)
        with store_errors(target, writing=True):
            retry(lambda: path.fs.mv(path.path, as_upath(target).path))
        return
    source.replace(target)
    sync_file(target.parent)


def recover(layout: Layout, number: int | None = None) -> None:
    """Finish what was whole when a run was killed, of one shard or of all, and remove what wasn't."""
    with disk_errors(layout.pending):
        folders = sorted(layout.pending.iterdir()) if layout.pending.exists() else []
    for folder in folders:
        name = folder.name.partition(".")[0]
        if number is not None and name != layout.shard(number):
            continue
        if (folder / "state.json").exists():
            commit(folder, layout.files(int(name)))
        else:
            remove(folder)
