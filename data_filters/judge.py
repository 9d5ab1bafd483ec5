"""Ask any OpenAI-compatible chat server for judgements, each once, ever.

What becomes of a question:

    answered        the reply held what was asked for; it is cached, and never asked again
    timeout         no reply within `timeout` seconds, in every try
    nonsense        replies that do not hold what was asked for, in every try
    server_error    status 429 or 5xx, in every try

The last three are not cached: the next run asks again. Any other status (a wrong key, an unknown model), a server that
cannot be reached, or 20 questions in a row without an answer end the run with one error; what was answered until then
is in the cache.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import httpx

from ..core.errors import GenerationError
from ..core.server_pool import wait_before
from ..core.trajectory import content_hash
from .result import ShowProgress, bar_of
from .score_cache import ScoreCache

Outcome = Literal["answered", "timeout", "nonsense", "server_error"]
UNANSWERED_IN_A_ROW = 20
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


class Verdict(NamedTuple):
    """What a judge said to one question: `value` is None unless the outcome is `answered`."""

    value: Any
    outcome: Outcome


def default_folder() -> Path:
    """Return where judgements lie unless a recipe says: `judge` in AFTERGLOW_CACHE, else in ~/.cache/afterglow."""
    return Path(os.environ.get("AFTERGLOW_CACHE") or Path.home() / ".cache" / "afterglow") / "judge"


@dataclass(frozen=True)
class Judge:
    """A model behind a server.

    Attributes:
        server_url: such as http://localhost:8000; the key, if it wants one, stands in OPENAI_API_KEY.
        model: the name by which the server knows it.
        cache: folder of judgements.
        timeout: seconds for one try.
        tries: how often a question is asked.
        concurrency: questions in flight at once.
        max_tokens: of a reply, thinking included.
    """

    server_url: str
    model: str
    cache: Path
    timeout: float = 120.0
    tries: int = 3
    concurrency: int = 16
    max_tokens: int = 2048

    def ask(
        self, prompts: Sequence[str], parse: Callable[[int, str], Any], progress: ShowProgress | None = None
    ) -> list[Verdict]:
        """Return the verdict on every prompt, in order.

        Args:
            prompts: one user message each.
            parse: (number of the prompt, reply without its thinking) -> what was asked for, or None if it is not there.
            progress: opens a progress bar; None shows none.

        Raises:
            GenerationError: the server cannot be reached, refuses, or answers nothing.
        """
        keys = [content_hash(prompt, self.max_tokens) for prompt in prompts]
        shared = ScoreCache(self.cache, content_hash("judge", self.model))
        known = {key: line["reply"] for key, line in shared.find(set(keys)).items()}
        verdicts: dict[int, Verdict] = {}
        for i, key in enumerate(keys):
            if key in known and (value := parse(i, known[key])) is not None:
                verdicts[i] = Verdict(value, "answered")
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
        unanswered = 0
        with (
            shared.writer() as log,
            bar_of(progress, "judge", len(prompts)) as bar,
            httpx.Client(headers=headers, timeout=self.timeout, trust_env=False) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            bar.advance(len(verdicts))
            lock = Lock()

            def ask_and_keep(i: int) -> Verdict:
                reply, verdict = self._ask_one(client, i, prompts[i], parse)
                if reply is not None:
                    with lock:
                        log.append({"key": keys[i], "reply": reply})
                return verdict

            asked = {pool.submit(ask_and_keep, i): i for i in range(len(prompts)) if i not in verdicts}
            try:
                for done in as_completed(asked):
                    i = asked[done]
                    verdicts[i] = done.result()
                    unanswered = 0 if verdicts[i].outcome == "answered" else unanswered + 1
                    if unanswered == UNANSWERED_IN_A_ROW:
                        raise self._silent(verdicts[i].outcome)
                    bar.advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error: what nobody has asked yet
        return [verdicts[i] for i in range(len(prompts))]

    def _ask_one(
        self, client: httpx.Client, i: int, prompt: str, parse: Callable[[int, str], Any]
    ) -> tuple[str | None, Verdict]:
        """Ask one question, several times if need be; the reply is returned where it answers."""
        outcome: Outcome = "nonsense"
        for number in range(1, self.tries + 1):
            try:
                response = client.post(
                    f"{self.server_url.rstrip('/').removesuffix('/v1')}/v1/chat/completions",
                    json={
                        "model": self.model,
                        "messages": [{"role": "user", "content": prompt}],
                        # The same question twice gives the same nonsense at temperature 0.
                        "temperature": 0.0 if number == 1 else 0.6,
                        "max_tokens": self.max_tokens,
                    },
                )
            except httpx.TimeoutException as error:
                if isinstance(error, httpx.ConnectTimeout):
                    raise self._unreachable(error) from error
                outcome = "timeout"
                continue
            except httpx.ConnectError as error:
                raise self._unreachable(error) from error
            except httpx.HTTPError:  # a connection that broke off
                outcome = "server_error"
                time.sleep(wait_before(number))
                continue
            if response.status_code == 429 or response.status_code >= 500:
                outcome = "server_error"
                time.sleep(wait_before(number))
                continue
            if response.status_code != 200:
                raise GenerationError(
                    f"the judge at {self.server_url} refuses with status {response.status_code}: "
                    f"{response.text[:200]!r}. Check `judge_model` ({self.model}) and the key in OPENAI_API_KEY."
                )
            reply = _content(response)
            value = None if reply is None else parse(i, reply)
            if value is not None:
                return reply, Verdict(value, "answered")
            outcome = "nonsense"
        return None, Verdict(None, outcome)

    def _silent(self, outcome: Outcome) -> GenerationError:
        return GenerationError(
            f"the judge {self.model} at {self.server_url} answered none of the last {UNANSWERED_IN_A_ROW} questions; "
            f"the last outcome was `{outcome}`. Try another judge, a longer `timeout` or more `max_tokens`; what it "
            "answered is kept."
        )

    def _unreachable(self, error: Exception) -> GenerationError:
        return GenerationError(
            f"no judge answers at {self.server_url} ({error}). Start the server, or correct `server_url`; what was "
            "answered before is kept."
        )


def _content(response: httpx.Response) -> str | None:
    """What the model replied, without its thinking; None if the server sent something else."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return _THOUGHT.sub("", content).strip() if isinstance(content, str) else None
