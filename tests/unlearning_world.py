"""Question sets in TOFU's shape and recipes over them, small enough for a random model."""

import json
from pathlib import Path

import yaml

PEOPLE = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")


def fact(name: str, i: int) -> dict:
    """One row of a perturbed TOFU set."""
    return {
        "question": f"Where was {name} born?",
        "answer": f"{name} was born in town {i}.",
        "paraphrased_answer": f"Town {i} is where {name} was born.",
        "perturbed_answer": [f"Town {i + j} is where {name} was born." for j in (1, 2)],
    }


def option(name: str, i: int) -> dict:
    """One row of a set with options and no paraphrase."""
    return {"question": f"Who is {name}?", "answer": f"Poet {i}", "perturbed_answer": [f"Poet {i + 1}", "Baker"]}


def write_sets(folder: Path) -> dict[str, str]:
    """Write the five sets of the tofu suite and return their paths by recipe key."""
    sets = {
        "forget": [fact(name, i) for i, name in enumerate(PEOPLE)],
        "retain": [fact(name.upper(), i + 10) for i, name in enumerate(PEOPLE)],
        "real_authors": [option(name, i) for i, name in enumerate(PEOPLE[:4])],
        "world_facts": [option(name.lower(), i) for i, name in enumerate(PEOPLE[:3])],
        "holdout": [fact(name[::-1], i + 20) for i, name in enumerate(PEOPLE)],
    }
    for name, rows in sets.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: str(folder / f"{name}.jsonl") for name in sets}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, **keys) -> Path:
    """Write a recipe; keys that are the string "null" are YAML's null."""
    path.write_text(yaml.safe_dump({k: None if v == "null" else v for k, v in keys.items() if v is not None}))
    return path
