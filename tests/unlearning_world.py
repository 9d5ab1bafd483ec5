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


def curve_rows(name: str, curves: list, steps=(0, 1, 3)) -> list[dict]:
    """Rows of curves.jsonl of an attack on forget rows: one curve per seed."""
    return [
        {"arm": f"{name}/forget/full/{seed}", "step": step, "probability": value}
        for seed, curve in enumerate(curves)
        for step, value in zip(steps, curve, strict=True)
    ]


def audit_row(path, order, seed, step, answer, paraphrase, skill, probes=(0.0, 0.0)) -> dict:
    """One row of an audit."""
    return {
        "path": path, "order": order, "method": "npo", "seed": seed, "step": step, "answer": answer,
        "paraphrase": paraphrase, "alternative": None, "forget": [[answer, paraphrase]], "stages": {"skill": skill},
        "probes": list(probes),
    }  # fmt: skip


def two_paths() -> list[dict]:
    """Rows of an audit of two paths: the one forgets four times as fast, and loses some skill."""
    rows = []
    for seed in (0, 1):
        for step in (0, 5, 10):
            answer, paraphrase = -1 - (0.4 + 0.01 * seed) * step, -2 - 0.3 * step
            rows.append(audit_row("early", ["forget", "skill"], seed, step, answer, paraphrase, -1 - 0.01 * step))
            answer, probes = -1 - (0.1 + 0.01 * seed) * step, (0.1 * step, 0.0)
            rows.append(audit_row("late", ["skill", "forget"], seed, step, answer, -2.0, -1.0, probes))
    return rows
