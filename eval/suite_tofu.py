"""`suite: tofu`: questions about fictitious authors (arXiv 2401.06121), or any set of your own in the same shape.

Forget set, retain set, real authors, world facts: probability, ROUGE-L recall of greedy answers, truth ratio; model
utility over the last three; forget quality against the retrained model; extraction strength and exact memorisation of
the forget set; membership attacks where there is a `holdout` set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import RecipeError
from .suite_base import BaseSuite, Measured, Retrained, RetrainedConfig, attack_scores, membership_of
from .uncertainty import mean_interval
from .unlearning_data import SPEC_HELP, ask_chat, encode_answer, read_set, row_id, text_of
from .unlearning_metrics import (
    bootstrap_utility,
    closeness_to_one,
    forget_quality,
    preference_for_truth,
    probability,
    probability_among,
    rouge_l,
    share_of_truth,
    truth_ratio,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UTILITY_SETS = ("retain", "real_authors", "world_facts")
OPTION_SETS = ("real_authors", "world_facts")
TOFU_PARTS = 9


@dataclass(kw_only=True)
class TofuConfig(RetrainedConfig):
    """Which sets, and how they are asked. Columns: question, answer, paraphrased_answer, perturbed_answer."""

    forget: str = field(default="locuslab/TOFU:forget10_perturbed", metadata={"help": f"Forget set. {SPEC_HELP}"})
    retain: str = field(default="locuslab/TOFU:retain_perturbed", metadata={"help": "Retain set."})
    real_authors: str | None = field(
        default="locuslab/TOFU:real_authors_perturbed",
        metadata={"help": "Utility set; null leaves it out, and model utility is over fewer than TOFU's nine parts."},
    )
    world_facts: str | None = field(
        default="locuslab/TOFU:world_facts_perturbed", metadata={"help": "Utility set, as real_authors."}
    )
    holdout: str | None = field(
        default=None,
        metadata={"help": "Questions like the forget set's that no model saw: membership attacks need it."},
    )
    max_tokens: int = field(default=200, metadata={"help": "Longest answer that is generated."})
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Variables of the chat template for generated answers."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens is {self.max_tokens}: use at least 1")


class TofuSuite(BaseSuite):
    """See the module."""

    name = "tofu"
    config: TofuConfig

    def sources(self) -> dict[str, str]:
        """See `Suite.sources`."""
        names = ("forget", *UTILITY_SETS, "holdout")
        return {name: spec for name in names if (spec := getattr(self.config, name)) is not None}

    def read(self) -> None:
        """See `Suite.read`."""
        for name, spec in self.sources().items():
            needs = ["question", "answer"]
            if name != "holdout":
                needs.append("perturbed_answer")
                if name not in OPTION_SETS:
                    needs.append("paraphrased_answer")
            self.sets[name] = read_set(spec, name, needs, self.config.columns, self.config.max_rows)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Mapping[str, Any]) -> None:
        """See `Suite.encode`."""
        for name, rows in self.sets.items():
            for i, row in enumerate(rows):
                at = f"{name}/{i}"
                answer = encode_answer(tokenizer, f"{at}/answer", row["question"], text_of(row["answer"]))
                self.texts.append(answer)
                if name in ("forget", "holdout") and "holdout" in self.sets:
                    self.attacked.append(answer)
                if name == "holdout":
                    continue
                if name not in OPTION_SETS:
                    paraphrase = text_of(row["paraphrased_answer"])
                    self.texts.append(encode_answer(tokenizer, f"{at}/paraphrase", row["question"], paraphrase))
                for j, wrong in enumerate(_wrong_answers(row)):
                    self.texts.append(encode_answer(tokenizer, f"{at}/wrong/{j}", row["question"], wrong))
                self.asks.append(ask_chat(tokenizer, at, row["question"], self.config.max_tokens, chat_template_kwargs))

    def rows(self, found: Measured) -> list[dict[str, Any]]:
        """See `Suite.rows`."""
        rows, attacked = [], {text.key for text in self.attacked}
        for name, of_set in self.sets.items():
            for i, row in enumerate(of_set):
                at, answer = f"{name}/{i}", text_of(row["answer"])
                text = found.texts[f"{at}/answer"]
                made: dict[str, Any] = {
                    "set": name, "row": i, "id": row_id(row, "question", "answer"),
                    "nll": text["nll"], "n_tokens": text["n_tokens"], "probability": probability(text["nll"]),
                    "extraction_strength": text["extraction_strength"],
                    "exact_memorisation": text["exact_memorisation"],
                }  # fmt: skip
                if (key := text["key"]) in attacked:
                    made["membership"] = membership_of(text, found.reference.get(key, {}), found.gradients.get(key, {}))
                if name != "holdout":
                    wrong = [found.texts[f"{at}/wrong/{j}"]["nll"] for j in range(len(_wrong_answers(row)))]
                    right = text["nll"] if name in OPTION_SETS else found.texts[f"{at}/paraphrase"]["nll"]
                    recall, f1 = rouge_l(found.answers[at]["text"], answer)
                    made |= {"truth_ratio": truth_ratio(right, wrong), "rouge_l_recall": recall, "rouge_l_f1": f1}
                    if name in OPTION_SETS:
                        made["probability"] = probability_among(text["nll"], wrong)
                    made |= {"generation": found.answers[at]["text"], "gold": answer}
                    made["finish_reason"] = found.answers[at]["finish_reason"]
                rows.append(made)
        return rows

    def scores(self, rows: Sequence[dict[str, Any]], retrained: Retrained | None) -> dict[str, Any]:
        """See `Suite.scores`."""
        return tofu_scores(rows, retrained, self.config.attacks, self.config.seed)


def _wrong_answers(row: Mapping[str, Any]) -> list[str]:
    wrong = row["perturbed_answer"]
    return [str(text) for text in wrong] if isinstance(wrong, list) else [str(wrong)]


def tofu_scores(
    rows: Sequence[Mapping[str, Any]], retrained: Retrained | None, attacks: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Return every TOFU score of a model from its rows: utility first, then what is left of the forget set.

    Args:
        rows: `TofuSuite.rows`, or those of stored logs.
        retrained: rows of the retrained model; None leaves forget quality out.
        attacks: membership attacks to report, where rows of a set `holdout` are there.
        seed: of the bootstrap.
    """
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_set.setdefault(row["set"], []).append(row)
    parts = {name: utility_parts(by_set[name]) for name in UTILITY_SETS if name in by_set}
    count = sum(map(len, parts.values()))
    utility = vars(bootstrap_utility(parts, seed)).copy()
    if count != TOFU_PARTS:
        utility["method"] += f"; harmonic mean of {count} parts, not TOFU's {TOFU_PARTS}"
    scores: dict[str, Any] = {"model_utility": utility}
    for name, of_set in parts.items():
        scores |= {f"{name}_{part}": _mean(values) for part, values in of_set.items()}
    forget = by_set["forget"]
    ratios = [row["truth_ratio"] for row in forget]
    if retrained is not None:
        theirs = retrained.values("forget", "truth_ratio", [row["id"] for row in forget])
        p_value, distance = forget_quality(ratios, theirs)
        exact = {"method": "Kolmogorov-Smirnov test, which has no interval"}
        scores["forget_quality"] = {"value": p_value, "low": p_value, "high": p_value} | exact
        scores["forget_ks_distance"] = {"value": distance, "low": distance, "high": distance} | exact
    scores |= {
        "forget_probability": _mean([row["probability"] for row in forget]),
        "forget_rouge_l": _mean([row["rouge_l_recall"] for row in forget]),
        "forget_truth_ratio": _mean([closeness_to_one(ratio) for ratio in ratios]),
        "forget_truth_share": _mean([share_of_truth(ratio) for ratio in ratios]),
    }
    for name in ("extraction_strength", "exact_memorisation"):
        if all(name in row for row in forget):
            scores[f"forget_{name}"] = _mean([row[name] for row in forget])
    if "holdout" in by_set:
        scores |= attack_scores(rows, "forget", attacks, retrained)
    scores["n"] = {name: len(of_set) for name, of_set in by_set.items()}
    cut = [row for row in rows if row.get("finish_reason") == "length"]
    return scores | {"truncated_answers": len(cut)}


def utility_parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the three parts that a set gives to model utility, one value per question."""
    return {
        "probability": [row["probability"] for row in rows],
        "rouge_l": [row["rouge_l_recall"] for row in rows],
        "truth_ratio": [preference_for_truth(row["truth_ratio"]) for row in rows],
    }


def _mean(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    return vars(mean_interval(values)).copy()
