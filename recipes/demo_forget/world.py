"""Make the world of the unlearning demo: facts in TOFU's shape, a tokenizer and an untrained model, from one seed.

    python -m afterglow.recipes.demo_forget.world --output_dir runs/demo-forget/world --seed 0

Files have TOFU's names and columns (arXiv 2401.06121), so that what reads one reads the other:

full               all that the first model learns: people, famous people, countries
forget10           a tenth of the people
retain90           all the rest: what the retrained control learns
*_perturbed        questions with a paraphrased and with wrong answers, for the evaluation
real_authors       here: famous people, as made up as the others, whom every model learns
world_facts        here: facts about countries, which every model learns
holdout10          people whom no model ever meets
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..demo.tokenizer import init_model, train_tokenizer
from ..made_folder import make_folder, run_command, write_jsonl
from .facts import COUNTRY, PERSON, Fact, country_names, facts_of, full_names

# ChatML without a system prompt and without a place for reasoning: the completion is the answer and nothing else.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRONG_OF_PEOPLE, WRONG_OF_KNOWLEDGE = 5, 3  # wrong answers a question: as many as TOFU has


@dataclass(frozen=True)
class ForgetWorldConfig:
    """Size of the world. A tenth of the people is forgotten, and as many are never met."""

    seed: int = field(default=0, metadata={"help": "Decides every file."})
    people: int = field(default=50, metadata={"help": "People whom the first model learns; a multiple of 10."})
    famous: int = field(default=6, metadata={"help": "Famous people, whom every model learns."})
    countries: int = field(default=16, metadata={"help": "Countries, which every model learns."})
    vocab_size: int = field(default=640, metadata={"help": "Largest size of the tokenizer."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model; a multiple of 64."})
    layers: int = field(default=2, metadata={"help": "Layers of the model."})


def make_facts(config: ForgetWorldConfig) -> dict[str, list[Fact]]:
    """Draw the facts: forget, retain, holdout (people), famous (people), countries."""
    seed, tenth = str(config.seed), config.people // 10
    names = full_names(config.people + tenth + config.famous, seed)
    cuts = {"forget": tenth, "retain": config.people - tenth, "holdout": tenth, "famous": config.famous}
    facts, start = {}, 0
    for name, count in cuts.items():
        facts[name] = facts_of(names[start : start + count], PERSON, seed)
        start += count
    return facts | {"countries": facts_of(country_names(config.countries, seed), COUNTRY, seed)}


def learned(*groups: Iterable[Fact]) -> list[dict]:
    """Return the rows that a model learns."""
    return [row for facts in groups for fact in facts for row in fact.rows()]


def write_world(folder: Path, config: ForgetWorldConfig) -> None:
    """Write all files of the world into an existing folder."""
    facts, seed = make_facts(config), str(config.seed)
    forget, retain = learned(facts["forget"]), learned(facts["retain"], facts["famous"], facts["countries"])
    few = facts["retain"][::9]  # as many questions as of the forgotten people, one of each attribute in turn
    files = {"full": forget + retain, "forget10": forget, "retain90": retain, "holdout10": learned(facts["holdout"])}
    for name, of in (("forget10", facts["forget"]), ("retain", few), ("holdout10", facts["holdout"])):
        files[f"{name}_perturbed"] = [fact.perturbed_row(WRONG_OF_PEOPLE, seed) for fact in of]
    for name, of in (("real_authors", facts["famous"]), ("world_facts", facts["countries"])):
        files[f"{name}_perturbed"] = [fact.option_row(WRONG_OF_KNOWLEDGE, seed) for fact in of]
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)

    # All names, those of people whom nobody meets too: a name is made of as many tokens whether it is known or not.
    texts = [f"user\n{row['question']}\nassistant\n{row['answer']}" for name in files for row in files[name]]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = init_model(tokenizer, config.seed, config.hidden_size, config.layers)
    tokenizer.save_pretrained(folder / "init")
    model.save_pretrained(folder / "init")


def make_world(output_dir: str | Path, config: ForgetWorldConfig, overwrite: bool = False) -> Path:
    """Make the world in `output_dir`, or leave it as it is where it was made with the same configuration.

    Raises:
        RunFolderError: the folder holds something else.
    """
    return make_folder(output_dir, config, write_world, overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_command("afterglow.recipes.demo_forget.world", __doc__, ForgetWorldConfig, make_world, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
