"""Tiny models of the families that the recipes name, each with its own special tokens and chat template."""

from pathlib import Path

import torch
import trl
from tiny import SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LLAMA_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
]  # fmt: skip
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Family -> its model type with what differs from `SIZES`; its tokens (first: end of a turn, last: padding); template.
FAMILIES = {
    "qwen2": ({}, ["<|im_end|>", *SPECIAL_TOKENS], "qwen2_5.jinja"),
    "qwen3": ({}, ["<|im_end|>", *SPECIAL_TOKENS], "qwen3.jinja"),
    "qwen3_moe": (EXPERTS, ["<|im_end|>", *SPECIAL_TOKENS], "qwen3.jinja"),
    "llama": ({}, ["<|eot_id|>", *LLAMA_TOKENS], "llama3_1.jinja"),
    # Eight layers: the WMDP recipes steer layer 7.
    "mistral": ({"num_hidden_layers": 8}, ["</s>", "<s>", "<unk>"], ZEPHYR),
}


def family_of(name: str, text: str) -> str:
    """Tell the family that a recipe is about: by its own name, else by the models in its values."""
    values = "".join(line for line in text.splitlines() if not line.startswith("#"))
    known = {"30b-a3b": "qwen3_moe", "qwen2.5": "qwen2", "qwen3": "qwen3", "llama": "llama", "muse": "llama",
             "zephyr": "mistral"}  # fmt: skip
    found = (family for words in (name, values) for word, family in known.items() if word in words.lower())
    return next(found, "qwen3")


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the family's special tokens and template."""
    _, special, template = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin = {"llama": "<|begin_of_text|>", "mistral": "<s>"}.get(family)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=special[0],
        pad_token={"llama": "<|end_of_text|>", "mistral": "<unk>"}.get(family, "<|endoftext|>"),
        additional_special_tokens=list(dict.fromkeys(special)),
    )
    packaged = Path(trl.__file__).parent / "chat_templates" / template
    fast.chat_template = packaged.read_text() if template.endswith(".jinja") else template
    return fast


def save_family(folder: Path, family: str) -> Path:
    """Write a random model of a family, about 0.1M parameters, with its tokenizer, and return the folder."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = family_tokenizer(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family][0]), bos_token_id=tokenizer.bos_token_id, **ids)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
