"""What the suites of unlearning evaluation share: keys, membership attacks, the retrained model beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..core.errors import DataError, RecipeError
from ..core.generation import SamplingConfig
from .membership import ATTACKS, auc
from .unlearning_data import Ask, Text
from .unlearning_metrics import privacy_leakage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_FILE, SCORES_FILE = "rows.jsonl", "scores.json"
NO_MODEL = "none"
GREEDY = SamplingConfig(temperature=0.0, top_p=1.0)


@dataclass(kw_only=True)
class SuiteConfig:
    """What every suite understands."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "tofu, muse, wmdp, memorisation or leakage; relearning has keys of its own."})
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Our column name -> the file's, for every set that has it."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "First rows of each set: for smoke runs."})
    token_budget: int = field(default=4096, metadata={"help": "Most tokens of one forward pass, padding included."})
    seed: int = field(default=0, metadata={"help": "Of samples and bootstrap intervals; greedy text needs none."})
    quantise: Literal["int8", "int4", "nf4"] | None = field(
        default=None,
        metadata={
            "help": "Attack by quantisation: evaluate the checkpoint with linear weights rounded to 255 (`int8`) or "
            "15 (`int4`) levels per output channel, or to QLoRA's 16 per 64 weights (`nf4`); stored as floats."
        },
    )
    compat_open_unlearning: bool = field(
        default=False,
        metadata={
            "help": "Compute what open-unlearning computes where it differs: extraction strength never below "
            "1 / tokens, stems in MUSE's ROUGE."
        },
    )

    def __post_init__(self):
        if self.token_budget < 1:
            raise RecipeError(f"token_budget is {self.token_budget}: use at least 1")
        if self.max_rows is not None and self.max_rows < 1:
            raise RecipeError(f"max_rows is {self.max_rows}: use at least 1")


@dataclass(kw_only=True)
class RetrainedConfig(SuiteConfig):
    """A suite whose scores are read beside those of the retrained model, which never saw the forget set."""

    retrained: str = field(
        metadata={
            "help": "Run folder of the same suite on the model retrained without the forget set; `none` for that model "
            "itself, or where there is none: scores that compare with it are left out then."
        }
    )
    attacks: list[str] = field(
        default_factory=lambda: ["loss", "zlib", "min_k", "min_k++"],
        metadata={"help": f"Membership attacks: {', '.join(ATTACKS)}. gradnorm takes a backward pass per text."},
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "Model of `attacks: [reference]`: one that saw neither set."}
    )

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise RecipeError(f"attacks names {unknown[0]!r}, which is none of {', '.join(ATTACKS)}")
        if ("reference" in self.attacks) != (self.reference_model is not None):
            raise RecipeError("attacks: `reference` and the key reference_model need each other")


@dataclass
class Measured:
    """What was measured of a checkpoint, by key."""

    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: dict[str, dict[str, Any]] = field(default_factory=dict)
    gradients: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)


class Suite(Protocol):
    """One benchmark: which texts and prompts it needs, and what follows from how a model treats them."""

    name: str
    config: SuiteConfig
    sampling: SamplingConfig
    texts: list[Text]
    asks: list[Ask]
    attacked: list[Text]
    choice_prompts: dict[str, str]

    def sources(self) -> dict[str, str]:
        """Return the sets that it reads, by name."""
        ...

    def read(self) -> None:
        """Read and check the sets."""
        ...

    def encode(self, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Mapping[str, Any]) -> None:
        """Turn the sets into `texts`, `asks` and `choice_prompts`."""
        ...

    def rows(self, found: Measured) -> list[dict[str, Any]]:
        """Return one row per question or text, with its `set` and every metric of it."""
        ...

    def scores(self, rows: Sequence[dict[str, Any]], retrained: "Retrained | None") -> dict[str, Any]:
        """Return the scores: name -> value with interval."""
        ...


class BaseSuite:
    """Nothing to measure yet."""

    name: str

    def __init__(self, config: Any):
        self.config = config
        self.sampling = GREEDY
        self.texts: list[Text] = []
        self.asks: list[Ask] = []
        self.attacked: list[Text] = []
        self.choice_prompts: dict[str, str] = {}
        self.sets: dict[str, list[dict[str, Any]]] = {}


@dataclass(frozen=True)
class Retrained:
    """The finished run of the retrained model."""

    path: Path
    rows: list[dict[str, Any]]
    scores: dict[str, Any]

    def values(self, set_name: str, column: str, ids: Sequence[str]) -> list[float]:
        """Return a column of the rows of a set that have these ids, in their order.

        Raises:
            DataError: it was evaluated on other questions.
        """
        found = {row["id"]: row[column] for row in self.rows if row["set"] == set_name}
        if missing := [row_id for row_id in ids if row_id not in found]:
            raise DataError(
                f"{self.path}: the retrained model was asked other questions: {len(missing)} of {len(ids)} rows of "
                f"`{set_name}` are not there. Evaluate it with the same sets and `max_rows`."
            )
        return [found[row_id] for row_id in ids]


def read_retrained(config: RetrainedConfig) -> Retrained | None:
    """Read the run that `retrained` names; None for `none`.

    Raises:
        RecipeError: there is no finished run of this suite; says how to make it.
    """
    if config.retrained == NO_MODEL:
        return None
    path = Path(config.retrained)
    rows, scores = path / ROWS_FILE, path / SCORES_FILE
    how = (
        f"Make it first: the same recipe with `--model <retrained model> --output_dir {path} --retrained {NO_MODEL}`. "
        f"Without a retrained model say `retrained: {NO_MODEL}`: no forget quality and no PrivLeak then."
    )
    for file in (rows, scores):
        if not file.is_file():
            raise RecipeError(f"retrained: {file} is not there. {how}")
    stored = json.loads(scores.read_text(encoding="utf-8"))
    if config.suite not in stored:
        raise RecipeError(f"retrained: {scores} is of the suite {', '.join(stored)}, this is {config.suite}. {how}")
    lines = rows.read_text(encoding="utf-8").splitlines()
    return Retrained(path, [json.loads(line) for line in lines], stored[config.suite])


def membership_of(text: Mapping[str, Any], reference: Mapping[str, Any], gradient: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score of each attack on one text that was measured; higher means less likely a member."""
    scores = {"loss": text["nll"], **{name: text[name] for name in ("zlib", "min_k", "min_k++")}}
    if reference:
        scores["reference"] = text["nll"] - reference["nll"]
    return scores | ({"gradnorm": gradient["gradnorm"]} if gradient else {})


def attack_scores(
    rows: Sequence[Mapping[str, Any]], members: str, attacks: Sequence[str], retrained: Retrained | None
) -> dict[str, Any]:
    """Return the AUC of each attack, members against held-out texts, and PrivLeak (Min-K%) beside a retrained model."""
    by_set = {name: [row["membership"] for row in rows if row["set"] == name] for name in (members, "holdout")}
    scores: dict[str, Any] = {}
    for attack in attacks:
        groups = [[scores_of[attack] for scores_of in by_set[name]] for name in (members, "holdout")]
        scores[f"mia_{attack}_auc"] = vars(auc(*groups)).copy()
    if retrained is not None and "mia_min_k_auc" in scores:
        theirs = retrained.scores.get("mia_min_k_auc")
        if theirs is None:
            raise DataError(
                f"{retrained.path}: has no mia_min_k_auc for PrivLeak. Evaluate the retrained model with the same "
                "`holdout` and `attacks`."
            )
        ends = [privacy_leakage(scores["mia_min_k_auc"][end], theirs["value"]) for end in ("value", "high", "low")]
        scores["privleak"] = dict(zip(("value", "low", "high"), ends, strict=True)) | {
            "method": "DeLong, the retrained AUC as it is"
        }
    return scores
