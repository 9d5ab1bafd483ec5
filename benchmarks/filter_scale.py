"""The text-only filter chain at scale: `python benchmarks/filter_scale.py [--rows 100000 1000000] [--plain 100000]`.

Makes synthetic trajectories (format faults, over-long rows, copies of benchmark items, exact and near duplicates, each
in a known share) and runs format -> length -> decontamination -> deduplication over them. Beside it the plain way to do
the same job: load_dataset, map, filter, and an in-memory MinHashLSH. Each run is a process of its own; its peak is
sampled: `anonymous` is what it holds, `resident` also counts pages of memory-mapped files, which the kernel takes back
when it needs them. Writes runs/bench/filter_scale.json. `--quick` runs 2,000 and 8,000 rows of both.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

PER_PROBLEM = 4
BENCHMARK_ITEMS = 200
BLOCK = 10_000
STEPS = """\
steps:
  - format
  - length: {{min_words: 10, max_words: 150}}
  - decontamination: {{benchmarks: ['{items}']}}
  - deduplication: {{within: problem, threshold: 0.8}}
"""


# ---------------------------------------------------------------------------------------------------------------------
# data


def make(folder: Path, rows: int) -> None:
    """Write rows.jsonl and items.jsonl: about 100 words a row, drawn from 20,000."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{n}" for n in range(20_000)])
    items = [" ".join(words) for words in vocabulary[rng.integers(0, 20_000, (BENCHMARK_ITEMS, 30))]]
    (folder / "items.jsonl").write_text("".join(json.dumps({"problem": item}) + "\n" for item in items))
    with open(folder / "rows.jsonl", "w") as out:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            words = vocabulary[rng.integers(0, 20_000, (count, 100))]
            prompts = vocabulary[rng.integers(0, 20_000, (count // PER_PROBLEM + 1, 25))]
            kinds = rng.random(count)
            for row in range(count):
                # the first solution of a problem is the one that the copies of it copy
                first = row - row % PER_PROBLEM
                said, end = words[row], "stop"
                if row != first and kinds[row] < 0.04:
                    said = words[first]
                elif row != first and kinds[row] < 0.10:
                    said = words[first].copy()
                    said[40] = "changed"
                elif kinds[row] < 0.12:
                    said = said[:5]
                elif kinds[row] < 0.13:
                    end = "length"
                problem = (start + row) // PER_PROBLEM
                prompt = " ".join(prompts[row // PER_PROBLEM])
                if problem % 100 == 0:
                    prompt = items[problem // 100 % BENCHMARK_ITEMS] + " " + prompt
                line = {
                    "id": f"row-{start + row}", "problem_id": f"p{problem}", "prompt": prompt,
                    "completion": " ".join(said), "source": f"teacher-{row % PER_PROBLEM}", "finish_reason": end,
                }  # fmt: skip
                out.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# the two ways


def run_chain(folder: Path) -> dict:
    from afterglow.core.recipe import read_recipe
    from afterglow.data_filters.chain import run

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"data: {folder / 'rows.jsonl'}\noutput_dir: {folder / 'run'}\n" + STEPS.format(items=folder / "items.jsonl")
    )
    run(read_recipe(recipe))
    steps = json.loads((folder / "run" / "steps.json").read_text())
    seconds = {
        path.parent.name: json.loads(path.read_text())["seconds"]
        for path in sorted((folder / "run" / "steps").glob("*/report.json"))
    }
    return {"kept": steps["kept"], "seconds_of_steps": seconds}


def run_plain(folder: Path) -> dict:
    """Do what a script does that a person writes for one data set."""
    from datasets import load_dataset
    from datasketch import MinHash, MinHashLSH

    def grams(words: list[str], n: int) -> set[str]:
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    items = [json.loads(line)["problem"] for line in (folder / "items.jsonl").read_text().splitlines()]
    banned = set().union(*(grams(item.lower().split(), 8) for item in items))
    table = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))
    table = table.filter(lambda row: row["finish_reason"] == "stop")
    table = table.filter(lambda row: 10 <= len(row["completion"].split()) <= 150)
    table = table.filter(lambda row: not grams(row["prompt"].lower().split(), 8) & banned)
    lsh, seen = MinHashLSH(threshold=0.8, num_perm=128), set()

    def is_new(row: dict) -> bool:
        key = (row["problem_id"], row["completion"].lower())
        if key in seen:
            return False
        seen.add(key)
        signature = MinHash(num_perm=128)
        signature.update_batch([gram.encode() for gram in grams(key[1].split(), 5)])
        if any(name.startswith(f"{row['problem_id']}/") for name in lsh.query(signature)):
            return False
        lsh.insert(f"{row['problem_id']}/{row['id']}", signature)
        return True

    table = table.filter(is_new)
    table.to_json(folder / "plain.jsonl")
    return {"kept": len(table)}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


class Peak:
    """Samples this process's memory until it ends."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(status["RssAnon"].split()[0]))
            self.resident = max(self.resident, int(status["VmHWM"].split()[0]))
            time.sleep(0.05)


def child(way: str, folder: Path) -> None:
    peak, start, busy = Peak(), time.perf_counter(), time.process_time()
    found = {"chain": run_chain, "plain": run_plain}[way](folder)
    seconds, used = time.perf_counter() - start, time.process_time() - busy
    found |= {
        "seconds": round(seconds, 1), "processor_seconds": round(used, 1),
        "anonymous_mb": round(peak.anonymous / 1024), "resident_mb": round(peak.resident / 1024),
    }  # fmt: skip
    (folder / f"{way}.json").write_text(json.dumps(found))


def measure(way: str, folder: Path, rows: int) -> dict:
    for leftover in ("run", "cache"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((folder / f"{way}.json").read_text())
    rate = round(rows / found["processor_seconds"])
    return {"way": way, "rows": rows, **found, "rows_per_processor_second": rate, "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--plain", type=int, nargs="*", default=[100_000], help="sizes for the plain way")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", choices=("chain", "plain"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return
    sizes, plain = ([2_000, 8_000], [2_000, 8_000]) if options.quick else (options.rows, options.plain)
    results = []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            make(Path(name), rows)
            for way in ("chain", *(["plain"] if rows in plain else [])):
                results.append(measure(way, Path(name), rows))
                print(json.dumps(results[-1]), flush=True)
    path = Path("runs/bench/filter_scale.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
