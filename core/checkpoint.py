"""What an engine reads from a model folder besides the weights: configuration, tokenizer, stop tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What two checkpoints must share for the weights of one to replace those of the other.
SHAPE_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What an engine reads from a model folder besides the weights."""

    model: str
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: frozenset[int]

    def check_replaceable_by(self, other: "Checkpoint") -> None:
        """Raise ModelError unless the other checkpoint's weights fit where this one's are."""
        for key in SHAPE_KEYS:
            old, new = getattr(self.config, key, None), getattr(other.config, key, None)
            if old != new:
                raise ModelError(
                    f"{other.model}: its weights cannot replace those of {self.model}: `{key}` is {new}, not {old}. "
                    "Open an engine of its own."
                )


def read_checkpoint(model: str) -> Checkpoint:
    """Read configuration, tokenizer and stop tokens of a model folder or hub id.

    Raises:
        ModelError: one of them is missing or broken.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise ModelError(f"{model}: this is a LoRA adapter. Merge it into its base model first.")
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model}: not a model folder or hub id that can be read: {error}") from error
    if not tokenizer.encode("1+1=2", add_special_tokens=False):  # made up by transformers from nothing
        raise ModelError(f"{model}: the folder has no tokenizer. Save the tokenizer with the weights.")
    text_config = config.get_text_config()
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        eos = text_config.eos_token_id
    ids = eos if isinstance(eos, list | tuple) else [eos]
    stop_ids = frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
    return Checkpoint(model, text_config, tokenizer, stop_ids)


def resolve_dtype(requested: str, config: "PreTrainedConfig", on_gpu: bool) -> str:
    """Return `float32`, `bfloat16` or `float16`: what `dtype: auto` means for this checkpoint on this device."""
    if requested != "auto":
        return requested
    default = "bfloat16" if on_gpu else "float32"
    stored = str(getattr(config, "dtype", None) or default).removeprefix("torch.")
    return {"float32": default, "float16": "float16" if on_gpu else "float32"}.get(stored, stored)
