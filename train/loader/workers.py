"""Workers that make chunks of samples: threads of this process, or processes of their own behind a thread each.

Either way a chunk goes in and a chunk comes out, and pixels are written straight into the batch's buffer. Threads start
at once and suit a few workers: the decoders let go of the interpreter's lock. Processes suit many. A worker process is
a fresh interpreter that imports no torch (not a fork, which would copy the trainer's locks), reads its orders from a
pipe, and shares the buffers through anonymous memory: whoever is killed, at whatever moment, no process, file or shared
memory is left behind, as the pipe closes and the memory has no name.
"""

import contextlib
import mmap
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from clipkit.counter_rng import UInt64Array
from clipkit.errors import UserError
from clipkit.pixels.images import UInt8Array
from clipkit.train.loader.samples import Job, Made, SampleMaker
from clipkit.train.order import Int64Array

MAX_DEATHS = 3
# How long the end of the loader waits for threads that may hang in the kernel, say on a disk that doesn't answer, and
# for processes that were killed: these go at once, unless the machine is busy.
CLOSE_SECONDS, KILL_SECONDS = 0.5, 5.0
# Where the buffers are larger together, a worker gives the pages of each chunk back when it is made: all that it ever
# wrote to counts as its memory, though it is there but once. To get them anew costs a tenth of what a chunk does.
LARGE_BUFFERS = 500_000_000


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring samples of a batch."""

    positions_B: UInt64Array
    records_B: Int64Array
    slot: int
    """The number of the batch's buffer, and this chunk's first row in it."""
    first: int
    image_BHWC: UInt8Array
    """The rows of the buffer themselves, in this process."""


class Hands(Protocol):
    """What does the work of one worker."""

    def make(self, chunk: Chunk) -> Made: ...

    def stop(self) -> None: ...


class Buffers:
    """Equal image buffers in memory that worker processes share: uint8[slots][batch, size, size, 3]."""

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.bytes = int(np.prod(shape))
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("clipkit-batches")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        os.ftruncate(self.file, max(1, slots * self.bytes))
        self.memory = mmap.mmap(self.file, max(1, slots * self.bytes))

    def array(self, slot: int) -> UInt8Array:
        """One buffer. The memory lives as long as any array made of it."""
        return buffer_array(self.memory, slot, self.shape)

    def close(self) -> None:
        """Let go of the file; arrays stay valid."""
        os.close(self.file)


def buffer_array(memory: mmap.mmap, slot: int, shape: tuple[int, ...]) -> UInt8Array:
    """Buffer number `slot` of shared memory as an array."""
    count = int(np.prod(shape))
    return np.frombuffer(memory, np.uint8, count, slot * count).reshape(shape)


def give_back(memory: mmap.mmap, start: int, stop: int) -> None:
    """Let go of the whole pages in these bytes of shared memory: what was written stays for whoever shares it."""
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


class ThreadHands:
    """Does the work where it is called."""

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker

    def make(self, chunk: Chunk) -> Made:
        return self.maker.make(chunk.positions_B, chunk.records_B, chunk.image_BHWC)

    def stop(self) -> None:
        pass


class ProcessHands:
    """Has the work done by a process, and starts another where one dies."""

    def __init__(self, job: Job, buffers: Buffers, slots: int, warn: Callable[[str], None]) -> None:
        self.setup = pickle.dumps((job, buffers.file, slots, buffers.shape), protocol=5)
        self.file, self.warn = buffers.file, warn
        self.source = job.source
        self.lock = threading.Lock()
        self.stopped = False
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start a process; nothing happens after `stop`."""
        with self.lock:
            if self.stopped:
                return
            path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
            environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from clipkit.train.loader.workers import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self.file,),
                env=environment,
            )
        with contextlib.suppress(BrokenPipeError):
            send(self.process.stdin, self.setup)

    def make(self, chunk: Chunk) -> Made:
        order = pickle.dumps((chunk.positions_B, chunk.records_B, chunk.slot, chunk.first), protocol=5)
        for _ in range(MAX_DEATHS):
            process = self.process
            assert process is not None
            try:
                send(process.stdin, order)
                answer = receive(process.stdout)
            except (EOFError, BrokenPipeError, ValueError, OSError):
                if self.stopped:
                    raise EOFError("the loader was closed") from None
                process.kill()
                code = process.wait()
                close_pipes(process)
                where = self.source.key(int(chunk.records_B[0]))
                self.warn(f"loader worker {process.pid} died (exit {code}) at about {where}: its work is done again")
                self.start()
                continue
            if isinstance(answer, BaseException):
                raise answer
            made: Made = answer
            return made
        raise UserError(
            f"{MAX_DEATHS} loader workers died at the {len(chunk.records_B)} samples that begin with {where}: "
            "look for records that take too much memory there, or use fewer workers"
        )

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.process is not None:
                self.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(KILL_SECONDS)


class Pool:
    """Worker threads that take chunks in order and fulfil their futures."""

    def __init__(self, hands: list[Hands]) -> None:
        self.hands = hands
        self.tasks: queue.SimpleQueue[tuple[Chunk, Future[Made]] | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self.work, args=(hand,), daemon=True) for hand in hands]
        for thread in self.threads:
            thread.start()

    def submit(self, chunk: Chunk) -> Future[Made]:
        """Have a chunk made, after those submitted before."""
        future: Future[Made] = Future()
        self.tasks.put((chunk, future))
        return future

    def work(self, hand: Hands) -> None:
        """The life of one worker thread."""
        while (task := self.tasks.get()) is not None:
            chunk, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(hand.make(chunk))
            except BaseException as error:
                future.set_exception(error)
            del task, chunk, future  # the arrays of a batch must not outlive it here

    def close(self) -> None:
        """End all workers, at once where they are processes, after the chunk at hand where they are threads.

        A thread that hangs in reading is left to itself: it ends with its read, or with this process.
        """
        with contextlib.suppress(queue.Empty):
            while task := self.tasks.get_nowait():
                task[1].cancel()
        for _ in self.threads:
            self.tasks.put(None)
        for hand in self.hands:
            hand.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for hand in self.hands:
            if isinstance(hand, ProcessHands) and hand.process is not None:
                close_pipes(hand.process)


def serve() -> None:
    """The life of a worker process: orders come in on stdin, answers go out on stdout, pixels into shared memory."""
    import signal
    import warnings

    import cv2

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of EXIF blocks, which nobody here wants to read

    # Ctrl-C reaches the whole group; the trainer decides what it means, and its end closes our stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    try:
        try:
            job, file, slots, shape = receive(orders)
            memory = mmap.mmap(file, max(1, slots * int(np.prod(shape))))
            buffers = [buffer_array(memory, slot, shape) for slot in range(slots)]
            maker = SampleMaker(job)
        except EOFError:
            return
        except Exception as error:
            receive(orders)
            send(answers, pickle.dumps(portable(error), protocol=5))
            return
        while True:
            positions_B, records_B, slot, first = receive(orders)
            try:
                answer: Any = maker.make(positions_B, records_B, buffers[slot][first : first + len(positions_B)])
            except Exception as error:
                answer = portable(error)
            if len(memory) > LARGE_BUFFERS:
                image_bytes = int(np.prod(shape[1:]))
                start = (slot * shape[0] + first) * image_bytes
                give_back(memory, start, start + len(positions_B) * image_bytes)
            send(answers, pickle.dumps(answer, protocol=5))
    except (EOFError, BrokenPipeError):
        pass


def portable(error: Exception) -> Exception:
    """An exception that another process can unpickle: itself, or one with the same words."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    kind = UserError if isinstance(error, UserError) else RuntimeError
    return kind(str(error) if kind is UserError else f"{type(error).__name__}: {error}")


def send(pipe: IO[bytes] | None, message: bytes) -> None:
    """Write one pickled message."""
    assert pipe is not None
    pipe.write(message)
    pipe.flush()


def receive(pipe: IO[bytes] | None) -> Any:
    """Read one pickled message. Raises EOFError when the other side is gone."""
    assert pipe is not None
    try:
        return pickle.load(pipe)
    except pickle.UnpicklingError as error:
        raise EOFError("the message was cut short") from error


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    """Close our ends of a dead worker's pipes."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()
