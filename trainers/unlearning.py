"""Unlearning: make a model forget some trajectories and keep the rest, with the losses of `unlearning_losses`.

    L = 1 / P * sum over the pairs of the global batch of (forget_weight * forget_i + retain_weight * retain_i)

A pair is one forget row and the retain row it is drawn with; P counts the pairs of all processes and accumulation
steps, each once. Both rows go through the model in one batch. What the start model says (one number a forget row for
npo; hidden states for kl) is computed once, before the first step, and travels with the checkpoints: there is no second
model in memory.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from ..core.errors import DataError, RecipeError
from . import unlearning_losses as losses
from .checkpoints import MarkComplete, checkpoint_folder, checkpoint_to_resume
from .global_batch import check_spread, count_real_rows
from .paired_rows import FORGET_ROWS, PairCollator, PairedRows, parts
from .start_model import StartModel, load_alternatives
from .unlearning_config import NEED_LOGITS, UnlearnConfig

SUMS = {"forget": slice(1, 3), "retain": slice(3, 5)}  # places in `_sums`
STOPPED = "stopped"  # in the log: 1 where a budget ended the training


@dataclass
class Answers:
    """What the model says of some rows, at the positions (columns) where it predicts an answer token of any of them.

    Attributes:
        labels: (rows, columns), -100 where it is no answer token of that row.
        log_probs: (rows, columns), of the labels; 0 where there is none.
        columns: (columns,) their places in the shifted sequence; None where these are all of it.
        logits: (rows, columns, vocabulary), where the loss needs them.
        hidden: (rows, columns, width) of the answer tokens themselves, after `rmu_layer`, where the loss needs them.
    """

    labels: Tensor
    log_probs: Tensor
    columns: Tensor | None = None
    logits: Any = None
    hidden: Any = None

    @property
    def mask(self) -> Tensor:
        """True on answer tokens."""
        return self.labels != -100

    def rows(self, which: slice) -> "Answers":
        """Take some of the rows."""
        logits, hidden = (None if tensor is None else tensor[which] for tensor in (self.logits, self.hidden))
        return Answers(self.labels[which], self.log_probs[which], self.columns, logits, hidden)

    def log_prob(self, length_norm: str) -> Tensor:
        """Log-probability of each answer, (rows,)."""
        return losses.reduce_tokens(self.log_probs, self.mask, length_norm)

    def reduce(self, answer_tokens: Tensor, length_norm: str, skip: int = 0) -> Tensor:
        """Reduce values of the answer tokens (in order) to one for each row, without the first `skip` of each."""
        values = answer_tokens.new_zeros(self.labels.shape).masked_scatter(self.mask, answer_tokens)
        return losses.reduce_tokens(values, self.mask & (self.mask.cumsum(1) > skip), length_norm)


class _FollowEpochs(TrainerCallback):
    """Pairs anew at each epoch, sees to the start model's log-probabilities, and stops at the budgets."""

    def __init__(self, trainer: "UnlearnTrainer"):
        self.trainer = trainer
        self.epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch)  # not 0 after a resume
        self.trainer.start.compute(state.num_train_epochs)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.pairs.begin_epoch(self.epoch)
        self.epoch += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.spent():
            control.should_training_stop = control.should_log = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            self.trainer.start.save(checkpoint_folder(args, state))


class UnlearnTrainer(SFTTrainer):
    """Forget one set of trajectories and keep another, exactly the same however the batch is spread.

    Each log has `forget_nll` and `retain_nll` (nats per answer token, averaged over rows) beside the two losses. A
    resume, in the middle of an epoch too, continues exactly. MoE auxiliary losses are left out.

    Args:
        model: model, or the folder of one.
        args: the configuration.
        train_dataset: what to forget: `prompt` and `completion` as lists of chat messages; for dpo also `alternative`,
            the preferred answer, unless `args.alternatives` names a file.
        retain_dataset: what to keep, in the same form.
        kwargs: what `SFTTrainer` takes.

    Raises:
        DataError: a set is missing, a stream, or lacks the alternative answers.
        RecipeError: a setup in which the loss would not be what it says.
    """

    _tag_names = ["trl", "unlearning"]  # noqa: RUF012  TRL's class attributes
    _name = "Unlearning"

    args: UnlearnConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: torch.nn.Module

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig,
        train_dataset: Dataset,
        retain_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        if not isinstance(retain_dataset, Dataset) or not len(retain_dataset):
            raise DataError(
                "`retain_data` is missing: without it nobody sees what unlearning costs. Name a set to keep."
            )
        if not isinstance(train_dataset, Dataset):
            raise DataError("train_dataset: pairs need a table with a length; a stream has none.")
        if kwargs.get("compute_loss_func") or kwargs.get("data_collator"):
            raise RecipeError("`compute_loss_func` and `data_collator` would bypass the losses; leave them out.")
        of_alternatives = args.forget_loss == "dpo"
        alternatives = load_alternatives(train_dataset, args.alternatives, args.seed) if of_alternatives else None
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise DataError("train_dataset: images cannot be unlearned yet; use text only.")
        check_spread(self)
        self._needs_logits = args.forget_loss in NEED_LOGITS or args.retain_loss == "kl"
        if args.forget_loss == "rmu":
            self._control = self._control_vector()
        tables: dict[str, Any] = {"forget": self.train_dataset}
        for name, table in (("alternative", alternatives), ("retain", retain_dataset)):
            if table is not None:
                tables[name] = self._prepare_dataset(table, self._tokenizer, args, False, None, name)
        if empty := [name for name, table in tables.items() if not len(table)]:
            raise DataError(f"`max_length: {args.max_length}` cuts off every answer of the {empty[0]} rows; raise it.")
        collator = {f.name: getattr(self.data_collator, f.name) for f in dataclasses.fields(self.data_collator)}
        self.data_collator = PairCollator(**collator)
        self.start = StartModel(self, tables)
        self.train_dataset = self.pairs = PairedRows(tables, args.seed)
        # Of the pairs since the last log, and of those of the running step: pairs, forget loss and NLL, retain loss and
        # NLL, tokens.
        self._sums = torch.zeros(6, dtype=torch.float64, device=self.accelerator.device)
        self._step_sums = torch.zeros_like(self._sums)
        self._tokens = 0.0
        self._stopped = False
        self.add_callback(_FollowEpochs(self))
        self.add_callback(MarkComplete())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any):
        """Train, from the start or from a checkpoint; True is the last whole one in `output_dir`.

        Raises:
            RunFolderError: there is no such checkpoint, or it was started from another model or on other data.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        self.restore(checkpoint)
        return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def restore(self, checkpoint: Path | None) -> None:
        """Take up what a checkpoint holds of ours, or start anew."""
        self.start.forget()
        if checkpoint is not None:
            self.start.load(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if any(STOPPED in entry for entry in state.log_history):
                self.args.max_steps = state.global_step  # a budget ended it: nothing is left to do

    def _control_vector(self) -> Tensor:
        args, model = self.args, self.model
        text: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if args.rmu_layer >= text.num_hidden_layers:
            raise RecipeError(f"`rmu_layer: {args.rmu_layer}`: the model has {text.num_hidden_layers} layers, from 0.")
        return losses.control_vector(text.hidden_size, args.rmu_coefficient, args.seed)

    # -----------------------------------------------------------------------------------------------------------------
    # the denominator: the pairs of the whole global batch, each once

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [
            *(self._signature_columns or []),
            "row",
            "retain_row",
            "forget",
            "alternative",
            "retain",
        ]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the batches of one optimiser step, and mark the pairs that only fill up the last one."""
        return super().get_batch_samples(self._mark_repeats(epoch_iterator), num_batches, device)

    def _mark_repeats(self, batches: Iterator[dict]) -> Iterator[dict]:
        for batch in batches:
            rows = batch[FORGET_ROWS]
            batch["real"] = torch.arange(len(rows), device=rows.device) < count_real_rows(self)
            yield batch

    def _get_num_items_in_batch(self, batch_samples, device):
        pairs = torch.stack([batch["real"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(pairs).sum()  # pyright: ignore[reportAttributeAccessIssue]

    # -----------------------------------------------------------------------------------------------------------------
    # the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of pairs, its share of the global mean; evaluation is TRL's own."""
        if FORGET_ROWS not in inputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pairs, forget_rows, retain_rows = parts(inputs)
        if self.args.retain_loss == "none":
            forgotten = self.score(model, inputs, forget_rows)
            with torch.no_grad():  # measured, since what forgetting costs is logged in any case
                kept = self.score(model, inputs, retain_rows)
        else:
            answers = self.score(model, inputs)
            forgotten, kept = answers.rows(forget_rows), answers.rows(retain_rows)
        forget, retain = self.forget_losses(model, inputs, forgotten), self.retain_losses(model, inputs, kept)
        self.note(inputs, forget=(forget, forgotten.rows(slice(pairs))), retain=(retain, kept))
        return self.share(
            self.args.forget_weight * forget + self.args.retain_weight * retain, inputs, num_items_in_batch
        )

    def score(
        self, model: Any, inputs: dict[str, Any], rows: slice = slice(None), columns: Tensor | None = None
    ) -> Answers:
        """Run rows of a batch through the model, in one forward pass.

        Args:
            model: the (wrapped) model.
            inputs: the batch.
            rows: which of its rows.
            columns: positions to look at, instead of those with an answer token.
        """
        part = {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "labels")}
        labels = part["labels"][:, 1:]
        if not self._needs_logits:
            return Answers(labels, model(**part, use_cache=False, fused_lm_head=True).log_probs)
        if columns is None:
            columns = (labels != -100).any(0).nonzero()[:, 0]
        labels = labels[:, columns]
        outputs = model(
            input_ids=part["input_ids"],
            attention_mask=part["attention_mask"],
            use_cache=False,
            logits_to_keep=columns,
            output_hidden_states=self.args.forget_loss == "rmu",
        )
        logits = outputs.logits.float()
        log_probs = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(2)
        hidden = None
        if self.args.forget_loss == "rmu":
            hidden = outputs.hidden_states[self.args.rmu_layer + 1][:, 1:][:, columns].float()
        return Answers(labels, log_probs.masked_fill(labels == -100, 0), columns, logits, hidden)

    def forget_losses(self, model: Any, inputs: dict[str, Any], answers: Answers) -> Tensor:
        """Return the forget loss of each pair, (pairs,); `answers` are of its forget rows, then its alternatives."""
        args, norm = self.args, str(self.args.length_norm)
        beta = args.beta or 0.0
        pairs = len(inputs[FORGET_ROWS])
        match args.forget_loss:
            case "npo":
                (reference,) = self.start.log_probs(inputs[FORGET_ROWS])
                return losses.npo_loss(answers.log_prob(norm), reference, beta)
            case "dpo":
                ours, reference = answers.log_prob(norm), self.start.log_probs(inputs[FORGET_ROWS])
                return losses.dpo_loss(ours[:pairs], reference[0], ours[pairs:], reference[1], beta)
            case "simnpo":
                return losses.simnpo_loss(answers.log_prob(norm), beta, args.margin)
            case "wga":
                tokens = losses.wga_tokens(answers.log_probs, beta)
                return losses.reduce_tokens(tokens, answers.mask, norm)
            case "satimp":
                tokens = losses.satimp_tokens(answers.log_probs, beta, args.beta2)
                return losses.reduce_tokens(tokens, answers.mask, norm)
            case "undial":
                at, reference = answers.mask, self.start.answer_tokens(model, inputs, "forget", answers)
                tokens = losses.undial_tokens(answers.logits[at], reference, answers.labels[at], beta)
                return answers.reduce(tokens, norm)
            case "ceu":
                tokens = losses.ceu_tokens(answers.logits[answers.mask], answers.labels[answers.mask])
                return answers.reduce(tokens, norm, args.ceu_skip_tokens)
            case "rmu":
                return losses.rmu_loss(answers.hidden, self._control.to(answers.hidden), answers.mask)
        return answers.log_prob(norm)  # ga

    def retain_losses(self, model: Any, inputs: dict[str, Any], answers: Answers) -> Tensor:
        """Return the retain loss of each pair, (pairs,), a mean over the tokens of the retain row's answer."""
        if self.args.retain_loss == "none":
            return torch.zeros_like(answers.log_probs[:, 0])
        if self.args.retain_loss == "nll":
            return -answers.log_prob("mean")
        at, reference = answers.mask, self.start.answer_tokens(model, inputs, "retain", answers)
        if self.args.retain_loss == "hidden":
            target = torch.zeros_like(answers.hidden).masked_scatter(at[..., None], reference)
            return losses.rmu_loss(answers.hidden, target, at)
        return answers.reduce(losses.kl_tokens(answers.logits[at], reference), "mean")

    def share(self, values: Tensor, inputs: dict[str, Any], pairs: Any) -> Tensor:
        """Return this batch's part of the mean over all pairs, times the processes that DDP divides by: scalar."""
        return torch.where(inputs["real"], values, 0).sum() / pairs * self.accelerator.num_processes

    # -----------------------------------------------------------------------------------------------------------------
    # what is logged, and when to stop

    def note(self, inputs: dict[str, Any], **terms: tuple[Tensor, Answers]) -> None:
        """Add a batch to the sums: (loss of each pair, answers of its rows) of `forget`, `retain` or both."""
        real = inputs["real"]
        for name, (values, answers) in terms.items():
            nll = -answers.log_prob("mean")
            sums = torch.stack([torch.where(real, value.detach().double(), 0).sum() for value in (values, nll)])
            self._step_sums[SUMS[name]] += sums
        if "forget" in terms:
            self._step_sums[0] += real.sum()
            self._step_sums[5] += inputs["attention_mask"].sum()

    def spent(self) -> bool:
        """At the end of an optimiser step: is a budget spent? Both are compared with the step's global batch."""
        sums, args = self._step_sums, self.args
        self._sums += sums
        self._step_sums = torch.zeros_like(sums)
        if args.forget_nll_target is None and args.retain_nll_budget is None:
            return False
        pairs, _, forget_nll, _, retain_nll, _ = self.accelerator.reduce(sums).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        forgotten = args.forget_nll_target is not None and forget_nll / pairs >= args.forget_nll_target
        broken = args.retain_nll_budget is not None and retain_nll / pairs > args.retain_nll_budget
        self._stopped = forgotten or broken
        return self._stopped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two losses, and what was forgotten and kept, since the last log."""
        if self.model.training and "train_runtime" not in logs:
            pairs, forget, forget_nll, retain, retain_nll, tokens = self.accelerator.reduce(self._sums).tolist()  # pyright: ignore[reportAttributeAccessIssue]
            self._sums.zero_()
            self._tokens += tokens
            if pairs:
                logs |= {"forget_loss": forget / pairs, "retain_loss": retain / pairs}
                logs |= {"forget_nll": forget_nll / pairs, "retain_nll": retain_nll / pairs}
                logs |= {"num_tokens": self._tokens}
            if self._stopped:
                logs[STOPPED] = 1.0
        super().log(logs, start_time)
