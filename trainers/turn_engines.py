"""What generates the turns of rollouts while a model is trained: the model itself, colocated vLLM, or a vLLM server.

Each turns a list of requests into completions, in order. All processes call them in the same rounds, with a stand-in
where one has nothing to ask (`core.rollout_runner.run_lockstep`), since a sharded model gathers its weights in them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig
from trl.models.utils import unwrap_model_for_generation

from ..core.checkpoint import Checkpoint
from ..core.engine_transformers import sample_batch
from ..core.engine_vllm import CPU_CACHE_BYTES, VLLMEngine, import_vllm, process_state_kept, retie
from ..core.errors import RecipeError
from ..core.generation import Completion, Engine, EngineConfig, Request, open_engine, room
from .weight_sync import watched_client


class TransformersTurns:
    """The model in training generates by itself.

    Args:
        trainer: a `GRPOTrainer`.
        checkpoint: end tokens and tokenizer.
        max_context: tokens that the model can hold.
    """

    def __init__(self, trainer: Any, checkpoint: Checkpoint, max_context: int):
        self._trainer, self._checkpoint, self.max_context = trainer, checkpoint, max_context
        self._model: Any = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Gather what must be gathered to generate; around all turns of a batch of rollouts."""
        trainer = self._trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as self._model,
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            # generate() would fill what a request leaves open from the model's own file (top-k, a repetition penalty).
            own, self._model.generation_config = self._model.generation_config, GenerationConfig()
            try:
                yield
            finally:
                self._model.generation_config, self._model = own, None

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one batch."""
        limits = [room(request, self.max_context) for request in requests]
        with self._trainer.accelerator.autocast():
            return sample_batch(self._model, requests, limits, self._checkpoint)


class ColocatedTurns:
    """vLLM in the trainer's process, which TRL built and gives the new weights.

    Args:
        trainer: a `GRPOTrainer` with `use_vllm`.
        checkpoint: end tokens and tokenizer.
    """

    def __init__(self, trainer: Any, checkpoint: Checkpoint):
        self._trainer, self._generation = trainer, trainer.vllm_generation
        self._engine = VLLMEngine.around(self._generation.llm, checkpoint)
        self.max_context = self._engine.max_context
        if not torch.accelerator.is_available():
            self._generation.sync_weights = self._sync_on_cpu

    def _sync_on_cpu(self) -> None:
        """Hand over the weights: vLLM packs each matrix on a CPU, which TRL's own way of loading does not survive."""
        llm = self._generation.llm
        # A generator, not a list: merged adapters and gathered shards live only as long as it runs.
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._generation._iter_named_params()})
        llm.apply_model(retie)
        llm.reset_prefix_cache()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Wake the engine, with the newest weights, for all turns of a batch of rollouts."""
        trainer, generation = self._trainer, self._generation
        asleep = generation.enable_sleep_mode and generation._llm_weights_sleeping
        if asleep or trainer.state.global_step != trainer._last_loaded_step:
            generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["kv_cache"])
        yield
        if generation.enable_sleep_mode:
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one batch; the processes of one tensor-parallel engine ask for those of all of them."""
        mine, generation = len(requests), self._generation
        first = 0
        if generation.tensor_parallel_size > 1:
            gathered: list[Any] = [None] * generation.tensor_parallel_size
            torch.distributed.all_gather_object(gathered, list(requests), group=generation.tp_group)
            first = sum(len(part) for part in gathered[: torch.distributed.get_rank(group=generation.tp_group)])
            requests = [request for part in gathered for request in part]
        return _in_order(self._engine, requests)[first : first + mine]


class ServerTurns:
    """A vLLM server to which TRL sends the new weights; each process asks it by itself.

    Args:
        trainer: a `GRPOTrainer` with `vllm_mode: server`.
        model: the served model's name.
    """

    def __init__(self, trainer: Any, model: str):
        self._trainer = trainer
        args = trainer.args
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        self._engine = open_engine(EngineConfig(model=model, engine="server", server_url=url))
        self.max_context = self._engine.max_context

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Send the newest weights, if the server does not have them."""
        trainer = self._trainer
        if trainer.state.global_step != trainer._last_loaded_step:
            trainer.vllm_generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        trainer.accelerator.wait_for_everyone()  # the first process sends them
        yield

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one batch."""
        return _in_order(self._engine, requests)


def _in_order(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Generate, with the keys that a process gave replaced: those of another process may be the same."""
    keyed = [replace(request, key=str(number)) for number, request in enumerate(requests)]
    done = {completion.key: completion for completion in engine.generate(keyed)}
    return [done[request.key] for request in keyed]


def open_turns(trainer: Any, checkpoint: Checkpoint) -> TransformersTurns | ColocatedTurns | ServerTurns:
    """Return the engine that the trainer's arguments name."""
    if trainer.use_vllm:
        colocated = trainer.vllm_mode == "colocate"
        return ColocatedTurns(trainer, checkpoint) if colocated else ServerTurns(trainer, checkpoint.model)
    return TransformersTurns(trainer, checkpoint, int(checkpoint.config.max_position_embeddings))


@contextmanager
def vllm_settings(args: Any) -> Iterator[None]:
    """Let TRL build colocated vLLM with what its own keys do not say: the head's type, and what a CPU needs.

    For a server, let it use a client whose waits end.

    Raises:
        MissingDependencyError: vLLM is asked for and is not there.
        RecipeError: a server is asked for and there is no GPU to send it weights from.
    """
    if not args.use_vllm:
        yield
        return
    if args.vllm_mode == "server" and not torch.cuda.is_available():
        raise RecipeError(
            "`vllm_mode: server`: weights travel to the server by NCCL, which needs a GPU. Use `vllm_mode: colocate`, "
            "which works without one."
        )
    import_vllm()
    from trl.generation import vllm_generation

    extra: dict[str, Any] = {"hf_overrides": {"head_dtype": "float32"}} if args.cast_lm_head_to_fp32 else {}
    if args.routing_replay:
        extra["enable_return_routed_experts"] = True
    if not torch.accelerator.is_available():
        # A prompt prefilled in two pieces rewinds its generator, which CPU generators cannot do.
        extra |= {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
        extra["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    built: Any = vllm_generation.LLM  # pyright: ignore[reportPrivateImportUsage]

    def build(**kwargs: Any) -> Any:
        with process_state_kept():
            return built(**(kwargs | extra))

    client = vllm_generation.VLLMClient  # pyright: ignore[reportPrivateImportUsage]
    vllm_generation.LLM, vllm_generation.VLLMClient = build, watched_client(client)  # pyright: ignore
    try:
        yield
    finally:
        vllm_generation.LLM, vllm_generation.VLLMClient = built, client  # pyright: ignore
