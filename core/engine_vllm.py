"""vLLM in this process: the default engine. Everything that depends on vLLM's version stands in this file."""

import gc
import logging
import os
import random
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, read_checkpoint, resolve_dtype
from .errors import GenerationError, MissingDependencyError, ModelError
from .generation import Completion, Engine, EngineConfig, Request, Stream, check_requests, make_completion, room

if TYPE_CHECKING:
    import torch

    from .token_stats import ScoredSequence, TokenStats

OLDEST, NEWEST = (0, 22), (0, 31)  # the range whose engine calls are the ones made here

# Read while vLLM is imported or its engine is built; whatever the user has set stays.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # counts only where torch is not yet imported
}
# Without a GPU the engine lives in this process: it starts in a third of the time of the default three processes.
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "DS_ACCELERATOR": "cpu",  # deepspeed, if installed, else reports its guess on standard output
}
CPU_CACHE_BYTES = 1 << 30


class VLLMEngine(Engine):
    """vLLM's engine, driven request by request.

    On a GPU it runs with vLLM's own defaults (compiled, CUDA graphs, its own processes). On a CPU it runs in this
    process, eager, and holds a one-process torch.distributed group until it is closed: close it before training
    starts in the same process.

    Raises:
        MissingDependencyError: vLLM is not installed, or outside the supported versions.
        ModelError: vLLM cannot run this model.
    """

    def __init__(self, config: EngineConfig):
        self._llm: Any = None
        with process_state_kept():
            import_vllm()
            from vllm import LLM
            from vllm.platforms import current_platform

            self._on_cpu = current_platform.is_cpu()
            self._checkpoint = read_checkpoint(config.model)
            if self._on_cpu:
                for name, value in IN_PROCESS.items():
                    os.environ.setdefault(name, value)
            try:
                self._llm = LLM(**_llm_arguments(config, self._checkpoint, self._on_cpu))
            except (ValueError, TypeError, RuntimeError, OSError) as error:
                raise ModelError(f"{config.model}: vLLM could not start: {error}") from error
        self.max_context: int = self._llm.llm_engine.model_config.max_model_len
        self.tokenizer = self._checkpoint.tokenizer

    @classmethod
    def around(cls, llm: Any, checkpoint: Checkpoint) -> "VLLMEngine":
        """Drive an `LLM` that another owns: a trainer's, whose weights it renews itself. Do not close it."""
        engine = cls.__new__(cls)
        engine._llm, engine._checkpoint, engine.tokenizer = llm, checkpoint, checkpoint.tokenizer
        engine.max_context = llm.llm_engine.model_config.max_model_len
        return engine

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        self._check_idle()
        check_requests(requests, self.max_context, self._checkpoint.config.vocab_size)
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Completion]:
        with self.open_stream() as stream:
            for request in requests:
                stream.submit(request)
            while stream.running:
                yield from stream.poll()

    def open_stream(self) -> Stream:
        """See `Engine.open_stream`."""
        self._check_idle()
        return _VLLMStream(self)

    def _add(self, name: str, request: Request) -> None:
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self._llm.llm_engine.add_request(name, prompt, self._parameters(request))

    def _step(self) -> list[Any]:
        import torch

        try:
            with torch.random.fork_rng(devices=[]):  # the sampler also draws from the global generator
                return self._llm.llm_engine.step()
        except Exception as error:  # whatever it was, the engine's state is lost
            self.close()
            raise GenerationError(f"vLLM failed while it generated (the engine is closed): {error}") from error

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=request.seed,
            max_tokens=room(request, self.max_context),
            stop=sampling.stop,
            stop_token_ids=sorted(self._checkpoint.stop_ids),
            ignore_eos=True,  # the line above holds all end tokens, also after the weights were swapped
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logprobs=0 if request.logprobs else None,  # 0: of the sampled token only
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def token_stats(self, sequences: "Sequence[ScoredSequence]") -> "Iterator[tuple[Hashable, TokenStats]]":
        """See `Engine.token_stats`.

        Where logits are equal, which in 16 bits is common and in float32 next to never happens, vLLM counts them
        against the token, and `score_tokens` in its favour.

        Yields:
            (key, statistics) in the order of the sequences.
        """
        import numpy as np
        import torch
        from vllm import SamplingParams

        from .token_stats import TokenStats

        self._check_idle()
        positions = [np.flatnonzero(np.asarray(sequence.scored)) for sequence in sequences]
        asked = [i for i, scored in enumerate(positions) if len(scored)]
        ids = [np.asarray(sequences[i].input_ids)[: positions[i][-1] + 1].tolist() for i in asked]
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        # 0: of the given token only, which comes with its rank whatever the number
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        with torch.random.fork_rng(devices=[]):
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False) if prompts else []
        given = dict(zip(asked, outputs, strict=True))
        for i, sequence in enumerate(sequences):
            of = given[i].prompt_logprobs if i in given else []
            found = [of[p][int(sequence.input_ids[p])] for p in positions[i]]
            nll = torch.tensor([-entry.logprob for entry in found], dtype=torch.float32)
            yield sequence.key, TokenStats(nll, torch.tensor([entry.rank for entry in found], dtype=torch.int32))

    def load_weights(self, model: str) -> None:
        """See `Engine.load_weights`."""
        self._check_idle()
        checkpoint = read_checkpoint(model)
        self._checkpoint.check_replaceable_by(checkpoint)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            self.close()
            raise ModelError(f"{model}: vLLM could not load these weights (the engine is closed): {error}") from error
        if self._on_cpu:
            self._llm.apply_model(retie)
        if not self._llm.reset_prefix_cache():
            self.close()
            raise GenerationError(f"{model}: vLLM kept its cache of the old weights' prefixes (the engine is closed).")
        self._checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer

    def _check_idle(self) -> None:
        if self._llm is None:
            raise GenerationError("this engine is closed: open a new one.")
        if self._llm.llm_engine.has_unfinished_requests():
            raise GenerationError("another generate() of this engine is still running: finish or close it first.")

    def close(self) -> None:
        """See `Engine.close`."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()  # the model and its cache sit in reference cycles


class _VLLMStream(Stream):
    """vLLM takes requests between its steps, so that new ones join the batch that runs."""

    def __init__(self, engine: VLLMEngine):
        self._engine = engine
        self._running: dict[str, Request] = {}  # by the name that vLLM knows
        self._submitted = 0

    @property
    def running(self) -> int:
        """See `Stream.running`."""
        return len(self._running)

    def submit(self, request: Request) -> None:
        """See `Stream.submit`."""
        engine = self._engine
        check_requests([request], engine.max_context, engine._checkpoint.config.vocab_size)
        name = str(self._submitted)
        engine._add(name, request)
        self._submitted += 1
        self._running[name] = request

    def poll(self) -> list[Completion]:
        """See `Stream.poll`: one step of the engine, a token of each request that runs."""
        if not self._running:
            return []
        engine = self._engine
        done = [output for output in engine._step() if output.finished]
        found = [_completion(self._running.pop(o.request_id), o.outputs[0], engine._checkpoint) for o in done]
        if self._running and not engine._llm.llm_engine.has_unfinished_requests():
            request = next(iter(self._running.values()))
            raise GenerationError(f"vLLM lost {len(self._running)} requests, {request.key!r} first.")
        return found

    def close(self) -> None:
        """See `Stream.close`."""
        if self._running and self._engine._llm is not None:
            self._engine._llm.llm_engine.abort_request(list(self._running))
        self._running = {}


def import_vllm() -> None:
    """Import vLLM and check its version.

    Raises:
        MissingDependencyError: not installed, broken, or outside the supported versions; says what to do.
    """
    # vLLM configures its logger only after the first messages.
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    try:
        import vllm
    except ImportError as error:
        raise MissingDependencyError(
            f"`engine: vllm` needs vLLM, which cannot be imported ({error}). Install it with `make install` in a "
            "clone, or `pip install afterglow[vllm]` on a machine with a GPU; or say `engine: transformers`, which is "
            "slower and needs nothing more."
        ) from error
    if not OLDEST <= tuple(vllm.__version_tuple__[:2]) <= NEWEST:
        supported = " to ".join(".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise MissingDependencyError(
            f"vLLM {vllm.__version__} is installed; afterglow works with {supported}. Install one of these, or say "
            "`engine: transformers`."
        )


def _llm_arguments(config: EngineConfig, checkpoint: Checkpoint, on_cpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": resolve_dtype(config.dtype, checkpoint.config, on_gpu=not on_cpu),
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs or 256,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
    }
    if on_cpu:
        arguments |= {
            "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
            "enforce_eager": True,
            "use_tqdm_on_load": False,
            # A prompt prefilled in two pieces rewinds its generator, which CPU generators cannot do.
            "enable_chunked_prefill": False,
        }
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = _cpu_cache_bytes(arguments, checkpoint)
    return arguments | config.engine_kwargs


def _cpu_cache_bytes(arguments: dict[str, Any], checkpoint: Checkpoint) -> int:
    """Return enough key-value cache for all sequences at full length, at most 1 GiB, at least one sequence."""
    config = checkpoint.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = 4 if arguments["dtype"] == "float32" else 2
    token = 2 * config.num_hidden_layers * heads * head_size * width
    context = arguments["max_model_len"] or config.max_position_embeddings
    sequence = token * (context + 256)  # whole blocks, and vLLM keeps one for itself
    return max(sequence, min(sequence * arguments["max_num_seqs"], CPU_CACHE_BYTES))


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Build an engine quietly, and undo what that does to the process around it.

    vLLM seeds the global generators, replaces `torch.set_num_threads` by a no-op and fills the environment
    (LD_PRELOAD, LOCAL_WORLD_SIZE, ...), which every later child process would inherit.
    """
    environment = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import numpy as np
    import torch

    set_num_threads = torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _completion(request: Request, output: Any, checkpoint: Checkpoint) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise GenerationError(f"request {request.key!r}: vLLM ended it with {output.finish_reason!r}.")
    tokens = list(output.token_ids)
    logprobs = None
    if request.logprobs:
        logprobs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    completion = make_completion(request, checkpoint, tokens, output.finish_reason == "stop", logprobs)
    return replace(completion, routed_experts=getattr(output, "routed_experts", None))


def retie(model: "torch.nn.Module") -> None:
    """Point a tied head at the new embedding.

    On a CPU vLLM keeps a packed copy of each matrix. A reload packs what it loads, and a tied head is not in the
    checkpoint: without this the model would go on with the old checkpoint's head, silently.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not model.config.get_text_config().tie_word_embeddings:  # pyright: ignore
        return
    modules = list(model.modules())
    heads = [m for m in modules if isinstance(m, ParallelLMHead)]
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and m not in heads]
    for head in heads:
        head.weight = embeddings[0].weight
        head.quant_method.process_weights_after_loading(head)
