"""How much memory a training takes on each device: an estimate with its formula, to plan by before anything is loaded.

The peak of a step is one of two moments: the backward pass begins (every activation is kept, no gradient stands yet, or
with accumulation all of them), or it ends (no activation is left, every gradient stands). docs/measurements.md compares
the estimate with measured peaks. Left out: buffers of ZeRO and FSDP, and what the allocator cannot reuse (10 to 20% on
a GPU). Of a mixture of experts the activations are those of the chosen experts, which is a rule of thumb.
"""

from dataclasses import dataclass
from typing import Any

from .processes import Setup

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # of TRL's fused language-model head
CPU_TILES = 7.25  # temporaries of its backward pass without Triton, each tokens x vocabulary in float32


@dataclass(frozen=True)
class Part:
    """One part of the memory on each device."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder, in values per token."""

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int  # all chosen experts together
    vocabulary: int
    tied: bool
    head_norms: bool  # of queries and keys, as in Qwen3


def shape_of(config: Any) -> Shape:
    """Read the widths from a model's configuration."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None) or 0
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=head * text.num_attention_heads,
        keys=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        intermediate=experts * text.moe_intermediate_size if experts else text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head_norms=text.model_type.startswith("qwen3"),
    )


def estimate(
    *,
    parameters: int,
    trained: int,
    dtype: str,
    optimizer: str,
    half_precision: bool,
    checkpointing: bool,
    shape: Shape,
    tokens: int,
    setup: Setup,
    cpu: bool = False,
) -> list[Part]:
    """Estimate the memory on each device, part by part; `peak` says what of it stands at the same time.

    Args:
        parameters: of the model.
        trained: those that get a gradient; fewer with LoRA.
        dtype: of the weights.
        optimizer: its name in transformers (`adamw_torch_fused`, `sgd`, ...).
        half_precision: activations in 2 bytes (`bf16` or `fp16`).
        checkpointing: activations of one layer at a time, recomputed in the backward pass.
        shape: widths of the model.
        tokens: in one batch of one device, padding included.
        setup: how weights, gradients and optimizer are split.
        cpu: whether it runs without Triton, whose kernels need no temporaries for the logits.
    """
    size, moments = BYTES[dtype], _moments(optimizer)
    whole = setup.kind == "FSDP" or setup.zero_stage == 3
    n = setup.processes
    weights_over, states_over = (n if whole else 1), (n if whole or setup.zero_stage >= 1 else 1)
    gradients_over = n if whole or setup.zero_stage >= 2 else 1
    deepspeed = setup.kind == "DEEPSPEED" and half_precision
    if deepspeed:  # it holds 2-byte weights and a 4-byte copy for the optimizer
        size, per_state, states = 2, 4 + 4 * moments, f"(4 + {moments} x 4)"
    else:
        width = 1 if "8bit" in optimizer else size
        per_state, states = width * moments, f"{moments} x {width}"
    parts = [
        _part("weights", parameters * size, weights_over, f"{parameters:,} x {size} bytes"),
        _part("optimizer", trained * per_state, states_over, f"{trained:,} x {states} bytes"),
        _part("gradients", trained * size, gradients_over, f"{trained:,} x {size} bytes"),
    ]
    if setup.kind.startswith("MULTI") and n > 1:
        parts.append(_part("DDP's buckets", trained * size, 1, f"{trained:,} x {size} bytes"))
    if size == 4 and half_precision:
        parts.append(_part("casts", parameters * 2, 1, f"{parameters:,} x 2 bytes, kept by autocast for the backward"))
    value, stream = (2 if half_precision else size), size
    layer = _layer(shape, value, stream, frozen_norms=trained < parameters)
    kept = shape.layers * shape.hidden * stream + layer if checkpointing else shape.layers * layer
    what = (
        f"({shape.layers} x {shape.hidden} x {stream} + {layer:,})" if checkpointing else f"{shape.layers} x {layer:,}"
    )
    parts.append(_part("activations", tokens * kept, 1, f"{tokens:,} tokens x {what} bytes"))
    head = shape.vocabulary * shape.hidden * 4 if trained == parameters else 0
    tile = min(tokens, TILE_TOKENS) * TILE_VOCABULARY * value
    temporaries = CPU_TILES * min(tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_VOCABULARY) * 4 if cpu else 0
    formula = f"{min(tokens, TILE_TOKENS):,} x {TILE_VOCABULARY:,} x {value} bytes"
    formula += f" + {CPU_TILES} x tokens x vocabulary x 4" if cpu else ""
    formula += f"; gradient of the head {shape.vocabulary:,} x {shape.hidden:,} x 4" if head else ""
    parts.append(_part("logits", tile + temporaries + head, 1, formula))
    return [part for part in parts if part.bytes or part.name in ("weights", "gradients", "optimizer")]


def peak(parts: list[Part], accumulates: bool) -> float:
    """Return the bytes that stand at once.

    Args:
        parts: what `estimate` returned.
        accumulates: a step has several batches, so that gradients stand while activations are made.
    """
    of = {part.name: part.bytes for part in parts}
    begins = of.pop("activations", 0) + of.pop("logits", 0)
    gradients = of.pop("gradients", 0)
    return sum(of.values()) + (begins + gradients if accumulates else max(begins, gradients))


def _layer(shape: Shape, value: int, stream: int, frozen_norms: bool) -> int:
    """Bytes that one layer keeps of one token for the backward pass.

    Of a norm: its input in float32, the normed values (only where its weight is trained) and the result, which the
    projections need. Then rotated queries and keys, values, the attention's result, and four of the feed-forward.
    """
    norm = 4 + (0 if frozen_norms else stream) + value
    heads = (shape.queries + shape.keys) * (norm - value) if shape.head_norms else 0
    attention = 2 * (shape.queries + shape.keys) * value
    return 2 * shape.hidden * norm + heads + attention + 4 * shape.intermediate * value


def _part(name: str, size: float, over: int, formula: str) -> Part:
    return Part(name, size / over, formula + (f" / {over} processes" if over > 1 else ""))


def _moments(optimizer: str) -> int:
    """How many values an optimizer keeps for each parameter."""
    if optimizer == "sgd":
        return 0
    return 1 if optimizer in ("rmsprop", "adagrad") or "lion" in optimizer else 2


def count_parameters(config: Any, peft_config: Any = None) -> tuple[int, int]:
    """Return the parameters of a model and those that are trained, without allocating any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
