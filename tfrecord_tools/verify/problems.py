"""What `clipkit verify` calls a problem, and what it advises."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipkit.formats.dataset import REWRITES, DatasetLayout
from clipkit.formats.manifest import CLIPKIT_FOLDER

# What to do about a problem; `remedy` words it for the file.
FETCH, PURGE, INDEX, REBUILD, FINISH = "fetch", "purge", "index", "rebuild", "finish"
MOST_KEYS = 1000


@dataclass(frozen=True)
class Problem:
    """One kind of fault of one file. `first` says where it shows first; `keys` name the records, at most MOST_KEYS."""

    file: str
    what: str
    todo: str
    count: int = 1
    first: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardReport:
    """What was found. `records` are those read, whole or damaged; `decoded` are images."""

    records: int
    bytes: int
    decoded: int
    problems: tuple[Problem, ...]


@dataclass
class ProblemList:
    """Problems of one file as they come, equal ones counted."""

    file: str
    problems: dict[str, Problem] = field(default_factory=dict)

    def add(self, what: str, first: str, todo: str, key: str | None = None) -> None:
        before = self.problems.get(what) or Problem(self.file, what, todo, 0, first)
        keys = before.keys if key is None or len(before.keys) == MOST_KEYS else (*before.keys, key)
        self.problems[what] = replace(before, count=before.count + 1, keys=keys)

    def all(self) -> tuple[Problem, ...]:
        return tuple(self.problems.values())


def remedy(layout: DatasetLayout, file: str, problems: Sequence[Problem]) -> str:
    """What to do about a file: the gravest of its problems decides."""
    todo = {problem.todo for problem in problems}
    if FINISH in todo:
        command = Path(file).stem
        if command in REWRITES:
            return f"run the same clipkit {command} command again, and verify after it: nothing else was checked"
        return "run the same clipkit build-tfds command again"
    if FETCH in todo or REBUILD in todo:
        sources = _sources(layout, file)
        made_of = f" (this shard is made of {sources})" if sources else ""
        copy = "copy the shard again from where the dataset came from, or " if FETCH in todo else ""
        how = "build it again with clipkit build-tfds" if layout.manifest else "make the dataset again with TFDS"
        return f"{copy}{how}{made_of}"
    if INDEX in todo:
        # Readers find the offsets by themselves, a little later, where there is no index.
        indices = [f"{CLIPKIT_FOLDER}/index-{split}.npy" for split, files in layout.files.items() if file in files]
        return f"remove {', '.join(indices) or file}: readers then find the offsets by themselves"
    if PURGE in todo:
        return "keep it, for training leaves such images out; or remove these records with clipkit purge --by key"
    return "build it again"


def _sources(layout: DatasetLayout, file: str) -> str:
    """The input files of a shard, the first and the last of many."""
    for manifest in layout.manifest.values():
        for shard in manifest.shards:
            if shard.file == file and shard.sources:
                names = [source.file for source in shard.sources]
                return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
    return ""
