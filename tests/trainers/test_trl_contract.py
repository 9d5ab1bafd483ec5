"""What our trainers rely on inside TRL and transformers. An upgrade that changes any of it fails here, in one place."""

import inspect

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from tiny_sft import TOKENIZER, chats, settings
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.distributed import DistributedBackend
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import RolloutWorkerProtocol
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import global_then_local_main_first

# method that is overridden or called -> its parameters after self
OVERRIDDEN = {
    SFTTrainer._prepare_dataset: "dataset processing_class args packing formatting_func dataset_name",
    SFTTrainer._set_signature_columns_if_needed: "",
    SFTTrainer.compute_loss: "model inputs return_outputs num_items_in_batch",
    SFTTrainer.log: "logs start_time",
    Trainer._get_num_items_in_batch: "batch_samples device",
    Trainer._clip_grad_norm: "model",
    Trainer._load_best_model: "",
    Trainer.get_batch_samples: "epoch_iterator num_batches device",
    Trainer.train: "resume_from_checkpoint trial ignore_keys_for_eval",
    DataCollatorForLanguageModeling.torch_call: "examples",
    AsyncGRPOTrainer.compute_loss: "model inputs return_outputs num_items_in_batch",
    RolloutWorkerProtocol.start: "",
    RolloutWorkerProtocol.stop: "",
    RolloutWorkerProtocol.update_model_version: "model_version",
    RolloutWorkerProtocol.check_health: "stale_after_s",
}


@pytest.mark.parametrize("method", OVERRIDDEN, ids=lambda method: method.__qualname__)
def test_signature(method):
    assert list(inspect.signature(method).parameters)[1:] == OVERRIDDEN[method].split()


def test_a_streamed_sample_is_what_ours_fill_in():
    assert list(inspect.signature(RolloutSample).parameters) == [
        "prompt", "completion", "input_ids", "completion_mask", "old_log_probs", "advantage", "model_version",
        "group_id", "metrics", "enqueued_at",
    ]  # fmt: skip


def test_the_loss_comes_from_log_probs_of_one_call_of_the_model(tmp_path):
    trainer = SFTTrainer(
        tiny_model(), SFTConfig(**settings(tmp_path)), train_dataset=chats(2), processing_class=TOKENIZER
    )
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    calls = []

    def model(**inputs):
        outputs = trainer.model(**inputs)
        calls.append((inputs["fused_lm_head"], outputs.log_probs.shape, outputs.label_mask.shape))
        outputs.log_probs = outputs.log_probs * 3
        return outputs

    rows, length = batch["input_ids"].shape
    plain = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(7))
    tripled = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    assert calls == [(True, (rows, length - 1), (rows, length - 1))]
    assert tripled.item() == pytest.approx(3 * plain.item())


def test_signature_columns_are_a_list_that_can_grow(tmp_path):
    trainer = SFTTrainer(
        tiny_model(), SFTConfig(**settings(tmp_path)), train_dataset=chats(2), processing_class=TOKENIZER
    )
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths"]


def test_packing_carries_any_column_with_one_value_per_token():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6]], "row": [[0, 0, 0], [1], [2, 2]]})
    packed = pack_dataset(dataset, 4, "bfd", {"num_proc": None})
    assert packed[:] == {
        "input_ids": [[1, 2, 3, 4], [5, 6]],
        "row": [[0, 0, 0, 1], [2, 2]],
        "seq_lengths": [[3, 1], [2]],
    }
    with global_then_local_main_first():
        pass


def test_flattened_batches_number_their_segments():
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    packed = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [3, 1]}
    batch = collator([packed, {"input_ids": [5, 6], "seq_lengths": [2]}])
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 3, 4]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 7, 8]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 6, -100, -100]]


# ---------------------------------------------------------------------------------------------------------------------
# GRPOTrainer, which trainers/tool_rlvr.py extends

GRPO = {
    GRPOTrainer._generate_and_score_completions: "inputs",
    GRPOTrainer.log: "logs start_time",
    GRPOTrainer._get_per_token_logps_and_entropies: "model input_ids attention_mask logits_to_keep batch_size "
    "compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes "
    "num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
    unwrap_model_for_generation: "accelerator gather_deepspeed3_params generation_kwargs gradient_checkpointing_kwargs",
    DistributedBackend.summon_full_params: "module kwargs",
    VLLMGeneration.sync_weights: "",
    VLLMGeneration._iter_named_params: "",
}


@pytest.mark.parametrize("method", GRPO, ids=lambda method: method.__qualname__)
def test_signature_of_grpo(method):
    assert list(inspect.signature(method).parameters)[1:] == GRPO[method].split()


def test_what_rlvr_relies_on_in_a_scored_batch(tmp_path):
    """`rollout_func` gets each prompt once per rollout; its mask is the tool mask; its fields reach the rewards."""
    seen = {}

    def rollouts(prompts, trainer):
        seen["prompts"] = len(prompts)
        count = len(prompts)
        return {"prompt_ids": [[5, 6]] * count, "completion_ids": [[7, 8, 9]] * count, "logprobs": None,
                "env_mask": [[1, 0, 1]] * count, "right": [float(n % 2) for n in range(count)]}  # fmt: skip

    def reward(right, **_):
        return right

    args = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = GRPOConfig(**{key: value for key, value in (settings(tmp_path) | args).items() if key != "max_length"})
    table = Dataset.from_list([{"prompt": [{"role": "user", "content": str(n)}]} for n in range(4)])
    trainer = GRPOTrainer(
        tiny_model(), reward_funcs=reward, args=config, train_dataset=table, processing_class=TOKENIZER
    )
    trainer.rollout_func = rollouts
    trainer.model.train()
    output = trainer._generate_and_score_completions([dict(table[n // 2]) for n in range(4)])
    assert seen["prompts"] == 4
    assert output["tool_mask"].tolist() == [[1, 0, 1]] * 4 and output["num_items_in_batch"] == 8
    assert output["advantages"].shape == (4,) and "old_per_token_logps" not in output
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [1.0]  # what we replace
    assert not trainer.mask_truncated_completions and trainer.eos_token_ids
