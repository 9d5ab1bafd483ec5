"""The demo's tokenizer and untrained model: Qwen3's chat template, special tokens and architecture, made small."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As in Qwen3's own tokenizer these are single tokens but not "special": decoding keeps them.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Digits stand alone, so that a sum is a sum of digits; a word takes the space before it.
SPLIT = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"


def qwen3_template() -> str:
    """Return Qwen3's chat template, from the installed trl (found without the seconds that importing trl takes)."""
    spec = find_spec("trl")
    if spec is None or not spec.origin:
        raise MissingDependencyError("trl is not installed; it carries Qwen3's chat template. Run `make install`.")
    return (Path(spec.origin).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, template: str | None = None, phrases: tuple[str, ...] = ()
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer: any text can be encoded, and the words of `texts` become short.

    Args:
        texts: to learn words from.
        vocab_size: the most tokens.
        template: the chat template; default: Qwen3's.
        phrases: further texts that become one token each.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    whole = (*TAGS, *phrases)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL_TOKENS),
        show_progress=False,
    )
    pattern = "|".join(map(re.escape, whole))
    tokenizer.train_from_iterator((re.sub(pattern, "", text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in whole])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = template or qwen3_template()
    return fast


def init_model(tokenizer: "PreTrainedTokenizerFast", seed: int, hidden_size: int, layers: int) -> "Qwen3ForCausalLM":
    """Return a Qwen3 model with weights drawn from the seed: fp32, tied head, heads of 32 (for vLLM on a CPU)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.06,  # the usual 0.02 suits models ten times as wide; this one would start slowly
        tie_word_embeddings=True,
        dtype="float32",
        eos_token_id=tokenizer.get_vocab()["<|im_end|>"],
        pad_token_id=tokenizer.get_vocab()["<|endoftext|>"],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()
