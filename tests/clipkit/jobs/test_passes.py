"""A resumable pass over shards."""

import pytest

from clipkit.jobs.passes import PassProgress, Runner


def double(job: int) -> int:
    return job * 2


def named(job: int) -> str:
    return f"shard {job}"


def test_only_what_is_missing_is_worked_on_and_states_come_in_the_order_of_the_jobs():
    seen: list[PassProgress] = []
    states = Runner(workers=2, tell=seen.append).run(
        "test: doubling",
        double,
        [5, 1, 3],
        describe=named,
        size=lambda job: job * 1000,
        finished=lambda job: 2 if job == 1 else None,
        counts=lambda state: {"records": state},
    )
    assert states == [10, 2, 6]
    assert [(now.jobs_done, now.jobs_total) for now in seen] == [(1, 3), (2, 3), (3, 3)]
    assert (seen[0].done, seen[-1].done, seen[0].total, seen[0].in_bytes) == (1000, 9000, 9000, True)
    assert seen[-1].note() == "3/3 shards, 18 records"


def test_jobs_are_counted_where_a_size_is_unknown():
    seen: list[PassProgress] = []
    sizes = {5: 10, 1: None}
    Runner(tell=seen.append).run("test", double, [5, 1], describe=named, size=sizes.get)
    assert [(now.done, now.total, now.in_bytes) for now in seen] == [(0, 2, False), (1, 2, False), (2, 2, False)]


def test_a_check_ends_the_pass_before_further_jobs_are_worked_on():
    done = []

    def check(job: int, state: int) -> None:
        done.append(job)
        raise ValueError(job)

    with pytest.raises(ValueError, match="5"):
        Runner().run("test", double, [5, 1], describe=named, check=check)
    assert done == [5]


def test_the_line_says_shards_and_counts(capsys):
    Runner().run("purge: writing", double, [1, 2], describe=named, counts=lambda state: {"removed": state, "odd": 0})
    assert "purge: writing: 2/2 shards" in capsys.readouterr().err
    Runner().run("purge: writing", double, [1], describe=named, finished=lambda job: 2)
    assert capsys.readouterr().err == ""
