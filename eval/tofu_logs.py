"""`suite: tofu_logs`: TOFU's scores from logs that its own code wrote (`eval_log_aggregated.json`), without a model.

    suite: tofu_logs    logs: unlearned/eval_log_aggregated.json    retrained: retain90/eval_log_aggregated.json

The same functions score them as score our own rows; extraction strength and membership attacks are not in such logs.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.recipe import plain
from ..core.run_folder import RunFolder, write_atomic
from .suite_base import NO_MODEL, ROWS_FILE, SCORES_FILE, Retrained
from .suite_tofu import OPTION_SETS, tofu_scores
from .unlearning_metrics import probability, probability_among, truth_ratio

LOGS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
COLUMNS = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall", "generated_text")


@dataclass(kw_only=True)
class TofuLogsConfig:
    """Which logs."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "tofu_logs."})
    logs: str = field(metadata={"help": "eval_log_aggregated.json(.gz) of the model."})
    retrained: str = field(metadata={"help": "The same of the retrained model, or `none`: no forget quality then."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap interval of model utility."})


def read_logs(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a model's logs in the form of `TofuSuite.rows`.

    Raises:
        DataError: the file is missing, is not such a log, or lacks a value; names file, log and question.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. TOFU's evaluation writes eval_log_aggregated.json.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        logs = json.load(file)
    if missing := [log for log in LOGS.values() if not isinstance(logs, dict) or log not in logs]:
        raise DataError(f"{path}: has no {missing[0]}: this is not an eval_log_aggregated.json of TOFU.")
    return [row for name, log in LOGS.items() for row in _rows(path, name, log, logs[log])]


def _rows(path: Path, name: str, log: str, columns: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for i, key in enumerate(columns.get("avg_gt_loss", {})):
        values: dict[str, Any] = {column: columns.get(column, {}).get(key) for column in COLUMNS}
        if missing := [column for column, value in values.items() if value is None]:
            raise DataError(f"{path}: {log}: question {key} has no {missing[0]}.")
        wrong, loss = values["average_perturb_loss"], values["avg_gt_loss"]
        question, generation, gold = values["generated_text"]
        yield {
            "set": name, "row": i, "id": str(question), "nll": loss,
            "probability": probability_among(loss, wrong) if name in OPTION_SETS else probability(loss),
            "truth_ratio": truth_ratio(values["avg_paraphrased_loss"], wrong),
            "rouge_l_recall": values["rougeL_recall"], "generation": generation, "gold": gold,
        }  # fmt: skip


def run(config: TofuLogsConfig, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Score the logs and return the run's folder.

    Raises:
        DataError: a file is not such a log, or the two models were asked other questions.
        RunFolderError: the folder belongs to other logs.
    """
    path, sources = Path(config.output_dir), {"logs": config.logs}
    retrained = None
    if config.retrained != NO_MODEL:
        sources["retrained"] = config.retrained
        retrained = Retrained(Path(config.retrained), read_logs(config.retrained), {})
    rows = read_logs(config.logs)
    scores = {"tofu": tofu_scores(rows, retrained, seed=config.seed)}
    if dry_run:
        print(f"{len(rows):,} questions. Nothing was written.")
        return path
    extra = {"suite": "tofu", "seed": config.seed}
    with RunFolder.open(path, "eval", plain(config), inputs={**sources}, overwrite=overwrite, extra=extra) as folder:
        write_atomic(path / ROWS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_atomic(path / SCORES_FILE, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        folder.finish(scores)
    return path
