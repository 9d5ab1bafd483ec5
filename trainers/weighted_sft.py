"""SFT with one weight per sample, exact under accumulation, packing and any number of processes.

TRL computes the log-probabilities of the labels without the full logits. We multiply them by a factor per token before
TRL sums them, so the loss, its scaling over processes, the metrics and the auxiliary loss stay TRL's own: with all
factors 1 the training equals `SFTTrainer` bit for bit. CONTRIBUTING lists the private methods that are overridden.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer
from trl.trainer.utils import global_then_local_main_first, pad

from ..core.errors import DataError, RecipeError
from .global_batch import check_spread, count_real_rows
from .losses import sample_nll, token_factors
from .token_weights import TOKEN_WEIGHTS, check_weight, has_token_weights, weigh_tokens

SAMPLE_WEIGHT = "sample_weight"  # column: the sample's weight, where the data have one
SAMPLE_ROW = "sample_row"  # column: the row of the training set that a sequence, or a packed segment, came from


@dataclass
class WeightedSFTConfig(SFTConfig):
    """TRL's `SFTConfig` and the denominator of a weighted loss."""

    loss_reduction: str = field(
        default="sample",
        metadata={
            "help": "What the loss is a mean over, in the whole global batch: `sample` (each sample's mean token loss: "
            "short and long chains weigh the same) or `token` (as in TRL's SFTTrainer).",
            "choices": ["sample", "token"],
        },
    )

    def __post_init__(self):
        """Refuse what would make the weights or the denominators wrong."""
        check_choice(self, "loss_reduction")
        if self.loss_type == "dft":
            raise RecipeError("`loss_type: dft` weighs tokens by their own probability; sample weights need `nll`.")
        if self.label_smoothing_factor:
            raise RecipeError("`label_smoothing_factor` needs the full logits, which sample weights never see; use 0.")
        if self.packing and self.max_length is None:
            raise RecipeError("`packing` fills rows up to `max_length`; set it.")
        if self.packing and self.packing_strategy != "bfd":
            raise RecipeError(
                f"`packing_strategy: {self.packing_strategy}` cuts samples in pieces, so a sample has no loss of its "
                "own; use `bfd`."
            )
        if not self.average_tokens_across_devices:
            raise RecipeError(
                "`average_tokens_across_devices: false` leaves each process its own denominator; use true."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise RecipeError("`train_sampling_strategy: batch_rebalance` hides which rows are repeats; use `random`.")
        super().__post_init__()


def check_choice(config: Any, name: str) -> None:
    """Check a field against the `choices` of its metadata.

    Raises:
        RecipeError: the value is none of them.
    """
    choices = next(f for f in dataclasses.fields(config) if f.name == name).metadata["choices"]
    if getattr(config, name) not in choices:
        raise RecipeError(f"`{name}`: {getattr(config, name)!r} is none of {', '.join(choices)}.")


@dataclass
class SampleCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also says what sample each segment of the batch is.

    Adds `sample_rows` (segments,), the row of the training set, and `batch_rows` (segments,), the example of this
    batch. A padded row is one segment; a flattened batch has one for each sequence in it, in order. Weights of tokens
    get the shape of the labels.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate token lists into padded (batch, seq) or flattened (1, tokens) tensors."""
        batch = super().torch_call(examples)
        if SAMPLE_ROW not in examples[0]:
            return batch
        rows = [example[SAMPLE_ROW] for example in examples]
        rows = [row if isinstance(row, list) else [row] for row in rows]  # a packed example has several
        pairs = [(row, example) for example, in_example in enumerate(rows) for row in in_example]
        if self.padding_free:
            # Padding to a multiple appends segments of one token. They have no label, so they are no samples.
            pairs += [(0, 0)] * (len(batch["cu_seq_lens_q"]) - 1 - len(pairs))
        batch["sample_rows"], batch["batch_rows"] = torch.tensor(pairs).unbind(1)
        if TOKEN_WEIGHTS in examples[0]:
            weights = [torch.tensor(example[TOKEN_WEIGHTS], dtype=torch.float32) for example in examples]
            weights = [torch.cat(weights)] if self.padding_free else weights
            batch[TOKEN_WEIGHTS] = pad(weights, 0, "right", pad_to_multiple_of=self.pad_to_multiple_of)
        return batch


def token_segments(batch: dict[str, Any], like: Tensor) -> Tensor:
    """Return the segment of each position of `like`, which is (batch, seq) or without the first position."""
    if "seq_idx" in batch:
        return batch["seq_idx"][:, -like.size(1) :].long()
    return torch.arange(like.size(0), device=like.device)[:, None].expand_as(like)


def given_weights(dataset: Dataset) -> Tensor | None:
    """Return the weights (rows,) that the data give their samples, or None.

    Raises:
        DataError: one is no number from 0 on.
    """
    if SAMPLE_WEIGHT not in dataset.column_names:
        return None
    weights = list(dataset[SAMPLE_WEIGHT])
    for row, weight in enumerate(weights):
        check_weight(weight, f"row {row}", SAMPLE_WEIGHT)
    return torch.tensor(weights, dtype=torch.float32)


def _row_per_token(example: dict) -> dict:
    return {SAMPLE_ROW: [example[SAMPLE_ROW]] * len(example["input_ids"])}


def _row_per_segment(example: dict) -> dict:
    starts = accumulate(example["seq_lengths"][:-1], initial=0)
    return {SAMPLE_ROW: [example[SAMPLE_ROW][start] for start in starts]}


class WeightedSFTTrainer(SFTTrainer):
    """`SFTTrainer` whose subclasses give each sample a weight, once its loss is known: `sample_weights`.

    Args:
        model: model, or the folder of one.
        args: the configuration.
        train_dataset: a table as TRL reads it: `prompt` and `completion` as lists of chat messages (`tools` where the
            messages call some). TRL applies the chat template, tokenises and masks the prompt. Weights may stand in
            a column `sample_weight`, as `weight` on an assistant's message, or, beside `input_ids` and `labels`, as
            `token_weights`. `losses.token_factors` has the formula and the denominators.
        kwargs: what `SFTTrainer` takes.

    Raises:
        DataError: the training set is a stream, or a weight is wrong.
        RecipeError: a setup in which a sample has no loss of its own, or the loss would not be ours.
        ModelError: the model's loss cannot be scaled by the global batch.
    """

    args: WeightedSFTConfig
    model: torch.nn.Module
    train_dataset: Dataset

    def __init__(self, model: Any, args: WeightedSFTConfig, train_dataset: Dataset, **kwargs: Any):
        if not isinstance(train_dataset, Dataset):
            raise DataError(
                "train_dataset: a stream cannot be followed by row: which rows fill up an epoch's last batch, and "
                "which were seen before, is known of a table only. Load it as a table; it is memory-mapped, so its "
                "size does not matter."
            )
        if kwargs.get("compute_loss_func") or kwargs.get("data_collator"):
            raise RecipeError("`compute_loss_func` and `data_collator` would bypass the weights; leave them out.")
        self._given_weights = given_weights(train_dataset)
        rows = np.arange(len(train_dataset))
        train_dataset = train_dataset.add_column(SAMPLE_ROW, rows)  # pyright: ignore[reportArgumentType, reportCallIssue]
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise DataError("train_dataset: images cannot be trained on with sample weights yet; use text only.")
        check_spread(self)
        # TRL refuses a foreign collator for packed batches, but not one put in its place.
        collator = {f.name: getattr(self.data_collator, f.name) for f in dataclasses.fields(self.data_collator)}
        self.data_collator = SampleCollator(**collator)
        if self._given_weights is not None:
            self._given_weights = self._given_weights.to(self.accelerator.device)

    def sample_weights(self, rows: Tensor, losses: Tensor, tokens: Tensor) -> Tensor:
        """Return the weight of each sample of a training batch, (samples,): here that of the data.

        Args:
            rows: (samples,) rows of the training set.
            losses: (samples,) mean token NLL of this forward pass, float32, without a gradient.
            tokens: (samples,) trained tokens; 0 is no sample, whatever its row.
        """
        return torch.ones_like(losses) if self._given_weights is None else self._given_weights[rows]

    # -----------------------------------------------------------------------------------------------------------------
    # the sample's row travels with its tokens

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        ours = [name for name in (SAMPLE_ROW, TOKEN_WEIGHTS) if name not in columns]
        self._signature_columns = [*columns, *ours]

    def _prepare_dataset(self, dataset: Any, processing_class, args: Any, packing, formatting_func, dataset_name):
        weighted = SAMPLE_ROW in dataset.column_names and has_token_weights(dataset)
        if SAMPLE_ROW not in dataset.column_names or not (packing or weighted):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # TRL packs two columns only. `pack_dataset` takes any column with one value per token, so the row is spread
        # over the sample's tokens and gathered again. Packing truncates by itself, hence no length here.
        unpacked_args = copy.copy(args)
        unpacked_args.max_length = None if packing else args.max_length
        dataset = super()._prepare_dataset(
            dataset, processing_class, unpacked_args, False, formatting_func, dataset_name
        )
        workers = args.dataset_num_proc
        columns = ["input_ids", "labels", SAMPLE_ROW, *([TOKEN_WEIGHTS] if weighted else [])]
        with global_then_local_main_first():
            if weighted:
                how = {
                    "with_prompt": not self.completion_only_loss,
                    "apart": args.assistant_only_loss,
                    "keep_end": args.truncation_mode == "keep_end" and not packing,
                }
                dataset = dataset.map(weigh_tokens, fn_kwargs=how, num_proc=workers)
            if not packing:
                return dataset
            dataset = dataset.select_columns(columns).map(_row_per_token, num_proc=workers)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, {"num_proc": workers})
            dataset = dataset.map(_row_per_segment, num_proc=workers)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    # -----------------------------------------------------------------------------------------------------------------
    # the denominator: the whole global batch, every sample once

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the batches of one optimiser step, without the rows that only fill up the last one."""
        return super().get_batch_samples(self._without_repeats(epoch_iterator), num_batches, device)

    def _without_repeats(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Mask the labels of repeated rows."""
        for batch in batches:
            real = count_real_rows(self)
            if real < self._train_batch_size and "batch_rows" in batch:
                repeated, labels = batch["batch_rows"] >= real, batch["labels"]
                batch["labels"] = labels.masked_fill(repeated[token_segments(batch, labels)], -100)
            yield batch

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.args.loss_reduction == "token":
            return super()._get_num_items_in_batch(batch_samples, device)
        samples = torch.zeros((), dtype=torch.long, device=device)
        for batch in batch_samples:
            trained = batch["labels"][:, 1:] != -100
            seen = torch.zeros_like(batch["sample_rows"])
            seen = seen.index_add(0, token_segments(batch, trained).reshape(-1), trained.reshape(-1).long())
            samples += (seen > 0).sum()
        return self.accelerator.gather(samples).sum()  # pyright: ignore[reportAttributeAccessIssue]

    # -----------------------------------------------------------------------------------------------------------------
    # the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss with each token's log-probability multiplied by its factor; evaluation is TRL's own."""
        rows = inputs.pop("sample_rows", None)
        inputs.pop("batch_rows", None)
        given = inputs.pop(TOKEN_WEIGHTS, None)
        if rows is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def weighted_model(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            segments = token_segments(inputs, outputs.log_probs)
            losses, tokens = sample_nll(outputs.log_probs, outputs.label_mask, segments, len(rows))
            weights = self.sample_weights(rows, losses, tokens)
            token_weights = None if given is None else given[:, 1:] * outputs.label_mask
            factors = token_factors(weights, tokens, segments, self.args.loss_reduction, token_weights)
            outputs.log_probs = outputs.log_probs * factors.to(outputs.log_probs)
            return outputs

        # TRL does nothing else with its model than call it, once.
        return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)  # pyright: ignore[reportArgumentType]
