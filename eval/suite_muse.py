"""`suite: muse`: news or books that were learned word for word (arXiv 2407.06460).

Verbatim memorisation of the forget set, knowledge of it and of the retain set by few-shot questions, privacy leakage by
Min-K% against the retrained model. Prompts are plain text without a chat template, as the benchmark's models are base
models; answers are greedy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import RecipeError
from .suite_base import BaseSuite, Measured, Retrained, RetrainedConfig, attack_scores, membership_of
from .uncertainty import mean_interval
from .unlearning_data import SPEC_HELP, Ask, encode_text, read_set, row_id, text_of
from .unlearning_metrics import knowmem_answer, rouge_l

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "muse-bench/MUSE-News"
QUESTION_SETS = ("knowmem_forget", "knowmem_retain")
VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32


@dataclass(kw_only=True)
class MuseConfig(RetrainedConfig):
    """Which sets. Columns: prompt and gt (verbmem), question and answer (knowmem), text (members, holdout)."""

    verbmem: str | None = field(
        default=f"{HUB}:verbmem:forget",
        metadata={"help": f"Beginnings of forget texts and how they go on. {SPEC_HELP}"},
    )
    knowmem_forget: str | None = field(
        default=f"{HUB}:knowmem:forget_qa", metadata={"help": "Questions about the forget set."}
    )
    knowmem_forget_icl: str | None = field(
        default=f"{HUB}:knowmem:forget_qa_icl", metadata={"help": "Examples put before each of them."}
    )
    knowmem_retain: str | None = field(
        default=f"{HUB}:knowmem:retain_qa", metadata={"help": "Questions about the retain set: utility."}
    )
    knowmem_retain_icl: str | None = field(
        default=f"{HUB}:knowmem:retain_qa_icl", metadata={"help": "Examples put before each of them."}
    )
    members: str | None = field(default=f"{HUB}:privleak:forget", metadata={"help": "Forget texts, for PrivLeak."})
    holdout: str | None = field(
        default=f"{HUB}:privleak:holdout", metadata={"help": "Texts that no model saw, for PrivLeak."}
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of a text that are scored."})

    def __post_init__(self):
        super().__post_init__()
        if (self.members is None) != (self.holdout is None):
            raise RecipeError("members and holdout need each other: name both, or set both to null")
        if not any((self.verbmem, self.knowmem_forget, self.members)):
            raise RecipeError("nothing to evaluate: name verbmem, knowmem_forget, or members and holdout")


class MuseSuite(BaseSuite):
    """See the module."""

    name = "muse"
    config: MuseConfig

    def sources(self) -> dict[str, str]:
        """See `Suite.sources`."""
        names = ("verbmem", *(f"{name}{end}" for name in QUESTION_SETS for end in ("", "_icl")), "members", "holdout")
        return {name: spec for name in names if (spec := getattr(self.config, name)) is not None}

    def read(self) -> None:
        """See `Suite.read`."""
        needs = {"verbmem": ("prompt", "gt"), "members": ("text",), "holdout": ("text",)}
        for name, spec in self.sources().items():
            limit = None if name.endswith("_icl") else self.config.max_rows
            self.sets[name] = read_set(spec, name, needs.get(name, ("question", "answer")), self.config.columns, limit)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Mapping[str, Any]) -> None:
        """See `Suite.encode`; cuts `gt` to the tokens that are compared."""

        def ask(key: str, prompt: str, max_tokens: int) -> None:
            self.asks.append(Ask(key, tuple(tokenizer(prompt, verbose=False)["input_ids"]), max_tokens))

        for i, row in enumerate(self.sets.get("verbmem", [])):
            ask(f"verbmem/{i}", row["prompt"], VERBMEM_TOKENS)
            ids = tokenizer(row["gt"], add_special_tokens=False, verbose=False)["input_ids"][:VERBMEM_TOKENS]
            row["gold"] = str(tokenizer.decode(ids, skip_special_tokens=True))
        for name in QUESTION_SETS:
            shots = "".join(_shot(row) + text_of(row["answer"]) + "\n\n" for row in self.sets.get(f"{name}_icl", []))
            for i, row in enumerate(self.sets.get(name, [])):
                ask(f"{name}/{i}", shots + _shot(row), KNOWMEM_TOKENS)
        for name in ("members", "holdout"):
            for i, row in enumerate(self.sets.get(name, [])):
                self.texts.append(encode_text(tokenizer, f"{name}/{i}", row["text"], self.config.max_length))
        self.attacked = self.texts

    def rows(self, found: Measured) -> list[dict[str, Any]]:
        """See `Suite.rows`."""
        rows = []
        for name in ("verbmem", *QUESTION_SETS):
            for i, row in enumerate(self.sets.get(name, [])):
                said, gold = found.answers[f"{name}/{i}"], row["gold"] if name == "verbmem" else text_of(row["answer"])
                text = said["text"] if name == "verbmem" else knowmem_answer(said["text"])
                recall, f1 = rouge_l(text, gold, stemmer=self.config.compat_open_unlearning)
                rows.append(
                    {"set": name, "row": i, "id": row_id(row, "prompt", "question", "answer", "gt"),
                     "rouge_l_recall": recall, "rouge_l_f1": f1, "generation": text, "gold": gold}
                )  # fmt: skip
        for name in ("members", "holdout"):
            for i, row in enumerate(self.sets.get(name, [])):
                key = f"{name}/{i}"
                of_text = membership_of(found.texts[key], found.reference.get(key, {}), found.gradients.get(key, {}))
                rows.append({"set": name, "row": i, "id": row_id(row, "text"), "membership": of_text})
        return rows

    def scores(self, rows: Sequence[dict[str, Any]], retrained: Retrained | None) -> dict[str, Any]:
        """See `Suite.scores`."""
        scores: dict[str, Any] = {}
        for name in ("knowmem_retain", "knowmem_forget", "verbmem"):
            if values := [row["rouge_l_f1"] for row in rows if row["set"] == name]:
                label = "verbmem_forget" if name == "verbmem" else name
                scores[label] = vars(mean_interval(values)).copy()
        if "members" in self.sets:
            scores |= attack_scores(rows, "members", self.config.attacks, retrained)
        return scores | {"n": {name: len(of_set) for name, of_set in self.sets.items()}}


def _shot(row: Mapping[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer: "
