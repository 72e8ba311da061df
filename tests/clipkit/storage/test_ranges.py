"""Ranges come whole in spite of a bad network; the cache keeps its bound, and never gives wrong bytes."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from range_server import ERROR, MISSING, OK, RESET, SHORT, STALL, range_server

from clipkit.errors import UserError
from clipkit.storage import cache as cache_module
from clipkit.storage import ranges
from clipkit.storage.cache import BlockCache, CachedRanges, scratch_cache
from clipkit.storage.files import as_path
from clipkit.storage.ranges import RangeReader, read_object, read_range, read_whole
from clipkit.storage.stores import StoredFile

DATA = np.random.default_rng(0).bytes(100_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE", 0.01)


# ---- Ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[], [RESET], [ERROR, ERROR], [SHORT], [RESET, SHORT, ERROR, RESET, SHORT]])
def test_a_range_comes_whole(faults: list[str]) -> None:
    with range_server(DATA, faults) as server:
        told: list[str] = []
        assert read_range(as_path(f"{server.url}/x"), 1000, 3000, told.append) == DATA[1000:3000]
        assert server.asked == [(1000, 3000)] * (len(faults) + 1)
        if RESET not in faults:  # aiohttp asks again by itself when a connection that it used before is reset
            assert len(told) == max(0, len(faults) - 1)  # one failure alone is no news
        assert all("bytes 1,000 to 3,000" in line for line in told)


def test_a_stall_is_cut_off_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "STALL_SECONDS", 0.3)
    with range_server(DATA, [STALL, OK]) as server:
        told: list[str] = []
        began = time.monotonic()
        assert read_range(as_path(f"{server.url}/x"), 0, 100, told.append) == DATA[:100]
        assert time.monotonic() - began < 20
        assert len(told) == 1
        assert "no answer in time; asked again (2 of 6)" in told[0]


def test_a_client_that_can_not_be_cut_off_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(ranges, "STALL_SECONDS", 0.2)
    path = as_path("memory://stalls/x")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DATA)
    go, calls = threading.Event(), []
    real = MemoryFileSystem.cat_file

    def stalled(self: MemoryFileSystem, *arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            go.wait(60)
        return real(self, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", stalled)
    told: list[str] = []
    assert read_range(path, 5, 50, told.append) == DATA[5:50]
    assert len(calls) == 2
    assert "no answer in time" in told[0]
    go.set()


@pytest.mark.parametrize(("fault", "says"), [(SHORT, "10 of 20 bytes came"), (ERROR, "500"), (RESET, "can't read")])
def test_what_never_comes_is_one_line(fault: str, says: str) -> None:
    with range_server(DATA, [fault] * 20) as server:
        with pytest.raises(UserError, match=says) as caught:
            read_range(as_path(f"{server.url}/x"), 0, 20, lambda _: None)
        # aiohttp asks once more by itself when a connection that it used before is reset.
        assert len(server.asked) in range(ranges.ATTEMPTS, 2 * ranges.ATTEMPTS + 1)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_not_asked_for_again() -> None:
    with range_server(DATA, [MISSING] * 9) as server:
        with pytest.raises(FileNotFoundError):
            read_range(as_path(f"{server.url}/x"), 0, 20)
        assert len(server.asked) == 1
        reader = RangeReader(as_path(server.url), [StoredFile("x", len(DATA))])
        with pytest.raises(UserError, match="is gone: put the shard back"):
            reader.read(0, 0, 20)


def test_whole_files_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 30_000)
    with range_server(DATA, []) as server:
        assert read_whole(as_path(f"{server.url}/x"), len(DATA)) == DATA
        assert len(server.asked) == 4
        assert read_object(as_path(f"{server.url}/x")) == DATA
        assert read_range(as_path(f"{server.url}/x"), 7, 7) == b""


def test_a_reader_of_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_MAX_OPEN", 2)
    files = [StoredFile(f"{number}", 1000) for number in range(5)]
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(DATA[number * 1000 : number * 1000 + 1000])
    reader = RangeReader(tmp_path, files)
    with ThreadPoolExecutor(4) as pool:
        wanted = [(number % 5, number, number + 100) for number in range(500)]
        for (number, start, end), data in zip(wanted, pool.map(lambda each: reader.read(*each), wanted), strict=True):
            assert data == DATA[number * 1000 : number * 1000 + 1000][start:end]
    assert len(reader._open) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(4, 0, 10) == DATA[4000:4010]
    (tmp_path / "3").write_bytes(b"short")
    (tmp_path / "2").unlink()
    reader = RangeReader(tmp_path, files)
    with pytest.raises(UserError, match="3 has changed since"):
        reader.read(3, 0, 10)
    with pytest.raises(UserError, match="2 is gone: put the shard back"):
        reader.read(2, 0, 10)


LIMITED = """
import os, resource, sys
from pathlib import Path
from clipkit.storage.ranges import RangeReader
from clipkit.storage.stores import StoredFile
folder, soft, hard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
readers = [RangeReader(folder, [StoredFile(f"{number}", 4) for number in range(400)]) for _ in range(4)]
for number in range(400):
    for reader in readers:
        assert reader.read(number, 0, 4) == b"%04d" % number
print(len(os.listdir("/proc/self/fd")), *(len(reader._open) for reader in readers))
"""


@pytest.mark.parametrize(("soft", "hard", "kept"), [(200, 4000, 320), (200, 800, 100), (200, 200, 25)])
def test_several_readers_share_what_a_process_may_open(tmp_path: Path, soft: int, hard: int, kept: int) -> None:
    """The limit is raised where it can be, and half of it is left to others."""
    for number in range(400):
        (tmp_path / f"{number}").write_bytes(b"%04d" % number)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used, *each = map(int, done.stdout.split())
    assert each == [kept] * 4
    assert used < hard * 0.75


# ---- The cache -------------------------------------------------------------------------------------------------------


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("??/*"))


def fail() -> bytes:
    raise AssertionError("it was there")


def test_an_entry_is_made_once_and_read_in_parts(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1_000_000)
    assert cache.read("a", lambda: DATA[:1000], 100, 50) == DATA[100:150]
    assert cache.read("a", fail) == DATA[:1000]
    assert cache.read("a", fail, 990, 50) == DATA[990:1000]
    assert cache.ensure("a", fail) is None
    assert BlockCache(tmp_path, 1_000_000).read("a", fail, 5, 5) == DATA[5:10]  # it survives
    assert pickle.loads(pickle.dumps(cache)).read("a", fail, 5, 5) == DATA[5:10]
    cache.drop("a")
    assert cache.read("a", lambda: b"other") == b"other"


def test_the_bound_holds_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_TOUCH_SECONDS", -1.0)
    cache = BlockCache(tmp_path, 50_000)
    for number in range(100):
        cache.read(f"{number}", lambda: bytes(1000))
        cache._open.clear()  # as after many others: to read it again is to use it
        cache.read("0", lambda: bytes(1000))
        os.utime(cache._path(cache_module._name(f"{number}")), (1000 + number, 1000 + number))
        os.utime(cache._path(cache_module._name("0")), (10_000, 10_000))
        assert disk_bytes(tmp_path) <= 50_000
    assert cache.stored() == disk_bytes(tmp_path) > 25_000
    there = [cache._path(cache_module._name(f"{number}")).exists() for number in range(100)]
    assert there[0]
    assert not any(there[1:50])
    assert all(there[60:])


def test_what_is_too_large_to_keep_is_given_all_the_same(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 500)
    assert cache.read("a", lambda: DATA[:1000], 10, 10) == DATA[10:20]
    assert disk_bytes(tmp_path) == 0


@pytest.mark.parametrize("damage", [b"", b"x", b"flip"])
def test_a_damaged_entry_is_got_again(tmp_path: Path, damage: bytes) -> None:
    BlockCache(tmp_path, 1_000_000).read("a", lambda: DATA[:1000])
    [path] = tmp_path.glob("??/*")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(bytes(data) if damage == b"flip" else damage)
    assert BlockCache(tmp_path, 1_000_000).read("a", lambda: DATA[:1000]) == DATA[:1000]
    assert BlockCache(tmp_path, 1_000_000).read("a", fail) == DATA[:1000]


def test_threads_wait_for_the_one_that_gets_it(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10_000_000)
    made: Counter[int] = Counter()

    def make(number: int) -> bytes:
        made[number] += 1
        time.sleep(0.01)
        return bytes([number]) * 1000

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: cache.read(f"{i % 20}", lambda: make(i % 20), 3, 5), range(400)))
    assert found == [bytes([i % 20]) * 5 for i in range(400)]
    assert set(made.values()) == {1}


def hammer(folder: Path, seed: int) -> int:
    """Reads entries in a cache that is too small for them; returns how many it had to make."""
    cache = BlockCache(folder, 60_000)
    made = 0

    def make(number: int) -> bytes:
        nonlocal made
        made += 1
        return np.random.default_rng(number).bytes(2000)

    for number in np.random.default_rng(seed).integers(0, 60, 400).tolist():
        data = cache.read(f"{number}", lambda number=number: make(number), 100, 200)
        assert data == np.random.default_rng(number).bytes(2000)[100:300]
        assert disk_bytes_now(folder) <= 60_000 + 4 * 2100
    return made


def disk_bytes_now(folder: Path) -> int:
    total = 0
    for file in folder.glob("??/*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_processes_share_one_cache_within_its_bound(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap(hammer, [(tmp_path, seed) for seed in range(3)])
    assert disk_bytes(tmp_path) <= 60_000
    assert sum(made) < 1200  # they found each other's


def test_a_full_disk_makes_room_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(tmp_path, 100_000)
    for number in range(10):
        cache.put(f"{number}", bytes(1000))
    real, full = cache_module._write, [True]

    def write(path: Path, data: bytes) -> None:
        if full and full[0]:
            if len(full) == 1:
                full.clear()
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(cache_module, "_write", write)
    cache.put("a", b"a" * 1000)
    assert cache.read("a", fail, 0, 1) == b"a"
    assert cache.stored() <= 7 * 1008
    full.extend([True, True])
    with pytest.raises(UserError, match="the disk is full while writing"):
        cache.put("b", bytes(1000))


def test_leftovers_of_the_killed_are_removed(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100_000)
    cache.put("a", bytes(1000))
    [entry] = tmp_path.glob("??/*")
    left = entry.with_name(f".{entry.name}.123450000000000")
    left.write_bytes(b"half")
    assert cache.stored() == 1008 + 4
    os.utime(left, (1000, 1000))
    assert cache.stored() == 1008
    assert not left.exists()


def test_a_scratch_cache_is_shared_and_goes_with_its_last_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, other = scratch_cache("run", 100_000), scratch_cache("run", 100_000)
    assert one.folder == other.folder
    one.put("a", b"abc")
    assert other.read("a", fail) == b"abc"
    del one
    assert other.read("a", fail) == b"abc"
    assert other.folder.exists()
    del other
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time\nfrom clipkit.storage.cache import scratch_cache\n"
        "cache = scratch_cache('first', 100000)\ncache.put('a', b'abc')\nprint('made', flush=True)\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"made\n"
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        cache = scratch_cache("second", 100_000)
        assert len(list(tmp_path.iterdir())) == 2  # the living one's stays
        child.send_signal(signal.SIGKILL)
        child.wait()
        again = scratch_cache("second", 100_000)
        assert list(tmp_path.iterdir()) == [cache.folder]
        del cache, again


def test_ranges_through_the_cache_cost_one_request_a_block(tmp_path: Path) -> None:
    with range_server(DATA, []) as server:
        reader = RangeReader(as_path(server.url), [StoredFile("x", len(DATA), "v1")])
        cached = CachedRanges(reader, BlockCache(tmp_path, 10_000_000))
        for start in range(0, 10_000, 100):
            assert cached.read(0, (0, 10_000), start, start + 100) == DATA[start : start + 100]
        cached.fill(0, (0, 10_000))
        assert server.asked == [(0, 10_000)]
        other = CachedRanges(RangeReader(as_path(server.url), [StoredFile("x", len(DATA), "v2")]), cached.cache)
        other.read(0, (0, 10_000), 0, 5)  # another version is another entry
        assert len(server.asked) == 2
