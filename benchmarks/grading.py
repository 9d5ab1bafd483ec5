"""Gradings per minute, with one hostile answer in every thousand: `python benchmarks/grading.py [--rounds 10]`.

Every answer is a different one, so that nothing comes from the grader's memory; a third needs symbolic mathematics.
Beside the wall clock stands what two idle cores would do by the processor time used: on a busy machine the two differ.
Writes runs/bench/grading.json.
"""

import argparse
import json
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path

from afterglow.core.grading import Grader

HOSTILE = (
    r"10^{(10^7)!}", r"\frac{1}{" * 2_000, "(" * 50_000, "9" * 1_000_000, r"\sqrt{" * 5_000 + "2" + "}" * 5_000,
    r"10^{10^{10^{10}}}", "x^{" * 300 + "y" + "}" * 300, r"\int_0^1 \prod_{i=1}^{10^9} x^i dx",
)  # fmt: skip


def answers(number: int, rng: random.Random) -> tuple[str, str]:
    """Return a response and its gold: numbers, fractions, and roots that only algebra can compare."""
    a, b = rng.randrange(2, 10**6), rng.randrange(2, 10**6)
    kinds = (
        (str(a), str(a)),
        (rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}"),
        (rf"{a}\sqrt{{2}}+{b}", rf"{b}+{a}\sqrt{{2}}"),
    )
    answer, gold = kinds[number % 3]
    return rf"<think>Some thought.</think> The answer is \boxed{{{answer}}}.", gold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="thousands of answers")
    rounds = parser.parse_args().rounds
    rng = random.Random(0)
    pairs = [answers(number, rng) for number in range(1_000 * rounds)]
    for place in range(rounds):
        pairs[1_000 * place + 500] = (rf"\boxed{{{HOSTILE[place % len(HOSTILE)]}}}", rf"\sqrt{{{place + 2}}}")
    with Grader(workers=2) as grader:
        grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")  # the start of a worker is not what is measured
        start = time.perf_counter()
        grades = grader.grade_many(pairs)
        seconds = time.perf_counter() - start
    busy = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    verdicts = Counter(grade.verdict for grade in grades)
    result = {
        "answers": len(pairs), "hostile": rounds, "seconds": round(seconds, 2),
        "per_minute": round(60 * len(pairs) / seconds),
        "processor_seconds": round(busy, 2), "per_minute_of_two_cores": round(60 * len(pairs) / (busy / 2)),
        "verdicts": dict(verdicts), "load": os.getloadavg()[0],
    }  # fmt: skip
    path = Path("runs/bench/grading.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
