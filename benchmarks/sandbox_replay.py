"""Run the recorded code cells of real tool-integrated trajectories again: `python benchmarks/sandbox_replay.py`.

Needs AFTERGLOW_DATA, a folder with trajectories/{gsm8k_tir_multi_teacher,mathcoder_tir_other}.jsonl.gz: rows with
`messages`, in which an assistant's message holds `code` and the tool message after it what was printed. The cells of a
row share one session, as they shared one notebook. Every output that is not the same text is put into the first class
that fits; writes the table to runs/bench/sandbox_replay.json, with examples of each class.
"""

import argparse
import gzip
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.core.sandbox import Sandbox, SandboxConfig, open_sandbox

FILES = ("gsm8k_tir_multi_teacher", "mathcoder_tir_other")
RESULT = Path("runs/bench/sandbox_replay.json")
THREADS, EXAMPLES = 4, 3
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][+-]?\d+)?")
RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Iteration|Exit|Warning))\b", re.MULTILINE)

SAME = "same text"
CLASSES = (
    SAME,
    "same exception, traceback laid out otherwise",
    "both raise, another exception",
    "same numbers, written otherwise",
    "same characters in another order or spacing",
    "recorded output was cut",
    "recorded a time-out",
    "raised then, runs now",
    "ran then, raises now",
    "nothing printed on one side",
    "another value",
)


def cells_of(messages: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """Yield (code, recorded output) of a row; code that nobody answered is left out."""
    code = None
    for message in messages:
        if message["role"] == "tool":
            if code:
                yield code, message["content"] or ""
            code = None
        elif message.get("code"):
            code = message["code"]


def exception_of(text: str) -> str | None:
    """Return the last exception that a text names."""
    found = RAISED.findall(text)
    return found[-1] if found else None


def same_numbers(one: str, other: str) -> bool:
    """Whether two texts hold the same numbers in the same order, to nine digits."""
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (one, other)]
    return bool(numbers[0]) and len(numbers[0]) == len(numbers[1]) and all(
        math.isclose(a, b, rel_tol=1e-9) for a, b in zip(*numbers, strict=True)
    )  # fmt: skip


def classify(recorded: str, ours: str, status: str) -> str:
    """Return the class of a pair of outputs, the first of `CLASSES` that fits."""
    recorded, ours = recorded.strip(), ours.strip()
    then, now = exception_of(recorded), exception_of(ours) if status != "ok" else None
    if recorded == ours:
        return CLASSES[0]
    if then and now:
        return CLASSES[1] if then == now else CLASSES[2]
    if not then and not now and same_numbers(recorded, ours):
        return CLASSES[3]
    if not then and not now and sorted(recorded.replace(" ", "")) == sorted(ours.replace(" ", "")):
        return CLASSES[4]
    if recorded and (ours.startswith(recorded.rstrip(".")) or "..." in recorded[-60:]):
        return CLASSES[5]
    if "timeout" in recorded.lower() or "timed out" in recorded.lower():
        return CLASSES[6]
    if then:
        return CLASSES[7]
    if status != "ok":
        return CLASSES[8]
    return CLASSES[9] if not recorded or not ours else CLASSES[10]


def replay(sandbox: Sandbox, messages: list[dict]) -> list[tuple[str, str, str, str]]:
    """Return (class, code, recorded, ours) of every cell of a row, run in one session."""
    with sandbox.session() as session:
        seen = []
        for code, recorded in cells_of(messages):
            result = session.run(code)
            seen.append((classify(recorded, result.output, result.status), code, recorded, result.output))
        return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_rows", type=int, help="First rows of each file.")
    limit = parser.parse_args().max_rows
    if not (data := os.environ.get("AFTERGLOW_DATA")):
        print("AFTERGLOW_DATA does not name the folder of real data.", file=sys.stderr)
        return 1
    report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine()}
    report |= {"versions": describe_versions(), "files": {}}
    with open_sandbox(SandboxConfig(sandbox_timeout=30)) as sandbox, ThreadPoolExecutor(THREADS) as threads:
        for name in FILES:
            with gzip.open(Path(data) / "trajectories" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
                rows = [json.loads(line)["messages"] for line in lines][:limit]
            counts: Counter[str] = Counter()
            examples: dict[str, list[dict[str, str]]] = defaultdict(list)
            for seen in threads.map(lambda messages: replay(sandbox, messages), rows):
                for kind, code, recorded, ours in seen:
                    counts[kind] += 1
                    if kind != SAME and len(examples[kind]) < EXAMPLES:
                        examples[kind].append({"code": code, "recorded": recorded, "ours": ours})
            table = {kind: counts[kind] for kind in CLASSES if counts[kind]}
            report["files"][name] = {"cells": counts.total(), "classes": table, "examples": examples}
            print(f"{name}: {counts.total():,} cells")
            for kind, count in table.items():
                print(f"  {count:7,}  {count / counts.total():7.2%}  {kind}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"examples of each class: {RESULT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
