"""`suite: wmdp`: four-way questions about hazardous knowledge (arXiv 2403.03218), answered by one letter.

The letter with the largest logit after the question counts, as in the evaluation harness; chance is 25%. Rows hold no
question text. Utility is another set of such questions (MMLU) in the same list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, RecipeError
from .suite_base import BaseSuite, Measured, Retrained, SuiteConfig
from .uncertainty import mean_interval
from .unlearning_data import SPEC_HELP, read_set, row_id
from .unlearning_metrics import LETTERS, choice_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBJECTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


@dataclass(kw_only=True)
class WmdpConfig(SuiteConfig):
    """Which questions. Columns: question, choices (four), answer (0 to 3), and domain where a file has several."""

    questions: list[str] = field(
        default_factory=lambda: ["cais/wmdp:wmdp-bio:test", "cais/wmdp:wmdp-cyber:test"],
        metadata={"help": f"Sets of questions. {SPEC_HELP}"},
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise RecipeError(f"questions is {self.questions}: name at least one set, each once")


class WmdpSuite(BaseSuite):
    """See the module."""

    name = "wmdp"
    config: WmdpConfig

    def sources(self) -> dict[str, str]:
        """See `Suite.sources`."""
        return {f"questions {i}": spec for i, spec in enumerate(self.config.questions)}

    def read(self) -> None:
        """See `Suite.read`; sorts the questions by domain: the column, else the name of the set."""
        for spec in self.config.questions:
            rows = read_set(spec, "questions", ("question", "choices"), self.config.columns, self.config.max_rows)
            for number, row in enumerate(rows, 1):
                answer = row.get("answer")
                if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(LETTERS):
                    raise DataError(f"{spec} row {number}: `answer` is {answer!r}: use a whole number from 0 to 3")
                self.sets.setdefault(str(row.get("domain") or _name(spec)), []).append(row)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Mapping[str, Any]) -> None:
        """See `Suite.encode`."""
        for domain, rows in self.sets.items():
            for i, row in enumerate(rows):
                subject = SUBJECTS.get(domain, domain)
                self.choice_prompts[f"{domain}/{i}"] = choice_prompt(row["question"], row["choices"], subject)

    def rows(self, found: Measured) -> list[dict[str, Any]]:
        """See `Suite.rows`."""
        rows = []
        for domain, of_domain in self.sets.items():
            for i, row in enumerate(of_domain):
                probabilities = found.choices[f"{domain}/{i}"]["probabilities"]
                chosen = max(range(len(LETTERS)), key=lambda letter: probabilities[letter])
                rows.append(
                    {"set": domain, "row": i, "id": row_id(row, "question", "choices"), "answer": row["answer"],
                     "chosen": chosen, "correct": chosen == row["answer"], "probability": probabilities[row["answer"]]}
                )  # fmt: skip
        return rows

    def scores(self, rows: Sequence[dict[str, Any]], retrained: Retrained | None) -> dict[str, Any]:
        """See `Suite.scores`."""
        scores: dict[str, Any] = {}
        for column, label in (("correct", "accuracy"), ("probability", "probability")):
            for domain in self.sets:
                values = [float(row[column]) for row in rows if row["set"] == domain]
                scores[f"{domain}_{label}"] = vars(mean_interval(values)).copy()
        return scores | {"n": {domain: len(of_domain) for domain, of_domain in self.sets.items()}}


def _name(spec: str) -> str:
    """Return `bio` of `cais/wmdp:wmdp-bio:test`, and a file's name without its suffixes."""
    return Path(spec).name.split(".")[0] if ":" not in spec else spec.split(":")[1].removeprefix("wmdp-")
