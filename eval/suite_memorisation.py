"""`suite: memorisation`: how much of given texts a model has by heart, without generating anything.

Probability, extraction strength and exact memorisation of a forget set, of a retain set beside it (utility), and
membership attacks where there is a held-out set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .suite_base import BaseSuite, Measured, Retrained, RetrainedConfig, attack_scores, membership_of
from .uncertainty import mean_interval
from .unlearning_data import SPEC_HELP, encode_answer, encode_text, read_set, row_id, text_of
from .unlearning_metrics import probability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = ("probability", "extraction_strength", "exact_memorisation")


@dataclass(kw_only=True)
class MemorisationConfig(RetrainedConfig):
    """Which texts. Columns: text; or question and answer, of which the answer is scored, by the chat template."""

    forget: str = field(metadata={"help": f"Texts that should be forgotten. {SPEC_HELP}"})
    retain: str | None = field(default=None, metadata={"help": "Texts that should be kept: utility."})
    holdout: str | None = field(default=None, metadata={"help": "Texts that no model saw: membership attacks."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a text that are scored."})


class MemorisationSuite(BaseSuite):
    """See the module."""

    name = "memorisation"
    config: MemorisationConfig

    def sources(self) -> dict[str, str]:
        """See `Suite.sources`."""
        return {name: spec for name in ("forget", "retain", "holdout") if (spec := getattr(self.config, name))}

    def read(self) -> None:
        """See `Suite.read`."""
        for name, spec in self.sources().items():
            is_text = "text" in read_set(spec, name, (), self.config.columns, 1)[0]
            required = ("text",) if is_text else ("question", "answer")
            self.sets[name] = read_set(spec, name, required, self.config.columns, self.config.max_rows)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Mapping[str, Any]) -> None:
        """See `Suite.encode`."""
        for name, rows in self.sets.items():
            for i, row in enumerate(rows):
                key = f"{name}/{i}"
                if "text" in row:
                    text = encode_text(tokenizer, key, row["text"], self.config.max_length)
                else:
                    text = encode_answer(tokenizer, key, row["question"], text_of(row["answer"]))
                self.texts.append(text)
                if name != "retain" and "holdout" in self.sets:
                    self.attacked.append(text)

    def rows(self, found: Measured) -> list[dict[str, Any]]:
        """See `Suite.rows`."""
        attacked = {text.key for text in self.attacked}
        rows = []
        for name, of_set in self.sets.items():
            for i, row in enumerate(of_set):
                key = f"{name}/{i}"
                text = found.texts[key]
                made = {"set": name, "row": i, "id": row_id(row, "text", "question", "answer")}
                made |= {"nll": text["nll"], "n_tokens": text["n_tokens"], "probability": probability(text["nll"])}
                made |= {metric: text[metric] for metric in METRICS[1:]}
                if key in attacked:
                    made["membership"] = membership_of(text, found.reference.get(key, {}), found.gradients.get(key, {}))
                rows.append(made)
        return rows

    def scores(self, rows: Sequence[dict[str, Any]], retrained: Retrained | None) -> dict[str, Any]:
        """See `Suite.scores`."""
        scores: dict[str, Any] = {}
        for name in ("retain", "forget"):
            for metric in METRICS if name in self.sets else ():
                values = [row[metric] for row in rows if row["set"] == name]
                scores[f"{name}_{metric}"] = vars(mean_interval(values)).copy()
        if "holdout" in self.sets:
            scores |= attack_scores(rows, "forget", self.config.attacks, retrained)
        return scores | {"n": {name: len(of_set) for name, of_set in self.sets.items()}}
