"""Turns: no host gets more than its share, every item comes out once, and trouble is the host's own."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.tfrecord_tools.web import hosts
from clipkit.tfrecord_tools.web.hosts import (
    CIRCUIT_AFTER,
    FIRST_LIMIT,
    GIVEN_UP_SECONDS,
    LEAST_LIMIT,
    PROBE_PAUSES,
    WINDOW_REQUESTS,
    Concurrency,
    HostQueues,
)


def queues(per_host: int = 2, longest_pause: float = 30.0) -> HostQueues[int]:
    return HostQueues(per_host, longest_pause)


def take_all(turns: HostQueues[int], now: float = 0.0) -> list[int]:
    taken = []
    while (item := turns.take(now)) is not None:
        taken.append(item)
    return taken


def test_hosts_take_turns_within_their_limit() -> None:
    turns = queues(per_host=2)
    for item in range(10):
        turns.add("a", item)
    turns.add("b", 10)
    turns.add("c", 11)
    assert take_all(turns) == [0, 10, 11, 1]
    assert turns.queued == 8
    turns.done("b", 0.0)
    assert take_all(turns) == []
    turns.done("a", 0.0)
    assert take_all(turns) == [2]
    turns.add("a", 99, first=True)
    turns.done("a", 0.0)
    assert take_all(turns) == [99]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 4), st.integers(0, 2**32)
)
def test_every_item_comes_out_once_and_no_limit_is_passed(
    items: list[tuple[str, bool]], per_host: int, seed: int
) -> None:
    chance = random.Random(seed)
    turns = queues(per_host)
    names = {}
    waiting = list(enumerate(items))
    active: list[int] = []
    seen: list[int] = []
    now = 0.0
    while waiting or active or turns.queued:
        now += 0.5
        if waiting and chance.random() < 0.7:
            item, (name, later) = waiting.pop()
            names[item] = name
            if later:
                turns.add_later(name, item, now + chance.randrange(5))
            else:
                turns.add(name, item, first=chance.random() < 0.2)
        while chance.random() < 0.8 and (taken := turns.take(now)) is not None:
            active.append(taken)
            seen.append(taken)
        assert max(Counter(names[item] for item in active).values(), default=0) <= per_host
        if active and chance.random() < 0.6:
            done = active.pop(chance.randrange(len(active)))
            if chance.random() < 0.1:
                turns.rate_limited(names[done], float(chance.randrange(4)), now)
            else:
                turns.succeeded(names[done])
            turns.done(names[done], now)
    assert sorted(seen) == list(range(len(items)))
    assert set(turns.hosts) == set(turns.troubled)  # what is left remembers trouble, and nothing else
    assert not any(host.queue or host.active for host in turns.hosts.values())


def test_a_pause_ends_by_itself_and_says_when() -> None:
    turns = queues(per_host=4)
    for item in range(5):
        turns.add("a", item)
    turns.add("b", 10)
    assert turns.take(0.0) == 0
    assert turns.rate_limited("a", 7.0, 0.0) == (7.0, [])
    turns.done("a", 0.0)
    assert take_all(turns, 1.0) == [10]
    assert turns.next_time() == 7.0
    assert take_all(turns, 6.9) == []
    assert take_all(turns, 7.0) == [1, 2]  # half of the limit that it had
    assert turns.next_time() is None


def test_rate_limits_without_a_time_double_and_success_forgets_them() -> None:
    turns = queues(per_host=8)
    turns.add("a", 0)
    turns.take(0.0)
    now, waits = 0.0, []
    for _ in range(4):
        wait, _ = turns.rate_limited("a", None, now)
        waits.append(wait)
        now += wait
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert turns.hosts["a"].limit == 1.0
    for _ in range(200):
        turns.succeeded("a")
    assert turns.hosts["a"].limit == 8.0
    assert turns.rate_limited("a", None, now)[0] == 1.0


def test_too_long_a_wait_refuses_the_host_until_then() -> None:
    turns = queues(per_host=1, longest_pause=30.0)
    for item in range(4):
        turns.add("a", item)
    assert turns.take(0.0) == 0
    assert turns.rate_limited("a", 100.0, 0.0) == (100.0, [1, 2, 3])
    turns.done("a", 0.0)
    refusal = turns.refusal("a", 99.0)
    assert refusal is not None and (refusal.reason, refusal.message) == ("rate-limited", "host asked to wait 100 s")
    assert turns.refusal("a", 100.0) is None and turns.queued == 0
    turns.add("a", 5)
    assert turns.take(100.0) == 5


def test_a_dead_host_is_probed_and_given_up_and_may_come_back() -> None:
    turns = queues(per_host=100)
    for item in range(200):
        turns.add("a", item)
    now = 0.0
    for item in range(CIRCUIT_AFTER):
        assert turns.take(now) == item
    late = [turns.take(now) for _ in range(20)]
    for _ in range(CIRCUIT_AFTER):
        assert turns.failed("a", "connect", "refused", now) == []
        turns.done("a", now)
    for _ in late:  # under way when the pause began
        assert turns.failed("a", "connect", "refused", now) == []
        turns.done("a", now)
    probe = 28
    for pause in PROBE_PAUSES[:-1]:
        assert take_all(turns, now) == []
        now += pause
        assert take_all(turns, now) == [probe]
        assert turns.failed("a", "connect", "refused", now) == []
        turns.done("a", now)
        probe += 1
    now += PROBE_PAUSES[-1]
    assert take_all(turns, now) == [probe]
    assert turns.failed("a", "connect", "refused", now) == list(range(probe + 1, 200))
    turns.done("a", now)
    refusal = turns.refusal("a", now)
    assert refusal is not None and (refusal.reason, refusal.message) == ("connect", "host backed off: refused")
    # Later one may try again; one more failure is enough, and one success forgets it all.
    now += GIVEN_UP_SECONDS
    assert turns.refusal("a", now) is None
    turns.add("a", 300)
    assert turns.take(now) == 300
    turns.failed("a", "timeout", "silent", now)
    turns.done("a", now)
    assert turns.refusal("a", now) is not None
    now += GIVEN_UP_SECONDS
    turns.add("a", 301)
    assert turns.take(now) == 301
    turns.succeeded("a")
    turns.done("a", now)
    assert not turns.hosts


def test_a_probe_that_succeeds_opens_the_host_again() -> None:
    turns = queues(per_host=4)
    for item in range(CIRCUIT_AFTER + 20):
        turns.add("a", item)
    for _ in range(CIRCUIT_AFTER):
        turns.take(0.0)
        turns.failed("a", "timeout", "", 0.0)
        turns.done("a", 0.0)
    assert turns.take(PROBE_PAUSES[0]) == CIRCUIT_AFTER
    assert turns.take(PROBE_PAUSES[0]) is None
    turns.succeeded("a")
    turns.done("a", PROBE_PAUSES[0])
    assert turns.take(PROBE_PAUSES[0]) == CIRCUIT_AFTER + 1


def test_what_is_remembered_of_idle_hosts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "TROUBLED_HOSTS", 10)
    turns = queues()
    for number in range(100):
        turns.add(f"h{number}", number)
        assert turns.take(0.0) == number
        if number % 2:
            turns.failed(f"h{number}", "connect", "", 0.0)
        else:
            turns.succeeded(f"h{number}")
        turns.done(f"h{number}", 0.0)
    assert list(turns.hosts) == [f"h{number}" for number in range(81, 100, 2)]


def test_removed_items_do_not_come_out() -> None:
    turns: HostQueues[list[int]] = HostQueues(1, 30.0)
    items = [[number] for number in range(6)]
    for item in items[:3]:
        turns.add("a", item)
    turns.add_later("b", items[3], 1.0)
    turns.add_later("b", items[4], 1.0)
    turns.add("c", items[5])
    turns.remove({id(items[1]), id(items[3]), id(items[5])}, 0.0)
    assert turns.queued == 3
    out = []
    for now in (1.0, 2.0, 3.0, 4.0):
        while (item := turns.take(now)) is not None:
            out.append(item[0])
            turns.done("a" if item[0] < 3 else "b", now)
    assert sorted(out) == [0, 2, 4] and turns.queued == 0


def test_alone() -> None:
    turns = queues()
    assert turns.is_alone("a")
    turns.add("a", 0)
    turns.take(0.0)
    assert turns.is_alone("a")
    turns.add("a", 1)
    assert not turns.is_alone("a")
    turns.take(0.0)
    assert not turns.is_alone("a")


# ---------------------------------------------------------------------------------------------------------------------
# How many at once
# ---------------------------------------------------------------------------------------------------------------------


def run(concurrency: Concurrency, seconds: int, start: int, *, capacity: float, timeouts: float = 0.0) -> int:
    """A world in which each request takes 0.1 s until `capacity` a second is reached."""
    for second in range(start, start + seconds):
        rate = min(capacity, concurrency.limit * 10.0)
        for number in range(int(rate)):
            concurrency.completed(number < rate * timeouts)
        concurrency.adapt(float(second), concurrency.limit)
    return start + seconds


def test_concurrency_grows_while_it_helps() -> None:
    wide = Concurrency(1000)
    run(wide, 60, 1, capacity=1e5)
    assert wide.limit == 1000
    narrow = Concurrency(1000)
    run(narrow, 12, 1, capacity=FIRST_LIMIT * 10)
    assert FIRST_LIMIT < narrow.limit < 3 * FIRST_LIMIT
    assert Concurrency(5).limit == 5


def test_concurrency_falls_when_much_times_out_and_comes_back() -> None:
    concurrency = Concurrency(256)
    now = run(concurrency, 30, 1, capacity=1e5)
    assert concurrency.limit == 256
    now = run(concurrency, 30, now, capacity=1e5, timeouts=0.1)  # as many as a list of old links has anyway
    assert concurrency.limit == 256
    now = run(concurrency, 30, now, capacity=1e5, timeouts=0.5)
    assert concurrency.limit == LEAST_LIMIT
    run(concurrency, 30, now, capacity=1e5)
    assert concurrency.limit == 256


def test_concurrency_falls_when_names_fail() -> None:
    concurrency = Concurrency(256)
    for second in range(1, 20):
        for number in range(WINDOW_REQUESTS):
            concurrency.looked_up(failed=number % 3 != 0)
            concurrency.completed(timed_out=False)
        concurrency.adapt(float(second), 0)
    assert concurrency.limit == LEAST_LIMIT


def test_a_machine_out_of_sockets_never_asks_for_as_many_again() -> None:
    concurrency = Concurrency(256)
    run(concurrency, 30, 1, capacity=1e5)
    concurrency.starved()
    run(concurrency, 60, 31, capacity=1e5)
    assert concurrency.limit == int(256 * 0.7)
