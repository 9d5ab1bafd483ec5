"""Unlearning that is also true around the weights it ends in: a reconstruction of StableUN (arXiv 2509.20230).

`neighbourhood` has the method, what of it is reported and what is our choice. It works over any loss of `unlearning`.
SAM-style unlearning (arXiv 2502.05374) is the case `perturbation: sap`, `base_weight: 0`, `inner_step: 0`,
`project_conflicts: false`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..core.errors import RecipeError, RunFolderError
from .checkpoints import checkpoint_folder
from .neighbourhood import STRATEGIES, Neighbourhood, ParameterSpace, neighbourhood_gradient
from .paired_rows import parts
from .unlearning import UnlearnTrainer
from .unlearning_config import UnlearnConfig
from .weighted_sft import check_choice


@dataclass
class StableUnlearnConfig(UnlearnConfig):
    """Configuration of `StableUnlearnTrainer`. The paper's constants are not public: every default is our choice."""

    perturbation: str = field(
        default="sap",
        metadata={
            "help": "Where the forget loss is measured again: `sap` (up the loss), `gpn` (Gaussian noise), `gap` (the "
            "gradient's signs, random magnitudes), `hws` (towards the average of earlier weights), `mix` (in turn).",
            "choices": [*STRATEGIES, "mix"],
        },
    )
    perturbation_points: int = field(default=1, metadata={"help": "Perturbed points in each step."})
    perturbation_radius: float = field(
        default=0.01, metadata={"help": "Length of a perturbation, over all trained parameters as one vector."}
    )
    base_weight: float = field(
        default=1.0, metadata={"help": "Weight of the forget gradient at the weights themselves."}
    )
    forget_feedback: float = field(default=1.0, metadata={"help": "Weight of the forget gradient at the points."})
    remember_feedback: float = field(default=1.0, metadata={"help": "Weight of the retain gradient."})
    inner_step: float | None = field(
        default=None,
        metadata={"help": "Step to the temporary weights, times the forget gradient; null is the learning rate."},
    )
    feedback_split: str = field(
        default="disjoint",
        metadata={
            "help": "`disjoint`: the forget gradient belongs to forgetting alone; `literal`: half of it to "
            "remembering, as the paper is reported to write.",
            "choices": ["disjoint", "literal"],
        },
    )
    project_conflicts: bool = field(
        default=True,
        metadata={"help": "Where the two gradients conflict, project forgetting onto what keeps the rest."},
    )
    hws_decay: float = field(default=0.99, metadata={"help": "hws: of the running average, per step."})
    hws_pull: float = field(default=0.5, metadata={"help": "hws: part of the way to the average, at most `radius`."})

    def __post_init__(self):
        """Check every field, then what `UnlearnConfig` checks."""
        check_choice(self, "perturbation")
        check_choice(self, "feedback_split")
        if self.retain_loss == "none":
            raise RecipeError("`retain_loss: none` leaves nothing to remember; use `method: unlearn`.")
        if self.perturbation_points < 1:
            raise RecipeError(f"`perturbation_points` must be at least 1, got {self.perturbation_points}.")
        if self.perturbation_radius <= 0:
            raise RecipeError(f"`perturbation_radius` must be above 0, got {self.perturbation_radius}.")
        for name in ("base_weight", "forget_feedback", "remember_feedback", "hws_pull"):
            if getattr(self, name) < 0:
                raise RecipeError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not self.base_weight and not self.forget_feedback:
            raise RecipeError("`base_weight: 0` and `forget_feedback: 0`: nothing would be forgotten.")
        if self.inner_step is not None and self.inner_step < 0:
            raise RecipeError(f"`inner_step` must not be negative, got {self.inner_step}.")
        if not 0 <= self.hws_decay < 1:
            raise RecipeError(f"`hws_decay` must be in [0, 1), got {self.hws_decay}.")
        if self.fp16:
            raise RecipeError("`fp16` scales gradients, and a neighbourhood step mixes several of them; use `bf16`.")
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            raise RecipeError(
                "DeepSpeed keeps gradients and parameters to itself, so that neither a perturbation nor a projection "
                "can be made. Use DDP or FSDP2 (`--accelerate_config fsdp2`)."
            )


class _KeepAverage(TrainerCallback):
    """Writes the weights' history beside each checkpoint."""

    def __init__(self, trainer: "StableUnlearnTrainer"):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.save_average(checkpoint_folder(args, state))


class StableUnlearnTrainer(UnlearnTrainer):
    """Neighbourhood optimisation over a forget loss: a reconstruction of StableUN.

    A step takes the whole global batch through every pass: accumulation, DDP and FSDP2 give the gradients, norms and
    products of one process. Dropout has the same masks in all passes of a step. Besides `UnlearnTrainer`'s, each log
    has `stable/conflict` (rate), `stable/cosine` of the two gradients, `stable/sharpness` (forget loss around the
    weights less that at them), and `stable/cost` (passes of a step over those of gradient difference). `retain_nll` is
    that of the temporary weights.

    Args:
        model: model, or the folder of one.
        args: the configuration.
        kwargs: what `UnlearnTrainer` takes.

    Raises:
        RecipeError: gradients are out of reach (DeepSpeed, FSDP1), or weights too coarse for a perturbation.
    """

    _name = "StableUnlearning"

    args: StableUnlearnConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: Any, args: StableUnlearnConfig, *rest: Any, **kwargs: Any):
        super().__init__(model, args, *rest, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
            raise RecipeError("FSDP1 flattens parameters in place; use FSDP2 (`--accelerate_config fsdp2`).")
        coarse = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if coarse:
            raise RecipeError(
                f"the trained weights are {', '.join(map(str, coarse))}, whose rounding is larger than a perturbation "
                f"of length {args.perturbation_radius}. Use `dtype: float32` (with `bf16: true` for speed), or LoRA."
            )
        self._how = Neighbourhood(
            perturbation=args.perturbation,
            points=args.perturbation_points,
            radius=args.perturbation_radius,
            base_weight=args.base_weight,
            forget_feedback=args.forget_feedback,
            remember_feedback=args.remember_feedback,
            split=args.feedback_split,
            project_conflicts=args.project_conflicts,
            pull=args.hws_pull,
        )
        self._batches: list[dict[str, Any]] = []
        self._average: list[Tensor] | None = None
        self._sharded = False
        # Since the last log: steps, conflicts, cosines, passes, and this process's part of the sharpness.
        self._reports = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        self.add_callback(_KeepAverage(self))

    # -----------------------------------------------------------------------------------------------------------------
    # one step

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Collect the batches of an optimiser step, and make all its passes at the last one."""
        model.train()
        self._batches.append(self._prepare_inputs(inputs))  # pyright: ignore[reportArgumentType]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        batches, self._batches = self._batches, []
        inner_step, step = self.args.inner_step, self.state.global_step
        if inner_step is None:
            scheduler: Any = self.lr_scheduler
            inner_step = scheduler.get_last_lr()[0]
        noise = torch.Generator(self.accelerator.device).manual_seed(self._seed(step))
        space = ParameterSpace.of(model)
        passes = {"forget": 0}

        def forget() -> Tensor:
            passes["forget"] += 1
            noted = passes["forget"] == 1  # at the weights themselves
            return self._backward(model, batches, lambda batch: self._forget(model, batch, num_items_in_batch, noted))

        def retain() -> Tensor:
            return self._backward(model, batches, lambda batch: self._retain(model, batch, num_items_in_batch))

        report = neighbourhood_gradient(
            space, forget, retain, self._how, float(inner_step), step, noise, self._history(space)
        )
        facts = [1.0, float(report.conflict), report.cosine, float(report.passes), 0.0]
        self._reports += torch.tensor(facts, dtype=torch.float64, device=self._reports.device)
        self._reports[4] += report.nearby_loss - report.forget_loss
        return report.forget_loss + report.retain_loss

    def _backward(self, model: Any, batches: list[dict[str, Any]], term: Callable[[dict], Tensor]) -> Tensor:
        """Run a term of the loss over all batches of the step; gradients are shared between processes at the last."""
        total = torch.zeros((), device=self.accelerator.device)
        device = self.accelerator.device
        on_cpu = device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            # The same dropout in every pass of the step, another in every step and process.
            torch.manual_seed(self._seed(self.state.global_step, self.accelerator.process_index))
            for number, batch in enumerate(batches, 1):
                with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager(), self.maybe_activation_offload_context:
                        loss = term(batch)
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _forget(self, model: Any, batch: dict[str, Any], pairs: Any, noted: bool) -> Tensor:
        count, rows, _ = parts(batch)
        answers = self.score(model, batch, rows)
        values = self.forget_losses(model, batch, answers)
        if noted:
            self.note(batch, forget=(values, answers.rows(slice(count))))
        return self.share(self.args.forget_weight * values, batch, pairs)

    def _retain(self, model: Any, batch: dict[str, Any], pairs: Any) -> Tensor:
        answers = self.score(model, batch, parts(batch)[2])
        values = self.retain_losses(model, batch, answers)
        self.note(batch, retain=(values, answers))
        return self.share(self.args.retain_weight * values, batch, pairs)

    def _seed(self, *numbers: int) -> int:
        return int(np.random.SeedSequence([self.args.seed, *numbers]).generate_state(1)[0])

    # -----------------------------------------------------------------------------------------------------------------
    # the weights' history (hws)

    def _history(self, space: ParameterSpace) -> list[Tensor] | None:
        """Return the running average of the weights, this step's included."""
        if self.args.perturbation not in ("hws", "mix"):
            return None
        self._sharded = space.sharded
        if self._resumed_from is not None:
            path = self._resumed_from / self._average_file()
            if not path.exists():
                raise RunFolderError(
                    f"{self._resumed_from}: has no {path.name}. Resume in as many processes as before."
                )
            stored = torch.load(path, map_location="cpu")  # DDP on a CPU calls its device cpu:0, which torch refuses
            self._average = [tensor.to(self.accelerator.device) for tensor in stored]
            self._resumed_from = None
        if self._average is None:
            self._average = [tensor.clone() for tensor in space.tensors]
        for old, now in zip(self._average, space.tensors, strict=True):
            old.lerp_(now, 1 - self.args.hws_decay)
        return self._average

    def restore(self, checkpoint: Path | None) -> None:
        """As `UnlearnTrainer`; the history is read once the weights are spread as they will be."""
        super().restore(checkpoint)
        self._average, self._resumed_from = None, checkpoint

    def save_average(self, folder: Path) -> None:
        """Write the history into a checkpoint: each process its shards, or the first one all."""
        if self._average is not None and (self._sharded or self.args.should_save):
            torch.save(self._average, folder / self._average_file())

    def _average_file(self) -> str:
        return f"weight_average-{self.accelerator.process_index if self._sharded else 0}.pt"

    # -----------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last log were like."""
        if self.model.training and "train_runtime" not in logs:
            reports: Any = self.accelerator.reduce(self._reports, reduction="mean")
            steps, conflicts, cosines, passes, sharpness = reports.tolist()
            self._reports.zero_()
            if steps:
                logs |= {"stable/conflict": conflicts / steps, "stable/cosine": cosines / steps}
                logs |= {"stable/sharpness": sharpness / steps, "stable/cost": passes / (2 * steps)}
        super().log(logs, start_time)
