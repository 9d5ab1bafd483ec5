"""Which of several servers of one model takes the next request: the one with the most room among those that answer."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from warnings import warn

FIRST_WAIT = 0.5  # seconds; doubles with each failure, up to the longest
LONGEST_WAIT = 30.0


def wait_before(number: int) -> float:
    """Return the seconds to wait before try number + 1."""
    return min(FIRST_WAIT * 2 ** min(number - 1, 16), LONGEST_WAIT)


def is_healthy(url: str, timeout: float = 5.0) -> bool:
    """Whether a vLLM server answers and its engine lives."""
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=timeout, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass(eq=False)
class Server:
    """One server: requests in flight, and since when and until when it is left alone because it does not answer."""

    url: str
    running: int = 0
    absences: int = 0
    rests_until: float = 0.0
    absent_since: float | None = None


class ServerPool:
    """Spreads requests over servers. Used within one event loop.

    Args:
        urls: the servers.
        slots: requests in flight on each at most.
    """

    def __init__(self, urls: Sequence[str], slots: int):
        self.servers = [Server(url) for url in urls]
        self._slots = slots
        self._freed = asyncio.Event()

    async def take(self, avoid: Server | None = None) -> Server:
        """Wait for a free slot, on another server than `avoid` where there is one; give it back with `release`."""
        while True:
            now = time.monotonic()
            free = [server for server in self.servers if server.running < self._slots]
            best = min(free, key=lambda s: (max(s.rests_until - now, 0), s is avoid, s.running), default=None)
            if best and best.rests_until <= now:
                best.running += 1
                return best
            self._freed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), best.rests_until - now if best else None)

    def release(self, server: Server) -> None:
        """Give a slot back."""
        server.running -= 1
        self._freed.set()

    def answered(self, server: Server) -> None:
        """The server is there: whatever it said."""
        server.absences, server.rests_until, server.absent_since = 0, 0.0, None

    def absent(self, server: Server, cause: str) -> float:
        """The server is not there; leave it alone for a while.

        Returns:
            Seconds since when no server of the pool answers; 0 where another one does.
        """
        now = time.monotonic()
        if server.absent_since is None:
            server.absent_since = now
            warn(f"{server.url} does not answer ({cause}); waiting for it.", stacklevel=2)
        if server.rests_until <= now:  # requests that fail together are one absence
            server.absences += 1
            server.rests_until = now + wait_before(server.absences)
        return min(0.0 if s.absent_since is None else now - s.absent_since for s in self.servers)
