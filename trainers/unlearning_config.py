"""The configuration of unlearning: every loss with its own constants, named so that no two of them are confused."""

import dataclasses
from dataclasses import dataclass, field

from trl.trainer.sft_config import SFTConfig

from ..core.errors import RecipeError
from .unlearning_losses import ALIASES
from .weighted_sft import check_choice

# Loss -> the beta and the length_norm of its paper or released code. None: it has no beta.
FORGET_LOSSES: dict[str, tuple[float | None, str]] = {
    "ga": (None, "mean"),
    "npo": (0.1, "sum"),
    "simnpo": (4.5, "mean"),
    "dpo": (0.1, "sum"),
    "wga": (1.0, "mean"),
    "satimp": (5.0, "mean"),
    "undial": (10.0, "mean"),
    "ceu": (None, "mean"),
    "rmu": (None, "mean"),
}
NEED_LOGITS = ("undial", "ceu", "rmu")  # those that the answer's log-probability is not enough for


@dataclass
class UnlearnConfig(SFTConfig):
    """Configuration of `UnlearnTrainer`: TRL's `SFTConfig`, the two losses, and when to stop."""

    retain_data: str | list[str] | None = field(
        default=None, metadata={"help": "Trajectories to keep, read like `data` (which is what to forget)."}
    )
    forget_loss: str = field(
        default="npo",
        metadata={"help": "`" + "`, `".join(FORGET_LOSSES) + "`; docs/methods/unlearning.md has the formulas."},
    )
    retain_loss: str = field(
        default="nll",
        metadata={
            "help": "`nll` (likelihood), `kl` (to the start model's distribution), `hidden` (rmu: to its hidden "
            "states), or `none`, the control: nothing holds the model; retain rows are measured only. Without a new "
            "LoRA adapter, `kl` and `hidden` keep one vector for each answer token of the retain rows in memory.",
            "choices": ["nll", "kl", "hidden", "none"],
        },
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Factor of the forget loss."})
    retain_weight: float = field(default=1.0, metadata={"help": "Factor of the retain loss."})
    length_norm: str | None = field(
        default=None,
        metadata={
            "help": "`sum` or `mean` over the tokens of a forgotten answer; null is the paper's: `sum` for npo and "
            "dpo, `mean` for the others. A beta belongs to one of the two.",
            "choices": ["sum", "mean"],
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "npo 0.1, simnpo 4.5, dpo 0.1, wga 1, satimp 5, undial 10 where it is null."},
    )
    margin: float = field(default=0.0, metadata={"help": "simnpo: in nats per token; the paper's gamma is beta x it."})
    beta2: float = field(default=1.0, metadata={"help": "satimp: exponent of (1 - p)."})
    ceu_skip_tokens: int = field(default=1, metadata={"help": "ceu: answer tokens at the start that are left alone."})
    rmu_layer: int = field(default=7, metadata={"help": "rmu: layer whose output is steered, from 0."})
    rmu_coefficient: float = field(default=2.0, metadata={"help": "rmu: length of the control vector."})
    alternatives: str | None = field(
        default=None,
        metadata={
            "help": "dpo: text file with one preferred answer a line (refusals); the seed gives each row one. "
            "Else the column `alternative` is the preferred answer."
        },
    )
    forget_nll_target: float | None = field(
        default=None,
        metadata={"help": "Stop once a global batch's forget NLL, in nats per token, is at least this: forgotten."},
    )
    retain_nll_budget: float | None = field(
        default=None,
        metadata={"help": "Stop once a global batch's retain NLL, in nats per token, is above this: utility spent."},
    )

    def __post_init__(self):
        """Check every field, then what TRL checks."""
        if self.forget_loss not in FORGET_LOSSES:
            here = ALIASES.get(self.forget_loss)
            raise RecipeError(
                f"`forget_loss`: {self.forget_loss!r} is "
                + (f"written `{here}` here." if here else f"none of {', '.join(FORGET_LOSSES)}.")
            )
        check_choice(self, "retain_loss")
        beta, length_norm = FORGET_LOSSES[self.forget_loss]
        self._refuse_idle_keys(beta)
        self.beta = beta if self.beta is None else self.beta
        self.length_norm = self.length_norm or length_norm
        check_choice(self, "length_norm")
        if self.forget_loss == "rmu" and self.length_norm != "mean":
            raise RecipeError("`length_norm: sum`: rmu is a mean squared distance; use `mean`.")
        if self.beta is not None and (
            self.beta < 0 or (self.beta == 0 and self.forget_loss in ("npo", "simnpo", "dpo"))
        ):
            raise RecipeError(f"`beta` must be above 0, got {self.beta}.")
        for name in ("forget_weight", "retain_weight", "beta2", "ceu_skip_tokens", "rmu_layer", "rmu_coefficient"):
            if getattr(self, name) < 0:
                raise RecipeError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.retain_loss == "hidden" and self.forget_loss != "rmu":
            raise RecipeError("`retain_loss: hidden` compares hidden states at `rmu_layer`; it goes with rmu only.")
        self._refuse_what_breaks_pairs()
        super().__post_init__()

    def _refuse_idle_keys(self, beta: float | None) -> None:
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        users = {"margin": "simnpo", "beta2": "satimp", "ceu_skip_tokens": "ceu", "rmu_layer": "rmu",
                 "rmu_coefficient": "rmu", "alternatives": "dpo"}  # fmt: skip
        for name, user in users.items():
            if self.forget_loss != user and getattr(self, name) != plain[name]:
                raise RecipeError(f"`{name}` does nothing in {self.forget_loss}; it is a key of {user}.")
        if beta is None and self.beta is not None:
            raise RecipeError(f"`beta` does nothing in {self.forget_loss}, which has none.")

    def _refuse_what_breaks_pairs(self) -> None:
        if self.packing or self.padding_free:
            raise RecipeError("`packing` and `padding_free` lay rows end to end; unlearning needs a loss for each row.")
        if self.loss_type == "dft" or self.label_smoothing_factor:
            raise RecipeError(
                "`loss_type: dft` and `label_smoothing_factor` would change the answer's log-probability."
            )
        if not self.average_tokens_across_devices:
            raise RecipeError(
                "`average_tokens_across_devices: false` leaves each process its own denominator; use true."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise RecipeError(f"`train_sampling_strategy: {self.train_sampling_strategy}`: use `random`.")
        if self.dataloader_persistent_workers:
            raise RecipeError("`dataloader_persistent_workers` would keep the first epoch's pairs; use false.")
