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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np

from clipkit.errors import UserError
from clipkit.pixels.images import UInt8Array
from clipkit.text.tokenizer import WordTokenizer
from clipkit.train.loader.samples import Chunk, ChunkResult, LoaderConfig, SampleMaker
from clipkit.train.sources.source import Source

MAX_DEATHS = 3
# How long the end of the loader waits for threads that may hang in the kernel, say on a disk that doesn't answer, and
# for processes that were killed: these go at once, unless the machine is busy.
CLOSE_SECONDS, KILL_SECONDS = 0.5, 5.0
# Where all buffers together have more bytes than this, a worker gives the pages of each finished chunk back: otherwise
# all that it ever wrote to counts as its memory, although the workers share it. To get the pages again costs a tenth of
# what a chunk does.
LARGE_BUFFERS = 500_000_000


class Buffers:
    """Equal image buffers in memory that worker processes share: uint8[slots][batch, size, size, 3]."""

    def __init__(self, slots: int, shape: tuple[int, ...], file: int | None = None) -> None:
        """In new memory, or in that of another process's `file`."""
        self.slots, self.shape = slots, shape
        size = max(1, slots * int(np.prod(shape)))
        self.file = new_memory(size) if file is None else file
        self.memory = mmap.mmap(self.file, size)

    def array(self, slot: int) -> UInt8Array:
        """One buffer. The memory lives as long as any array made of it."""
        count = int(np.prod(self.shape))
        return np.frombuffer(self.memory, np.uint8, count, slot * count).reshape(self.shape)

    def close(self) -> None:
        """Let go of the file; arrays stay valid."""
        os.close(self.file)


def new_memory(size: int) -> int:
    """Memory without a name, as an open file."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("clipkit-batches")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


def give_back(memory: mmap.mmap, start: int, stop: int) -> None:
    """Let go of the whole pages in these bytes of shared memory: what was written stays for whoever shares it."""
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


class ProcessWorker:
    """Has the work of a SampleMaker done by a process, and starts another where one dies."""

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        tokenizer: WordTokenizer,
        buffers: Buffers,
        warn: Callable[[str], None],
    ) -> None:
        setup = source, config, tokenizer, buffers.file, buffers.slots, buffers.shape
        self.setup = pickle.dumps(setup, protocol=5)
        self.file, self.warn = buffers.file, warn
        self.source = source
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

    def make(self, chunk: Chunk) -> ChunkResult:
        """The chunk as a SampleMaker makes it; what the process raises is raised here."""
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
                self.close_pipes()
                where = self.source.key(int(chunk.records_B[0]))
                self.warn(f"loader worker {process.pid} died (exit {code}) at about {where}: its work is done again")
                self.start()
                continue
            if isinstance(answer, BaseException):
                raise answer
            result: ChunkResult = answer
            return result
        raise UserError(
            f"{MAX_DEATHS} loader workers died at the {len(chunk.records_B)} samples that begin with {where}: "
            "look for records that take too much memory there, or use fewer workers"
        )

    def stop(self) -> None:
        """End the process for good."""
        with self.lock:
            self.stopped = True
            if self.process is not None:
                self.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(KILL_SECONDS)

    def close_pipes(self) -> None:
        """Close our ends of the dead process's pipes."""
        for pipe in (self.process.stdin, self.process.stdout) if self.process else ():
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


class Pool:
    """Workers in a thread each that take chunks in order; without `threads` one worker, in the thread that asks."""

    def __init__(self, workers: Sequence[SampleMaker | ProcessWorker], threads: bool) -> None:
        self.workers = workers
        self.chunks: queue.SimpleQueue[tuple[Chunk, Future[ChunkResult]] | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self.serve, args=(worker,), daemon=True) for worker in workers if threads
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, chunk: Chunk) -> Future[ChunkResult]:
        """Have a chunk made, after those submitted before."""
        future: Future[ChunkResult] = Future()
        self.chunks.put((chunk, future))
        if not self.threads:
            self.chunks.put(None)
            self.serve(self.workers[0])
        return future

    def serve(self, worker: SampleMaker | ProcessWorker) -> None:
        """Make chunks until a None comes: the life of one worker thread."""
        while (task := self.chunks.get()) is not None:
            chunk, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(worker.make(chunk))
            except BaseException as error:
                future.set_exception(error)
            del task, chunk, future  # the arrays of a batch must not outlive it here

    def close(self) -> None:
        """End all workers, at once where they are processes, after the chunk at hand where they are threads.

        A thread that hangs in reading is left to itself: it ends with its read, or with this process.
        """
        with contextlib.suppress(queue.Empty):
            while task := self.chunks.get_nowait():
                task[1].cancel()
        for _ in self.threads:
            self.chunks.put(None)
        processes = [worker for worker in self.workers if isinstance(worker, ProcessWorker)]
        for process in processes:
            process.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.close_pipes()


def serve() -> None:
    """The life of a worker process: orders come in on stdin, answers go out on stdout, pixels into shared memory."""
    import signal
    import warnings

    import cv2

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of EXIF blocks, which nobody here wants to read

    # Ctrl-C and a scheduler's signals reach the whole group; the trainer decides what they mean, and its end closes
    # our stdin.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    try:
        try:
            source, config, tokenizer, file, slots, shape = receive(orders)
            shared = Buffers(slots, shape, file)
            buffers, memory = [shared.array(slot) for slot in range(slots)], shared.memory
            maker = SampleMaker(source, config, tokenizer)
        except EOFError:
            return
        except Exception as error:
            receive(orders)
            send(answers, pickle.dumps(portable(error), protocol=5))
            return
        while True:
            positions_B, records_B, slot, first = receive(orders)
            try:
                rows = buffers[slot][first : first + len(positions_B)]
                answer: Any = maker.make(Chunk(positions_B, records_B, slot, first, rows))
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
