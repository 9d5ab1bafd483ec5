"""What our trainers rely on inside TRL and transformers. An upgrade that changes any of it fails here, in one place."""

import inspect

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from tiny_sft import TOKENIZER, chats, settings
from transformers import Trainer
from trl import SFTConfig, SFTTrainer, pack_dataset
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
}


@pytest.mark.parametrize("method", OVERRIDDEN, ids=lambda method: method.__qualname__)
def test_signature(method):
    assert list(inspect.signature(method).parameters)[1:] == OVERRIDDEN[method].split()


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
