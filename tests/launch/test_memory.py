"""The estimate of memory against what torch's allocator counted while a small model was trained."""

import gc

import pytest
import torch
import transformers
from datasets import Dataset
from families import SIZES, family_tokenizer
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from afterglow.launch.memory import estimate, peak, shape_of
from afterglow.launch.processes import Setup

WIDTHS = {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
          "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
CASES = {
    "float32": {},
    "float32, 768 tokens": {"tokens": 768},
    "float32, checkpointing, 768 tokens": {"tokens": 768, "checkpointing": True},
    "float32, two batches a step": {"accumulation": 2},
    "bfloat16": {"dtype": "bfloat16", "bf16": True},
    "bfloat16, checkpointing, 768 tokens": {"dtype": "bfloat16", "bf16": True, "tokens": 768, "checkpointing": True},
    "autocast over float32": {"bf16": True},
    "LoRA": {"lora": True},
    "Llama": {"family": "llama"},
    "Qwen2, untied": {"family": "qwen2", "tied": False},
}


def compare(folder, family="qwen3", dtype="float32", tokens=256, checkpointing=False, accumulation=1, bf16=False,
            lora=False, tied=True):  # fmt: skip
    """Return estimate and measured peak in bytes of two training steps."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = family_tokenizer(family)
    config = AutoConfig.for_model(
        family, **(SIZES | WIDTHS), tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    args = SFTConfig(
        str(folder), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
        max_length=tokens, gradient_checkpointing=checkpointing, bf16=bf16, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "b" * 8, "completion": "a" * tokens}] * 8)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)), args, train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )  # fmt: skip
    parameters = list(trainer.model.parameters())
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = sum(p.numel() * p.element_size() for p in parameters)
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    parts = estimate(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        dtype=dtype, optimizer="adamw_torch_fused", half_precision=bf16, checkpointing=checkpointing,
        shape=shape_of(config), tokens=len(trainer.train_dataset[0]["input_ids"]), setup=Setup(), cpu=True,
    )  # fmt: skip
    return peak(parts, accumulation > 1), most


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(case, tmp_path):
    estimated, measured = compare(tmp_path, **CASES[case])
    assert estimated == pytest.approx(measured, rel=0.15)
