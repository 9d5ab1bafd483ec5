"""Generation: one protocol, three engines (vLLM in this process, an OpenAI-compatible server, transformers).

The same `Request` goes into each engine and the same `Completion` comes out:

* One sample is one request with its own seed. Its tokens depend on its prompt, seed and sampling settings, and
  beyond floating-point rounding on nothing else in the batch, so that a killed run can be resumed row by row.
* `token_ids` is what the model generated, the stop token included. `text` is these tokens decoded with their
  markup (`<think>`, `<tool_call>`), without the stop token, cut before a stop string.
* `logprobs` are raw: natural logarithms of the model's own softmax at temperature 1, before temperature, top-k,
  top-p and min-p. It is the one convention every default vLLM server follows, and anyone can recompute it with a
  forward pass.
* A sample stops at the tokenizer's end token or any end token of `generation_config.json`; nothing else of that
  file is applied (no hidden repetition penalty).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from .checkpoint import Checkpoint
from .errors import GenerationError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .token_stats import ScoredSequence, TokenStats


@dataclass
class SamplingConfig:
    """How tokens are drawn. The filters apply in vLLM's order: temperature, min-p, top-k, top-p."""

    temperature: float = field(default=0.6, metadata={"help": "Softmax temperature; 0 is greedy decoding."})
    top_p: float = field(
        default=0.95, metadata={"help": "Keep the smallest set of tokens with this probability mass; 1 keeps all."}
    )
    top_k: int = field(default=-1, metadata={"help": "Keep the k most likely tokens; -1 keeps all."})
    min_p: float = field(
        default=0.0,
        metadata={"help": "Drop tokens below this share of the likeliest token's probability; 0 keeps all."},
    )
    max_tokens: int = field(
        default=2048, metadata={"help": "Longest completion in tokens; cut to what the context still holds."}
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": "Strings that end a completion; they are not part of its text."}
    )

    def __post_init__(self):
        problems = []
        if not (math.isfinite(self.temperature) and (self.temperature == 0 or self.temperature >= 0.01)):
            problems.append(f"temperature is {self.temperature}: use 0 (greedy) or at least 0.01")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: use a number above 0, at most 1")
        if self.top_k != -1 and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}: use -1 (all tokens) or at least 1")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p is {self.min_p}: use a number from 0 to 1")
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}: use at least 1")
        if not all(isinstance(text, str) and text for text in self.stop):
            problems.append(f"stop is {self.stop}: use a list of non-empty strings")
        if problems:
            raise RecipeError("; ".join(problems))


@dataclass
class EngineConfig:
    """Which model generates, and where."""

    model: str = field(metadata={"help": "Model folder or hub id; also names the tokenizer and its chat template."})
    engine: Literal["vllm", "server", "transformers"] = field(
        default="vllm",
        metadata={
            "help": "`vllm`: in this process; `server`: an OpenAI-compatible one; `transformers`: slower, needs no vLLM"
        },
    )
    server_url: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "The server, such as http://localhost:8000, or several of the same model: each request goes to the "
            "one with the most room. Their key is read from OPENAI_API_KEY."
        },
    )
    server_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds that one reply of a server may take before it is asked again, and for which a server that "
            "does not answer is waited for."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "`auto` is the type the checkpoint is stored in, but float32 runs as bfloat16 on a GPU (fast "
            "attention kernels have no float32) and float16 as float32 on a CPU."
        },
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "Context in tokens, prompt included; default: all that the model has."}
    )
    max_num_seqs: int | None = field(
        default=None, metadata={"help": "Sequences generated at once; default: 256 with vllm, else 64."}
    )
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of each GPU's memory that vllm takes."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs over which vllm splits the model."})
    engine_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Passed on as they are: to `vllm.LLM`, or to `from_pretrained` of transformers."},
    )

    def __post_init__(self):
        problems = []
        if not self.model:
            problems.append("model is missing: name a model folder or hub id")
        if self.engine not in ("vllm", "server", "transformers"):
            problems.append(f"engine is {self.engine!r}: use vllm, server or transformers")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            problems.append(f"dtype is {self.dtype!r}: use auto, float32, bfloat16 or float16")
        if self.engine == "server" and not (
            self.server_urls and all(url.startswith(("http://", "https://")) for url in self.server_urls)
        ):
            problems.append(f"server_url is {self.server_url!r}: `engine: server` needs one like http://localhost:8000")
        if len(set(self.server_urls)) < len(self.server_urls):
            problems.append(f"server_url is {self.server_url!r}: one server stands twice")
        if self.engine != "server" and self.server_url:
            problems.append(f"server_url is set, but engine is {self.engine}: say `engine: server`")
        if self.engine == "server" and self.engine_kwargs:
            problems.append("engine_kwargs have no effect on a server: give them to the server's own command line")
        if not 0 < self.gpu_memory_utilization <= 1:
            problems.append(f"gpu_memory_utilization is {self.gpu_memory_utilization}: above 0, at most 1")
        for key in ("server_timeout", "max_model_len", "max_num_seqs", "tensor_parallel_size"):
            if (value := getattr(self, key)) is not None and value <= 0:
                problems.append(f"{key} is {value}: use a positive number")
        if problems:
            raise RecipeError("; ".join(problems))

    @property
    def server_urls(self) -> list[str]:
        """The servers, one or many; none for another engine."""
        return [self.server_url] if isinstance(self.server_url, str) else list(self.server_url or [])


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        key: names the sample; unique within one `generate` call.
        prompt_ids: the prompt's token ids (`encode_prompt`, or a rollout so far).
        seed: from 0 to 2^63 - 1. Samples of one prompt need different seeds.
        sampling: how to draw.
        logprobs: whether the completion carries log-probabilities.
    """

    key: str
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: SamplingConfig
    logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """What came of one request; the module's first lines define the fields."""

    key: str
    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    routed_experts: Any = None  # (tokens, layers, k), where vLLM runs with `enable_return_routed_experts`


class Engine(Protocol):
    """What every engine does. Engines are context managers; leaving the block closes them."""

    tokenizer: "PreTrainedTokenizerBase"
    max_context: int

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Check all requests at once, then yield each completion as it finishes, in any order.

        Closing the iterator early cancels what is still running.

        Raises:
            GenerationError: a prompt does not fit the context, two requests share a key, or the engine failed.
        """
        ...

    def open_stream(self) -> "Stream":
        """Open a stream of requests that come while others run, as rollouts need it. One at a time."""
        return BatchStream(self)

    def token_stats(self, sequences: "Sequence[ScoredSequence]") -> "Iterator[tuple[Hashable, TokenStats]]":
        """Score the marked tokens of every sequence: what `core.token_stats.score_tokens` does, less entropy.

        Yields:
            (key, statistics), in any order.

        Raises:
            GenerationError: this engine cannot score tokens that it did not draw.
        """
        raise GenerationError(
            "log-likelihoods of given texts need `engine: vllm` or `engine: transformers`; a server does not tell them."
        )

    def load_weights(self, model: str) -> None:
        """Swap in another checkpoint of the same shape, with its tokenizer and stop tokens, without a restart.

        Raises:
            ModelError: there is no such checkpoint, or its shape differs.
            GenerationError: this engine cannot swap weights, and why.
        """
        ...

    def close(self) -> None:
        """Free the model. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stream(ABC):
    """Requests that come while others run. Close it, or use it in a `with` statement: that cancels what still runs."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests that were submitted and have not come back."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Add a request.

        Raises:
            GenerationError: it does not fit the context (some engines say so at the next poll), or its key is running.
        """

    @abstractmethod
    def poll(self) -> list[Completion]:
        """Generate for a moment, and return what finished, if anything did.

        Raises:
            GenerationError: the engine failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel what still runs. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class BatchStream(Stream):
    """A stream over an engine that knows `generate` only: what is submitted meanwhile goes with the next call."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._completions: Iterator[Completion] = iter(())

    @property
    def running(self) -> int:
        """See `Stream.running`."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: Request) -> None:
        """See `Stream.submit`."""
        if request.key in self._waiting or request.key in self._running:
            raise GenerationError(f"request {request.key!r} stands twice: every sample needs its own key.")
        self._waiting[request.key] = request

    def poll(self) -> list[Completion]:
        """See `Stream.poll`."""
        if not self._running and self._waiting:
            self._running, self._waiting = self._waiting, {}
            self._completions = self._engine.generate(list(self._running.values()))
        found = [completion] if (completion := next(self._completions, None)) else []
        for completion in found:
            del self._running[completion.key]
        return found

    def close(self) -> None:
        """See `Stream.close`."""
        if isinstance(self._completions, Generator):
            self._completions.close()
        self._waiting, self._running, self._completions = {}, {}, iter(())


def open_engine(config: EngineConfig) -> Engine:
    """Start the engine that `config.engine` names.

    Raises:
        MissingDependencyError: vLLM is not installed, or its version is outside the supported range.
        ModelError: the model or its tokenizer cannot be read.
        GenerationError: no server answers at `config.server_url`.
    """
    if config.engine == "server":
        from .engine_server import ServerEngine

        return ServerEngine(config)
    if config.engine == "transformers":
        from .engine_transformers import TransformersEngine

        return TransformersEngine(config)
    from .engine_vllm import VLLMEngine

    return VLLMEngine(config)


# ---------------------------------------------------------------------------------------------------------------------
# shared by the engines


def room(request: Request, max_context: int) -> int:
    """Return how many tokens a request may generate: `max_tokens`, cut to what the context still holds."""
    return min(request.sampling.max_tokens, max_context - len(request.prompt_ids))


def check_requests(requests: Sequence[Request], max_context: int, vocab_size: int) -> None:
    """Refuse, before anything is generated, what no engine could answer.

    Raises:
        GenerationError: a prompt is empty, too long or holds a token that the model does not know, or a key stands
            twice; names keys and lengths.
    """
    seen: set[str] = set()
    for request in requests:
        if request.key in seen:
            raise GenerationError(f"request {request.key!r} stands twice: every sample needs its own key.")
        seen.add(request.key)
        if not request.prompt_ids:
            raise GenerationError(f"request {request.key!r}: its prompt is empty.")
        if max(request.prompt_ids) >= vocab_size or min(request.prompt_ids) < 0:
            raise GenerationError(
                f"request {request.key!r}: token {max(request.prompt_ids)} is outside the model's vocabulary of "
                f"{vocab_size}. Is the tokenizer another model's?"
            )
    long = [r for r in requests if len(r.prompt_ids) >= max_context]
    if long:
        names = ", ".join(f"{r.key!r} ({len(r.prompt_ids)} tokens)" for r in long[:3])
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise GenerationError(
            f"{len(long)} of {len(requests)} prompts leave no room in the context of {max_context} tokens: "
            f"{names}{more}. Filter long prompts, or raise `max_model_len` if the model allows it."
        )


def make_completion(
    request: Request, checkpoint: Checkpoint, token_ids: list[int], stopped: bool, logprobs: list[float] | None
) -> Completion:
    """Build the completion of one request from its tokens; the text rules stand here once for all engines."""
    ended = stopped and bool(token_ids) and token_ids[-1] in checkpoint.stop_ids
    text = str(checkpoint.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=False))
    if stopped and not ended:
        text = text[: first_stop(text, request.sampling.stop)]
    return Completion(request.key, token_ids, text, "stop" if stopped else "length", logprobs)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins in the text, or None."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)
