"""GLOW, gain-based loss weighting (arXiv 2601.04992): samples that improved least since the last epoch weigh most.

It trains on correct and incorrect chains alike; correctness never enters the loss. What the paper's body says of the
formula was not available to us: form, constants and clamp are those of the authors' released code, except that
- the two losses of a sample are joined by a stable id, survive a resume, and cost one all-reduce per epoch;
- the denominator is the global batch (the released code averages within each micro-batch);
- a sample without a previous loss has weight 1 (there: it is compared with the mean of its micro-batch).
"""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from ..core.errors import DataError, RecipeError
from .checkpoints import MarkComplete, checkpoint_folder, checkpoint_to_resume
from .heldout import HeldoutConfig, HeldoutEvaluation
from .loss_ledger import NO_SAMPLE, LossLedger, check_ids
from .losses import drop_penalty_slope, glow_weight
from .weighted_sft import SAMPLE_WEIGHT, WeightedSFTConfig, WeightedSFTTrainer, check_choice, given_weights


@dataclass
class GLOWConfig(HeldoutConfig, WeightedSFTConfig):
    """Configuration of `GLOWTrainer`: TRL's `SFTConfig`, GLOW, and its controls. Defaults are the released code's.

    With these defaults (alpha 1, floor 0.5) every sample that improved weighs exactly 0.5 and only those that got
    worse weigh more, so most of the effect is half the loss. `weighting: constant` is the control for that, and
    `glow_alpha: 2` puts weight 1 at gain 0.
    """

    weighting: str = field(
        default="glow",
        metadata={
            "help": "`glow`; or a control: `constant` (every sample weighs `constant_weight`), `none` (plain SFT).",
            "choices": ["glow", "constant", "none"],
        },
    )
    constant_weight: float = field(default=0.5, metadata={"help": "The weight of `weighting: constant`."})
    glow_alpha: float = field(default=1.0, metadata={"help": "Height of the sigmoid."})
    glow_beta: float = field(default=20.0, metadata={"help": "Steepness of the sigmoid, in 1 / nats of gain."})
    glow_form: str = field(
        default="scaled",
        metadata={
            "help": "`scaled`: w = alpha (1 - sigmoid(beta gain)); `one_plus`: w = 1 + alpha (1 - sigmoid(beta gain)).",
            "choices": ["scaled", "one_plus"],
        },
    )
    glow_min_weight: float | None = field(default=0.5, metadata={"help": "Smallest weight; null is no limit."})
    glow_max_weight: float | None = field(default=5.0, metadata={"help": "Largest weight; null is no limit."})
    glow_warmup_epochs: int = field(
        default=1, metadata={"help": "Epochs at the start in which every weight is 1, of the controls too."}
    )
    negative_weight: float = field(
        default=1.0,
        metadata={
            "help": "Times the weight of chains whose `correct` is false, in every epoch. 1 is GLOW: its loss never "
            "looks at labels; 0 leaves them out of the gradient and keeps them in the ledger."
        },
    )
    drop_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Strength of a penalty on losses that fall suddenly: this times the mean over samples of "
            "relu(loss `drop_epochs` ago - loss - `drop_margin`). Ours, after the trajectory loss of SAF (arXiv "
            "2205.14083), which compares output distributions instead. 0 is off; SAF's factor is 0.3."
        },
    )
    drop_margin: float = field(default=0.0, metadata={"help": "Fall in nats per token that costs nothing."})
    drop_epochs: int = field(default=3, metadata={"help": "Epochs between the two losses; before that, no penalty."})
    glow_normalize: str = field(
        default="none",
        metadata={
            "help": "`batch_mean` divides the gradient by the mean sample weight of the global batch, which takes the "
            "hidden change of the learning rate out: a true weighted mean. The logged loss is not divided.",
            "choices": ["none", "batch_mean"],
        },
    )

    def __post_init__(self):
        """Check every field, then what TRL checks."""
        for name in ("weighting", "glow_form", "glow_normalize", "heldout_extract", "heldout_engine"):
            check_choice(self, name)
        for name in ("constant_weight", "glow_alpha", "glow_beta"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        low, high = self.glow_min_weight, self.glow_max_weight
        if low is not None and low < 0:
            raise RecipeError(f"`glow_min_weight` must not be negative, got {low}.")
        if high is not None and high <= (low or 0):
            raise RecipeError(f"`glow_max_weight` must be above `glow_min_weight` ({low or 0}), got {high}.")
        for name in ("negative_weight", "drop_penalty", "drop_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"`{name}` must be a number from 0 on, got {getattr(self, name)}.")
        if self.drop_epochs < 1:
            raise RecipeError(f"`drop_epochs` must be at least 1, got {self.drop_epochs}.")
        if self.drop_penalty and self.loss_reduction != "sample":
            raise RecipeError("`drop_penalty` is a mean over samples; it needs `loss_reduction: sample`.")
        if self.glow_warmup_epochs < (self.weighting == "glow"):
            raise RecipeError("`glow_warmup_epochs` must be at least 1: the first epoch has nothing to gain on.")
        if self.weighting != "none" and self.max_steps <= 0 and self.num_train_epochs <= self.glow_warmup_epochs:
            raise RecipeError(
                f"`num_train_epochs: {self.num_train_epochs:g}` ends within `glow_warmup_epochs: "
                f"{self.glow_warmup_epochs}`, so every weight would be 1. Train longer, or say `weighting: none`."
            )
        if self.glow_normalize == "batch_mean" and not self.max_grad_norm > 0:
            raise RecipeError("`glow_normalize: batch_mean` acts where gradients are clipped; set `max_grad_norm`.")
        self.check_heldout()
        super().__post_init__()
        if self.heldout_problems and self.save_strategy == "no":
            raise RecipeError("`heldout_problems` are sampled after each checkpoint; set `save_strategy`.")


class _Tally:
    """Sums over the samples since the last log. Stays on the device; gathered once per log."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(9, dtype=torch.float64, device=device)
        self._highest = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)  # of -weight, of weight

    def add(self, weights: Tensor, losses: Tensor, previous: Tensor, items: Tensor) -> None:
        """Add samples; `items` (samples,) is how much each counts in the loss, 0 for what is no sample."""
        weights, items = weights.double(), items.double()
        counted = items > 0
        compared = counted & ~previous.isnan()
        weight = torch.where(counted, weights, 0)
        gain = torch.where(compared, previous - losses, 0).double()
        self._sums += torch.stack(
            [counted.sum(), weight.sum(), weight.square().sum(), compared.sum(), gain.sum(), gain.square().sum(),
             (gain < 0).sum(), items.sum(), (items * losses).sum()]
        )  # fmt: skip
        highest = torch.stack([-weights, weights]).masked_fill(~counted, -torch.inf).amax(1)
        self._highest = torch.maximum(self._highest, highest)

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Return the statistics over all processes and start again (collective: one gather)."""
        processes = accelerator.gather(torch.cat([self._sums, self._highest])[None])
        samples, weight, weight_squares, compared, gain, gain_squares, regressed, items, loss = (
            processes[:, :9].sum(0).tolist()
        )
        minus_lowest, highest = processes[:, 9:].amax(0).tolist()
        self._sums.zero_()
        self._highest.fill_(-torch.inf)
        if not samples:
            return {}
        statistics = {
            "unweighted_loss": loss / items,
            "glow/weight_mean": weight / samples,
            "glow/weight_std": _deviation(samples, weight, weight_squares),
            "glow/weight_min": -minus_lowest,
            "glow/weight_max": highest,
        }
        if compared:
            statistics["glow/gain_mean"] = gain / compared
            statistics["glow/gain_std"] = _deviation(compared, gain, gain_squares)
            statistics["glow/regressed"] = regressed / compared
        return statistics


def _deviation(count: float, total: float, squares: float) -> float:
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


class _FollowEpochs(TrainerCallback):
    """Tells the ledger when epochs begin and end, and writes it beside each checkpoint."""

    def __init__(self, trainer: "GLOWTrainer"):
        self.trainer = trainer
        self.epoch = 0

    def on_train_begin(self, args: Any, state, control, **kwargs):
        self.epoch = int(state.epoch)  # not 0 after a resume
        if args.weighting != "none" and state.num_train_epochs <= args.glow_warmup_epochs:
            warnings.warn(
                f"`max_steps: {args.max_steps}` ends within `glow_warmup_epochs: {args.glow_warmup_epochs}`, so every "
                f"weight is 1: `weighting: {args.weighting}` does nothing.",
                stacklevel=2,
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.ledger.begin_epoch(self.epoch)
        self.epoch += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.ledger.synchronise()

    def on_save(self, args, state, control, **kwargs):
        self.trainer.ledger.synchronise()  # the running epoch's rows are still with their processes
        if args.should_save:
            self.trainer.ledger.save(checkpoint_folder(args, state))

    def on_train_end(self, args, state, control, **kwargs):
        if args.should_save:
            self.trainer.ledger.save(Path(str(args.output_dir)))


def weigh_negatives(dataset: Dataset, factor: float) -> Dataset:
    """Multiply the `sample_weight` of chains that are labelled wrong; those without a label keep theirs.

    Raises:
        DataError: there are no labels.
    """
    if factor == 1:
        return dataset
    labels = list(dataset["correct"]) if "correct" in dataset.column_names else []
    if all(label is None for label in labels):
        raise DataError(
            f"`negative_weight: {factor:g}` needs to know which chains are wrong: a column `correct`. Grade the rows "
            "first (`afterglow filter` with the step `grade`)."
        )
    stored = given_weights(dataset)
    given = [1.0] * len(labels) if stored is None else stored.tolist()
    weights = [weight * factor if label is False else weight for weight, label in zip(given, labels, strict=True)]
    if stored is not None:
        dataset = dataset.remove_columns(SAMPLE_WEIGHT)
    return dataset.add_column(SAMPLE_WEIGHT, weights)  # pyright: ignore[reportArgumentType, reportCallIssue]


class GLOWTrainer(WeightedSFTTrainer):
    """Supervised fine-tuning with gain-based weights (arXiv 2601.04992).

    A sample weighs its GLOW weight times what the data give it (`sample_weight`, `negative_weight`).

    Every checkpoint holds `loss_ledger.parquet` (`id`, `epoch_1`, `epoch_2`, ..., `weight`; the last epoch may be
    unfinished), and so does `output_dir` at the end. Resuming from a checkpoint, in the middle of an epoch too,
    continues exactly.

    Args:
        model: model, or the folder of one.
        args: the configuration.
        train_dataset: `prompt` and `completion` (lists of chat messages; TRL tokenises them) and `id`, a unique string
            that stays the same from run to run. `correct` where `negative_weight` is not 1.
        kwargs: what `SFTTrainer` takes.

    Raises:
        DataError: `id` is missing, is no string, or stands twice; `negative_weight` without labels.
    """

    _tag_names = ["trl", "glow"]  # noqa: RUF012  TRL's class attributes
    _name = "GLOW"
    _paper = {"title": "Gain-based LOss Weighting (GLOW)", "id": "2601.04992"}  # noqa: RUF012

    any_spread = True  # a run may go on with another number of processes: the global batches stay the same
    args: GLOWConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: Any, args: GLOWConfig, train_dataset: Dataset, **kwargs: Any):
        if isinstance(train_dataset, Dataset):
            if "id" not in train_dataset.column_names:
                raise DataError(
                    f"train_dataset: the column `id` is missing (columns: {', '.join(train_dataset.column_names)}). "
                    "GLOW follows each sample through the epochs by it; give each row a content hash."
                )
            self._ids = check_ids(train_dataset["id"])
            train_dataset = weigh_negatives(train_dataset, args.negative_weight)
        super().__init__(model, args, train_dataset, **kwargs)
        if args.glow_normalize == "batch_mean" and self.is_deepspeed_enabled:
            raise RecipeError("`glow_normalize: batch_mean`: DeepSpeed keeps the gradients to itself; use FSDP or DDP.")
        self.ledger = LossLedger(self._ids, self.accelerator.device)
        self._tally = _Tally(self.accelerator.device)
        # Of the running optimiser step: what the loss counts, and the same times the weights.
        self._step_items = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        self.add_callback(_FollowEpochs(self))
        if args.heldout_problems:
            if isinstance(self.model, PeftModel):
                raise RecipeError(
                    "`heldout_problems`: a checkpoint of an adapter is no model to sample from; delete it."
                )
            if args.heldout_engine == "vllm" and self.accelerator.num_processes > 1:
                raise RecipeError("`heldout_engine: vllm` would meet this training's process group; use transformers.")
            self.add_callback(HeldoutEvaluation(args, args.seed))
        self.add_callback(MarkComplete())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any):
        """Train, from the start or from a checkpoint and its ledger; True is the last whole one in `output_dir`.

        With `heldout_problems` the model is that of the selected checkpoint afterwards.

        Raises:
            RunFolderError: there is no such checkpoint, or it has no ledger.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        device = self.accelerator.device
        if checkpoint:
            self.ledger = LossLedger.load(checkpoint, self._ids, device)
        else:
            self.ledger = LossLedger(self._ids, device)
        result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        if self.args.heldout_problems and self.state.best_model_checkpoint:
            self._load_best_model()
        return result

    def sample_weights(self, rows: Tensor, losses: Tensor, tokens: Tensor) -> Tensor:
        """Weigh a training batch and note its losses: all arguments and the result are (samples,)."""
        args = self.args
        previous = self.ledger.previous_loss(rows)
        weights = self._weights(previous, losses) * super().sample_weights(rows, losses, tokens)
        self.ledger.record(torch.where(tokens > 0, rows, NO_SAMPLE), losses, weights)
        items = tokens if args.loss_reduction == "token" else (tokens > 0).float()
        self._tally.add(weights, losses, previous, items)
        self._step_items += torch.stack([items.sum(), (items * weights).sum()])
        if args.drop_penalty:
            past = self.ledger.loss_ago(rows, args.drop_epochs)
            return weights + drop_penalty_slope(past, losses, args.drop_penalty, args.drop_margin)
        return weights

    def _weights(self, previous: Tensor, losses: Tensor) -> Tensor:
        args = self.args
        if args.weighting == "none" or self.ledger.epoch < args.glow_warmup_epochs:
            return torch.ones_like(losses)
        if args.weighting == "constant":
            return torch.full_like(losses, args.constant_weight)
        return glow_weight(
            previous, losses, args.glow_alpha, args.glow_beta, args.glow_form, args.glow_min_weight,
            args.glow_max_weight,
        )  # fmt: skip

    def _clip_grad_norm(self, model):
        if self.args.glow_normalize == "batch_mean":
            # The mean weight of the global batch is known after its last micro-batch; gradients are linear in it.
            items, weighted = self.accelerator.reduce(self._step_items).tolist()  # pyright: ignore[reportAttributeAccessIssue]
            for parameter in model.parameters():
                if parameter.grad is not None and weighted > 0:
                    parameter.grad.mul_(items / weighted)
        self._step_items.zero_()
        return super()._clip_grad_norm(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the statistics of weights and gains since the last log."""
        if self.model.training:
            logs |= self._tally.collect(self.accelerator)
        super().log(logs, start_time)
