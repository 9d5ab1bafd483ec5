"""Weights on their way to a vLLM server: every wait ends, with a message that says what happened.

TRL hands weights over with NCCL, inside of which no exception arrives: when the server is killed, or its port cannot be
reached, the trainer would wait for ever. So a thread looks after the server meanwhile, and ends the process.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from requests import RequestException

from ..core.errors import GenerationError
from ..core.server_pool import is_healthy

LOOK_EVERY = 5.0  # seconds between two looks at the server
MISSES = 3  # looks in a row without an answer: it is gone
LONGEST_SYNC = 600.0  # seconds; 60 GB over a link of 1 Gbit/s take 480
LOST = 3  # exit code


@contextmanager
def watched(url: str, doing: str) -> Iterator[None]:
    """Do something that waits for a server, and end the process if the server dies or takes too long.

    Args:
        url: of the server.
        doing: what is done, for the message.

    Raises:
        GenerationError: the server does not answer to begin with, or says that it cannot do it.
    """
    if not is_healthy(url):
        raise GenerationError(f"{_before(url, doing)} the server does not answer. {_MEND}")
    done = threading.Event()
    threading.Thread(target=_look_after, args=(url, doing, done), daemon=True).start()
    try:
        yield
    except RequestException as error:
        raise GenerationError(f"{_before(url, doing)} the connection was lost ({error}). {_MEND}") from error
    except (RuntimeError, NotImplementedError) as error:
        raise GenerationError(f"{_before(url, doing)} {error}") from error
    finally:
        done.set()


_MEND = "Its own log says why. Start both again: the same command goes on from the last checkpoint."


def _before(url: str, doing: str) -> str:
    return f"vLLM server {url}, while {doing}:"


def _look_after(url: str, doing: str, done: threading.Event) -> None:
    started, misses = time.monotonic(), 0
    while not done.wait(LOOK_EVERY):
        misses = 0 if is_healthy(url) else misses + 1
        seconds = time.monotonic() - started
        if done.is_set():  # meanwhile
            return
        if misses >= MISSES:
            _end(f"{_before(url, doing)} it has not answered {misses} times in a row. {_MEND}")
        if seconds > LONGEST_SYNC:
            _end(
                f"{_before(url, doing)} it answers, but this is not done after {seconds:.0f} s. Is the port of "
                f"`vllm_group_port` closed between the two, or NCCL_SOCKET_IFNAME another network? {_MEND}"
            )


def _end(message: str) -> None:
    """End the process at once: its main thread waits in NCCL and cannot be woken. What was saved stays."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)


def watched_client(base: type) -> type:
    """Return TRL's client of a vLLM server (`VLLMClient`, whose import is vLLM's) with waits that end."""

    class WatchedClient(base):
        """A client whose handshake and weight updates end."""

        def __init__(self, *args: Any, **kwargs: Any):
            try:
                super().__init__(*args, **kwargs)
            except (ConnectionError, RequestException) as error:
                raise GenerationError(f"{error} {_MEND}") from error

        def init_communicator(self, device: Any = 0) -> None:
            """Join the server's processes in one NCCL group."""
            with watched(self.base_url, "joining its weight-update group"):
                super().init_communicator(device)

        def update_named_params(self, metadata: Any, named_params: Any) -> None:
            """Send the weights."""
            with watched(self.base_url, "sending it new weights"):
                super().update_named_params(metadata, named_params)

    return WatchedClient
