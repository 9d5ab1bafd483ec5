"""Any OpenAI-compatible server (vLLM's own first of all), asked over HTTP with token-id prompts.

Many requests are in flight at once, over one server or several of the same model, each on the one with the most room.
A request is asked again, a limited number of times, after a lost connection, a time-out, a 429 or 5xx status or a
malformed reply, on another server where there is one. A server that is not there (it is being restarted) costs no try:
it is waited for up to `server_timeout`. What still fails ends the run with one plain error, and every completion
received before it has already been handed on.
"""

import asyncio
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from warnings import warn

import httpx

from .checkpoint import Checkpoint, read_checkpoint
from .errors import GenerationError, ModelError
from .generation import Completion, Engine, EngineConfig, Request, Stream, check_requests, make_completion, room
from .server_pool import Server, ServerPool, wait_before

TRIES = 6
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.02  # for which a stream waits for a reply before it looks for new requests


class _Failed(Exception):
    """One try of one request failed.

    Attributes:
        final: another try would fail as well.
        absent: there was no server to ask.
    """

    def __init__(self, cause: str, final: bool = False, absent: bool = False):
        super().__init__(cause)
        self.final, self.absent = final, absent


class ServerEngine(Engine):
    """Client of one or more servers that already run.

    A server decides its own dtype and memory; `max_num_seqs` is how many requests are in flight at once on each.
    A vLLM server on a CPU needs `--no-enable-chunked-prefill`: its CPU build cannot prefill a seeded request in pieces.

    Raises:
        GenerationError: no server answers, it wants a key, or it serves another model.
        ModelError: the tokenizer named by `config.model` cannot be read.
    """

    def __init__(self, config: EngineConfig):
        self._loop: asyncio.AbstractEventLoop | None = None
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in config.server_urls]
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = config.server_timeout
        self._pool = ServerPool(self._urls, config.max_num_seqs or 64)
        self._slots = (config.max_num_seqs or 64) * len(self._urls)
        self._warned = False
        served = {url: self._find_model(config.model, url) for url in self._urls}
        self._names: dict[str, str] = {url: of["id"] for url, of in served.items()}
        self._checkpoint = read_checkpoint(config.model)
        self.tokenizer = self._checkpoint.tokenizer
        limits = (*(of.get("max_model_len") for of in served.values()), config.max_model_len)
        known = [int(limit) for limit in limits if limit]
        self.max_context: int = min(known) if known else int(self._checkpoint.config.max_position_embeddings)
        self._start()

    def _start(self) -> None:
        """Run an event loop in a thread of its own: requests stay in flight while the caller works on results."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="afterglow-server-client", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self._timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=self._slots),
        )

    def _find_model(self, model: str, url: str) -> dict[str, Any]:
        reply = self._control("GET", url, "/v1/models", CONNECT_SECONDS)
        if reply.status_code in (401, 403):
            raise GenerationError(f"{url} refuses this client (HTTP {reply.status_code}): set OPENAI_API_KEY.")
        try:
            models = [entry for entry in reply.raise_for_status().json()["data"] if "id" in entry]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise GenerationError(
                f"{url}/v1/models gives no list of models ({error}): is `server_url` right?"
            ) from error
        for entry in models:
            if model == entry["id"] or any(_same_path(model, entry.get(key)) for key in ("id", "root")):
                return entry
        served = ", ".join(repr(entry["id"]) for entry in models) or "no model"
        raise GenerationError(
            f"{url} serves {served}, the recipe asks for {model!r}. Name the served model, or start the server "
            f"with `--served-model-name {model}`."
        )

    def _control(self, method: str, url: str, path: str, seconds: float, **kwargs: Any) -> httpx.Response:
        try:
            return httpx.request(method, url + path, headers=self._headers, timeout=seconds, **kwargs)
        except httpx.TransportError as error:
            raise GenerationError(
                f"no server answers at {url} ({type(error).__name__}: {error}). Start one, for example "
                "`python -m vllm.entrypoints.openai.api_server --model MODEL --port 8000`, or say `engine: vllm`."
            ) from error

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self._running_loop()
        check_requests(requests, self.max_context, self._checkpoint.config.vocab_size)
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Completion]:
        results: queue.SimpleQueue[Completion | Exception | None] = queue.SimpleQueue()
        batch = asyncio.run_coroutine_threadsafe(self._ask_all(requests, results), self._running_loop())
        batch.add_done_callback(lambda _: results.put(None))
        try:
            for _ in requests:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    raise GenerationError("this engine was closed while it generated.")
                yield result
        finally:
            batch.cancel()

    def open_stream(self) -> Stream:
        """See `Engine.open_stream`."""
        return _ServerStream(self, self._running_loop())

    async def _ask_all(self, requests: Sequence[Request], results: "queue.SimpleQueue[Any]") -> None:
        slots = asyncio.Semaphore(self._slots)

        async def ask(request: Request) -> None:
            async with slots:
                try:
                    results.put(await self._ask(request))
                except Exception as error:  # raised again where the results are read
                    results.put(error)

        await asyncio.gather(*(ask(request) for request in requests))

    async def _ask(self, request: Request) -> Completion:
        number, server = 0, None
        while True:
            server = await self._pool.take(avoid=server)
            try:
                return self._completion(request, await self._post(server, self._body(request, server)))
            except _Failed as failure:
                number += not failure.absent
                lost = self._pool.absent(server, str(failure)) if failure.absent else 0.0
                if failure.final or number == TRIES or lost > self._timeout:
                    times = "once" if number == 1 else f"{number} times"
                    how = f"no answer for {lost:.0f} s" if failure.absent else f"failed {times}"
                    raise GenerationError(f"request {request.key!r}: {server.url} {how}: {failure}") from failure
                pause = 0.0 if failure.absent else wait_before(number)
            finally:
                self._pool.release(server)
            await asyncio.sleep(pause)

    async def _post(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        """Return the one choice of the reply, checked."""
        try:
            reply = await self._client.post(f"{server.url}/v1/completions", json=body)
        except httpx.TransportError as error:
            absent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise _Failed(f"{type(error).__name__} {error}".strip(), absent=absent) from error
        self._pool.answered(server)
        if reply.status_code != 200:
            final = reply.status_code < 500 and reply.status_code not in (408, 429)
            raise _Failed(f"HTTP {reply.status_code}: {reply.text[:300]}", final)
        try:
            (choice,) = map(dict, reply.json()["choices"])
            reason = choice["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Failed(f"malformed reply {reply.text[:200]!r}") from error
        if reason not in ("stop", "length"):
            raise _Failed(f"malformed reply: finish_reason is {reason!r}")
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise _Failed("malformed reply: it answers another prompt")
        return choice

    def _body(self, request: Request, server: Server) -> dict[str, Any]:
        sampling = request.sampling
        return {
            "model": self._names[server.url],
            "prompt": list(request.prompt_ids),
            "max_tokens": room(request, self.max_context),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,  # else the server takes it from the model's generation_config.json
            "seed": request.seed,
            "stop": sampling.stop,
            "stop_token_ids": sorted(self._checkpoint.stop_ids),
            "skip_special_tokens": False,
            "logprobs": 1 if request.logprobs else None,
            "return_token_ids": True,
        }

    def _completion(self, request: Request, choice: dict[str, Any]) -> Completion:
        stopped = choice["finish_reason"] == "stop"
        if choice.get("token_ids") is None:
            return self._without_ids(request, choice, stopped)
        try:
            tokens = [int(token) for token in choice["token_ids"]]
            logprobs = [float(x) for x in choice["logprobs"]["token_logprobs"]] if request.logprobs else None
        except (ValueError, KeyError, TypeError) as error:
            raise _Failed(f"malformed reply: {error!r}") from error
        if logprobs is not None and len(logprobs) != len(tokens):
            raise _Failed(f"malformed reply: {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        return make_completion(request, self._checkpoint, tokens, stopped, logprobs)

    def _without_ids(self, request: Request, choice: dict[str, Any], stopped: bool) -> Completion:
        """Take a reply that has only text; its token ids are a best guess that training must not rely on."""
        if request.logprobs:
            raise GenerationError(
                f"request {request.key!r}: the server returns no token ids, so log-probabilities cannot be matched to "
                "tokens. Use a vLLM server (0.10.2 or newer), or ask without logprobs."
            )
        if not isinstance(text := choice.get("text"), str):
            raise _Failed("malformed reply: neither token_ids nor text")
        if not self._warned:
            self._warned = True
            warn(
                f"{self._urls[0]} returns no token ids (`return_token_ids` is vLLM's): they are the text tokenized "
                "again, and may differ from what the model generated.",
                stacklevel=2,
            )
        tokens: Any = self.tokenizer.encode(text, add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        if stopped and not request.sampling.stop and eos is not None:
            tokens = [*tokens, eos]
        return Completion(request.key, list(tokens), text, "stop" if stopped else "length")

    def load_weights(self, model: str) -> None:
        """See `Engine.load_weights`: a vLLM server in development mode that sees the same file system can do it."""
        self._running_loop()
        checkpoint = read_checkpoint(model)
        self._checkpoint.check_replaceable_by(checkpoint)
        if checkpoint.config.tie_word_embeddings:
            self._refuse_cpu(checkpoint)
        path = str(Path(model).resolve()) if Path(model).exists() else model
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        for url in self._urls:
            for route, content in (("/collective_rpc", body), ("/reset_prefix_cache", None)):
                reply = self._control("POST", url, route, self._timeout, json=content)
                if reply.status_code == 404:
                    raise GenerationError(_NO_SWAP.format(url))
                if reply.status_code != 200:
                    raise ModelError(f"{model}: {url}{route} failed (HTTP {reply.status_code}): {reply.text[:300]}")
        self._checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer

    def _refuse_cpu(self, checkpoint: Checkpoint) -> None:
        """A vLLM server on a CPU would go on with the old checkpoint's tied head, silently."""
        for url in self._urls:
            reply = self._control("GET", url, "/server_info", 60.0)
            if reply.status_code == 404:
                raise GenerationError(_NO_SWAP.format(url))
            if "device_config=cpu" in reply.text:
                raise GenerationError(
                    f"{checkpoint.model}: its head is tied to its embedding, and a vLLM server on a CPU keeps the old "
                    "head when weights are swapped. Start a server for this checkpoint, or say `engine: vllm`."
                )

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise GenerationError("this engine is closed: open a new one.")
        return self._loop

    def close(self) -> None:
        """See `Engine.close`; the server goes on running."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        asyncio.run_coroutine_threadsafe(_shut_down(self._client), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()


class _ServerStream(Stream):
    """Every submitted request is in flight at once, as far as `max_num_seqs` allows."""

    def __init__(self, engine: ServerEngine, loop: asyncio.AbstractEventLoop):
        self._engine, self._loop = engine, loop
        self._slots = asyncio.Semaphore(engine._slots)
        self._results: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        self._asked: dict[str, Future[None]] = {}

    @property
    def running(self) -> int:
        """See `Stream.running`."""
        return len(self._asked)

    def submit(self, request: Request) -> None:
        """See `Stream.submit`."""
        engine = self._engine
        check_requests([request], engine.max_context, engine._checkpoint.config.vocab_size)
        if request.key in self._asked:
            raise GenerationError(f"request {request.key!r} stands twice: every sample needs its own key.")
        self._asked[request.key] = asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)

    async def _ask(self, request: Request) -> None:
        async with self._slots:
            try:
                self._results.put(await self._engine._ask(request))
            except BaseException as error:  # raised again where the results are read
                self._results.put(error)

    def poll(self) -> list[Completion]:
        """See `Stream.poll`: waits a moment for a reply."""
        found: list[Completion] = []
        try:
            result = self._results.get(timeout=POLL_SECONDS)
            while True:
                if isinstance(result, asyncio.CancelledError):
                    raise GenerationError("this engine was closed while it generated.") from result
                if isinstance(result, BaseException):
                    raise result
                del self._asked[result.key]
                found.append(result)
                result = self._results.get_nowait()
        except queue.Empty:
            return found

    def close(self) -> None:
        """See `Stream.close`."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked = {}


_NO_SWAP = (
    "{} cannot swap weights: only a vLLM server started with VLLM_SERVER_DEV_MODE=1 can. Restart it so, start one "
    "server for each checkpoint, or say `engine: vllm`."
)


async def _shut_down(client: httpx.AsyncClient) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def _same_path(model: str, served: str | None) -> bool:
    return bool(served) and Path(model).exists() and Path(str(served)).resolve() == Path(model).resolve()
