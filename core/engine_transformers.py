"""transformers' own generate: the fallback that runs wherever the model loads, in batches of similar prompt length.

Rows draw from their own generators in the same way as vLLM's sampler, so that on a CPU in float32 both engines give
the same tokens for the same seed.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from .checkpoint import Checkpoint, read_checkpoint, resolve_dtype
from .errors import GenerationError, ModelError, RecipeError
from .generation import (
    Completion,
    Engine,
    EngineConfig,
    Request,
    SamplingConfig,
    check_requests,
    first_stop,
    make_completion,
    room,
)
from .token_stats import ScoredSequence, TokenStats, score_tokens


class TransformersEngine(Engine):
    """Left-padded batches through `model.generate`; completions come batch by batch.

    Raises:
        ModelError: the weights cannot be read.
        RecipeError: `max_model_len` is more than the model has.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        self._rows = config.max_num_seqs or 64
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = None
        self._checkpoint = read_checkpoint(config.model)
        self.tokenizer = self._checkpoint.tokenizer
        limit = getattr(self._checkpoint.config, "max_position_embeddings", None)
        wanted = config.max_model_len or limit
        if wanted is None:
            raise RecipeError(f"max_model_len is missing: {config.model} does not say how long its context is")
        if limit is not None and wanted > limit:
            raise RecipeError(f"max_model_len is {wanted}: the context of {config.model} ends at {limit}")
        self.max_context: int = wanted
        self._model = self._load(self._checkpoint)

    def _load(self, checkpoint: Checkpoint) -> Any:
        dtype = resolve_dtype(self._config.dtype, checkpoint.config, on_gpu=self._device.type == "cuda")
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.model, dtype=dtype, **self._config.engine_kwargs
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ModelError(f"{checkpoint.model}: its weights could not be loaded: {error}") from error
        finally:
            if bar:
                logging.enable_progress_bar()
        # generate() fills whatever a request leaves open from the model's own file; the request leaves nothing open.
        model.generation_config = GenerationConfig()
        return model.eval() if "device_map" in self._config.engine_kwargs else model.eval().to(self._device)

    @property
    def model(self) -> Any:
        """The model itself, for forward passes of one's own.

        Raises:
            GenerationError: the engine is closed.
        """
        self._check_open()
        return self._model

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a sample."""
        return self._checkpoint.stop_ids

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self._check_open()
        check_requests(requests, self.max_context, self._checkpoint.config.vocab_size)
        return self._stream(requests)

    def token_stats(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[Hashable, TokenStats]]:
        """See `Engine.token_stats`."""
        return score_tokens(self.model, sequences)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Completion]:
        ordered = sorted(requests, key=lambda request: (_filters(request.sampling), len(request.prompt_ids)))
        for _, group in groupby(ordered, key=lambda request: _filters(request.sampling)):
            alike = list(group)
            for start in range(0, len(alike), self._rows):
                self._check_open()
                yield from self._batch(alike[start : start + self._rows])

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[Completion]:
        limits = [room(request, self.max_context) for request in requests]
        return sample_batch(self._model, requests, limits, self._checkpoint)

    def load_weights(self, model: str) -> None:
        """See `Engine.load_weights`."""
        self._check_open()
        checkpoint = read_checkpoint(model)
        self._checkpoint.check_replaceable_by(checkpoint)
        self.close()  # two sets of weights may not fit
        self._model = self._load(checkpoint)
        self._checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer

    def _check_open(self) -> None:
        if self._model is None:
            raise GenerationError("this engine is closed: open a new one.")

    def close(self) -> None:
        """See `Engine.close`."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def sample_batch(
    model: Any, requests: Sequence[Request], limits: Sequence[int], checkpoint: Checkpoint
) -> list[Completion]:
    """Sample one batch of requests, with the same filters each, through `model.generate`.

    With a model that is sharded over processes, all of them call it together: generate() goes on until the last
    process has its tokens.

    Args:
        model: a causal language model. What its generation configuration says applies where this says nothing.
        requests: at least one.
        limits: tokens that each may have.
        checkpoint: end tokens and tokenizer.

    Returns:
        One completion per request, in order.
    """
    sampler = _RowSampler(requests, limits, checkpoint, model.device)
    pad: Any = checkpoint.tokenizer.pad_token_id if checkpoint.tokenizer.pad_token_id is not None else 0
    longest = max(len(request.prompt_ids) for request in requests)
    ids = torch.full((len(requests), longest), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=max(limits), pad_token_id=pad),
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([_AllStopped(sampler)]),
    )
    return [
        make_completion(request, checkpoint, row.tokens, row.stopped, row.logprobs if request.logprobs else None)
        for request, row in zip(requests, sampler.rows, strict=True)
    ]


def _filters(sampling: SamplingConfig) -> tuple[float, float, int, float]:
    return sampling.temperature, sampling.min_p, sampling.top_k, sampling.top_p


def warpers(sampling: SamplingConfig) -> list[Callable[..., torch.Tensor]]:
    """Return transformers' filters for these settings, in vLLM's order."""
    chain: list[Callable[..., torch.Tensor]] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k != -1:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


class _Row:
    """What one row of a batch has generated."""

    def __init__(self):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.stopped = False  # by a stop token or stop string
        self.done = False  # or by its limit


class _RowSampler(LogitsProcessor):
    """Draw each row's token with the row's own generator; the returned scores leave generate() no other choice.

    A token is argmax(p_v / e_v) with e_v ~ Exponential(1): the Gumbel-max trick, exact samples of p, in the form
    that vLLM uses. A row's noise depends on its seed and step alone.
    """

    def __init__(
        self, requests: Sequence[Request], limits: Sequence[int], checkpoint: Checkpoint, device: torch.device
    ):
        self.rows = [_Row() for _ in requests]
        self._requests, self._limits, self._checkpoint = requests, limits, checkpoint
        self._greedy = requests[0].sampling.temperature == 0
        self._warpers = [] if self._greedy else warpers(requests[0].sampling)
        self._generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]
        self._logprobs = any(request.logprobs for request in requests)
        stops = [text for request in requests for text in request.sampling.stop]
        self._tail = max((len(text.encode()) for text in stops), default=0) + 8  # a token is at least one byte

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Map logits (rows, vocabulary) to scores that are finite at each row's drawn token only."""
        drawn = scores.argmax(-1) if self._greedy else self._draw(input_ids, scores)
        logprobs = torch.zeros(len(drawn))
        if self._logprobs:
            logprobs = scores.float().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        for number, (token, logprob) in enumerate(zip(drawn.tolist(), logprobs.tolist(), strict=True)):
            self._append(number, token, logprob)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn[:, None], 0.0)

    def _draw(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.ones_like(scores)
        for number, row in enumerate(self.rows):
            if not row.done:
                noise[number].exponential_(generator=self._generators[number])
        return scores.softmax(-1).div_(noise).argmax(-1)

    def _append(self, number: int, token: int, logprob: float) -> None:
        row, request = self.rows[number], self._requests[number]
        if row.done:
            return
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.stopped = token in self._checkpoint.stop_ids
        if request.sampling.stop and not row.stopped:
            text = self._checkpoint.tokenizer.decode(row.tokens[-self._tail :], skip_special_tokens=False)
            row.stopped = first_stop(str(text), request.sampling.stop) is not None
        row.done = row.stopped or len(row.tokens) >= self._limits[number]


class _AllStopped(StoppingCriteria):
    def __init__(self, sampler: _RowSampler):
        self._sampler = sampler

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([row.done for row in self._sampler.rows], device=input_ids.device)
