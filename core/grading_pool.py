"""Processes that compare answers symbolically, each under a hard wall-clock and memory limit.

math-verify raises in threads, resets its caller's alarms, and can be made to run or allocate without end by one
hostile answer: so it never runs in the caller's process, and a worker that overruns is killed and replaced.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from .errors import MissingDependencyError

_START_SECONDS = 120.0  # imports on a loaded machine; never part of an answer's time limit


class _WorkerDiedError(Exception):
    """The process ended in the middle of a request."""


class _Worker:
    """One process that runs `grading_worker`."""

    def __init__(self, memory_mb: int):
        self._buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "afterglow.core.grading_worker", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders by hash: same verdict in every run
        )
        try:
            hello = self._read_line(_START_SECONDS)
        except (_WorkerDiedError, TimeoutError) as error:
            self.dispose()
            raise MissingDependencyError(
                f"A grading worker did not start with {memory_mb} MiB of memory; give `memory_mb` more room, and try "
                f"`python -m afterglow.core.grading_worker {memory_mb}` to see why."
            ) from error
        if "error" in hello:
            self.dispose()
            raise MissingDependencyError(
                f"Grading needs math-verify, which cannot be imported ({hello['error']}): "
                "pip install math-verify==0.9.0."
            )

    def ask(self, task: str, texts: tuple[str, ...], timeout: float) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            TimeoutError: No reply in time; the worker is of no further use.
            _WorkerDiedError: The process ended.
        """
        assert self.process.stdin is not None
        request = json.dumps({"task": task, "texts": texts, "seconds": timeout})
        try:
            self.process.stdin.write(request.encode() + b"\n")
        except OSError as error:
            raise _WorkerDiedError from error
        return self._read_line(timeout)

    def _read_line(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + timeout
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(descriptor, 65_536)
            if not chunk:
                raise _WorkerDiedError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def dispose(self) -> None:
        """Kill the process, whatever it does, and collect it. Only for the thread that holds the worker."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class WorkerPool:
    """Up to `size` workers, started when needed, replaced when they overrun or die."""

    def __init__(self, size: int, timeout: float, memory_mb: int):
        self._timeout, self._memory_mb, self._pid = timeout, memory_mb, os.getpid()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._slots.put(None)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, _kill_all, self._processes)

    def ask(self, task: str, *texts: str) -> tuple[Any, str | None]:
        """(result, problem) of one request; exactly one of them says something.

        A worker that died under it (out of memory, killed from outside) is replaced and asked once more.
        """
        for _ in range(2):
            worker = self._take()
            try:
                reply = worker.ask(task, texts, self._timeout)
            except TimeoutError:
                self._give_back(worker, broken=True)
                return None, "timed out"
            except _WorkerDiedError:
                self._give_back(worker, broken=True)
            except BaseException:  # such as KeyboardInterrupt: a reply may still come, for nobody
                self._give_back(worker, broken=True)
                raise
            else:
                self._give_back(worker)
                return reply.get("result"), reply.get("error")
        return None, "worker died"

    def close(self) -> None:
        """Kill all workers; a request under way in another thread then ends with a RuntimeError."""
        with self._lock:
            self._closed = True
            _kill_all(self._processes)
        idle: list[_Worker | None] = []
        for _ in range(self._slots.qsize()):
            try:
                worker = self._slots.get_nowait()
            except queue.Empty:  # taken by another thread, which gives it back broken
                break
            idle.append(worker)
        for worker in idle:
            self._give_back(worker, broken=True)

    def _take(self) -> _Worker:
        if os.getpid() != self._pid:
            raise RuntimeError("A Grader does not survive a fork: create one in each process.")
        worker = self._slots.get()
        try:
            if worker is None and not self._closed:
                worker = _Worker(self._memory_mb)
            with self._lock:
                if self._closed or worker is None:
                    raise RuntimeError("This Grader is closed.")
                self._processes.add(worker.process)
        except BaseException:
            self._give_back(worker, broken=True)
            raise
        return worker

    def _give_back(self, worker: _Worker | None, broken: bool = False) -> None:
        if worker and broken:
            worker.dispose()
            with self._lock:
                self._processes.discard(worker.process)
        self._slots.put(None if broken else worker)


def _kill_all(processes: set[subprocess.Popen[bytes]]) -> None:
    """End processes without touching their pipes: another thread may be reading from them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
