"""Results of a study made up in memory."""

from afterglow.evidence.results import Results
from afterglow.evidence.study import Study

ABOUT = {
    "commits": ["c" * 40],
    "uncommitted_changes": False,
    "stated_before": True,
    "started": "2026-01-01T10:00:00+00:00",
    "finished": "2026-01-01T11:00:00+00:00",
    "versions": {"torch": "2.0"},
    "machine": {"cores": 2, "processor": "a processor", "gpus": []},
    "seconds": {"train a": 90.0, "eval a": 30.0},
}


def results(arms: dict[str, list[list[int]]], task: str = "t", n: int = 4) -> Results:
    """Arm -> for each seed the right samples of each problem."""
    problems, runs = [], []
    for arm, of_seeds in arms.items():
        for seed, counts in enumerate(of_seeds):
            scores = {task: {"answer_entropy": 0.5, "mean_tokens": 20.0}}
            training = {"rows": 10, "tokens": 1000, "loss_by_epoch": {"right": [0.5, 0.25]}}
            runs.append({"arm": arm, "seed": seed, "scores": scores, "training": training})
            for number, correct in enumerate(counts):
                row = {"arm": arm, "seed": seed, "task": task, "problem_id": f"p{number}", "n": n, "correct": correct}
                problems.append(row | {"truncated": 0, "ungradable": 0, "mean_tokens": 20.0})
    return Results(problems, runs, ABOUT)


def study(**changes) -> Study:
    """A study of the arm `a` against `b` and its control `c`."""
    values = {
        "title": "A against its controls", "claim": "A is better.", "source": "arXiv 0000.00000", "setup": "Small.",
        "tasks": {"t": "out of domain"}, "arms": {"a": "the method", "b": "the other", "c": "nothing"}, "task": "t",
        "metric": "pass@1", "arm": "a", "margin": 0.02, "against": {"b": "the claim", "c": "control: nothing"},
    }  # fmt: skip
    return Study(**values | changes)
