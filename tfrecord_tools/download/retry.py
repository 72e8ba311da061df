"""Rows that failed, fetched again: which ones, and how far an earlier retry has come.

A retry has a number. Each shard remembers the last one that it went through, so a retry that was killed goes on with
the shards that it hadn't reached, and what failed again in it isn't asked for twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import UserError
from clipkit.storage.files import read_json, remove, write_json
from clipkit.tfrecord_tools.account.shard_state import ShardState
from clipkit.tfrecord_tools.download.plan import Shard
from clipkit.tfrecord_tools.download.shard import ShardJob
from clipkit.tfrecord_tools.reasons import BLOCKED_ADDRESS, PASSING, REASONS

DEFAULT = ",".join(sorted(PASSING))


@dataclass(frozen=True)
class Retry:
    """A retry under way: its number, from 1, and the reasons whose rows are fetched again."""

    round: int
    reasons: frozenset[str]


def parse_reasons(text: str, allow_private_hosts: bool = False) -> frozenset[str]:
    """Reasons separated by commas. Raises UserError for an unknown one.

    Where private hosts are allowed, the default takes their rows along: a run that forgot to allow them refused them.
    """
    if text == DEFAULT and allow_private_hosts:
        return PASSING | {BLOCKED_ADDRESS}
    named = [part.strip().lower() for part in text.split(",") if part.strip()]
    unknown = [name for name in named if name not in REASONS]
    if unknown or not named:
        what = f"unknown reason {unknown[0]!r}" if unknown else "no reason is named"
        raise UserError(f"{what} in --retry-failed={text}: choose among {', '.join(REASONS)}")
    return frozenset(named)


def begin_retry(own: Path, reasons: frozenset[str], states: Iterable[ShardState | None]) -> Retry:
    """Go on with the retry that was killed, if it was one for the same reasons, or begin the next."""
    path = own / "retry.json"
    latest = max((state.round for state in states if state is not None), default=0)
    if path.exists():
        before = read_json(path)
        if before.get("reasons") == sorted(reasons):
            return Retry(int(before["round"]), reasons)
        latest = max(latest, int(before["round"]))
    retry = Retry(latest + 1, reasons)
    write_json(path, {"round": retry.round, "reasons": sorted(reasons)})
    return retry


def end_retry(own: Path) -> None:
    """Nothing is left to do of a retry."""
    remove(own / "retry.json")


def retry_jobs(shards: Iterable[Shard], states: Iterable[ShardState | None], retry: Retry) -> list[ShardJob]:
    """The shards that a retry has not reached and that have rows for it."""
    return [
        ShardJob(shard, retry.reasons)
        for shard, state in zip(shards, states, strict=True)
        if state is not None and state.round < retry.round and retry.reasons & set(state.failed)
    ]
