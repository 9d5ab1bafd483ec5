r"""Is this final answer right?

    with Grader(kind="math") as grader:
        grader.grade(r"... so the answer is \boxed{\frac12}.", gold="0.5").correct   # True

A response is cut to what follows its think block, the final answer is found (`answer_extraction`), compared exactly
(`answer_comparison`: fractions, no float), and only then symbolically, by math-verify in worker processes
(`grading_worker`) with a hard wall-clock limit. Nothing here touches signals, so any thread may grade.

Which ``extract`` a data set needs:

* ``boxed`` (default): prompts that ask for ``\boxed{}``: MATH-500, AIME, AMC, OlympiadBench, Minerva; also R1-style
  responses with the box inside ``<answer>``.
* ``marked``: bare ``<answer>11/24</answer>`` tags of RL prompts, GSM8K's closing ``#### 18``, "The answer is 18".
* ``last``: mixed sources, base models and fine-tuned GPT-3 on GSM8K, which end on a plain ``A: 18``.

Measured against the labels of the sources: 99.95% of 8,000 GSM8K responses of eight teachers (``last``), 99.8% of
3,500 AIME24 and AMC23 samples of an RL checkpoint (``marked``); the rest are errors of those labels (0.7 for 70, the
order of a set, ``10.``) or sums left standing (``49+216`` for 265), which count as right here.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .answer_comparison import (
    MAX_ANSWER_CHARS,
    Number,
    compare_exactly,
    is_exact,
    normalise,
    parse_number,
    readings,
    right_side,
    same_form,
    split_unit,
)
from .answer_extraction import Extract, after_think, choice_letter, find_answer, last_choice
from .errors import RecipeError
from .grading_pool import WorkerPool

Kind = Literal["math", "choice", "numeric"]

_CACHE_ENTRIES = 200_000


@dataclass(frozen=True)
class Grade:
    """Verdict on one response.

    Attributes:
        verdict: ``correct``, ``wrong``, or ``not_gradable`` (no verdict: truncated, no answer, timed out, bad gold).
        reason: Short and countable, as ``exact number``, ``math-verify (answer phrase)``, ``no boxed answer``.
        extracted: The final answer as it stood in the response; None if there was none.
    """

    verdict: Literal["correct", "wrong", "not_gradable"]
    reason: str
    extracted: str | None = None

    @property
    def correct(self) -> bool | None:
        """True, False, or None for not gradable: the ``correct`` column of a trajectory."""
        return {"correct": True, "wrong": False, "not_gradable": None}[self.verdict]


class Grader:
    r"""Grades responses of one task; close it, or use it in a ``with`` statement.

    Args:
        kind: ``math``: exact, then symbolic equality. ``choice``: one letter A to J. ``numeric``: a number within
            tolerance, for physics-like answers.
        extract: Where the final answer may stand: ``boxed``, ``marked`` or ``last`` (see the module's docstring).
            For ``choice``, ``last`` accepts the last stand-alone letter.
        workers: Most worker processes at a time. They start when the first symbolic answer needs one.
        timeout: Wall-clock seconds for one symbolic comparison; its worker is then killed and replaced.
        memory_mb: Address space of a worker in MiB.
        rel_tol: Largest distance to gold, relative to gold (``numeric`` only).
        abs_tol: Largest distance to gold; the larger of both tolerances counts (``numeric`` only).

    Raises:
        RecipeError: An option has a value that does not exist.
    """

    def __init__(
        self,
        kind: Kind = "math",
        *,
        extract: Extract = "boxed",
        workers: int = 2,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        rel_tol: float = 1e-2,
        abs_tol: float = 0.0,
    ):
        for key, value, known in (
            ("kind", kind, ("math", "choice", "numeric")),
            ("extract", extract, ("boxed", "marked", "last")),
        ):
            if value not in known:
                raise RecipeError(f"grading: `{key}` is {value!r}; use one of {', '.join(known)}.")
        if workers < 1 or timeout <= 0 or rel_tol < 0 or abs_tol < 0:
            raise RecipeError("grading: `workers` and `timeout` must be positive, tolerances not negative.")
        self.kind: Kind = kind
        self.extract: Extract = extract
        self.workers = workers
        self._rel_tol, self._abs_tol = Fraction(rel_tol), Fraction(abs_tol)
        self._pool = WorkerPool(workers, timeout, memory_mb)
        self._verdicts: dict[tuple[str, str], tuple[bool | None, str]] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. Also happens when the grader is collected and when the parent dies."""
        self._pool.close()

    def grade(self, response: str | None, gold: object) -> Grade:
        r"""Grade one response; callable from any thread.

        Args:
            response: What the model wrote, think block included.
            gold: Right answer: text, a number, or a list of texts (several answers, all needed).

        Raises:
            MissingDependencyError: math-verify cannot be imported in a worker.
        """
        if not response or not response.strip():
            return Grade("not_gradable", "empty response")
        text = after_think(response)
        if text is None:
            return Grade("not_gradable", "truncated think block")
        answer, marker = find_answer(text, self.extract)
        if self.kind == "choice" and self.extract == "last" and marker in ("last", "last number"):
            answer, marker = last_choice(text), "last letter"
        if answer is None:
            return Grade("not_gradable", "no boxed answer" if self.extract == "boxed" else "no answer found")
        equal, reason = self._verdict(answer, gold_text(gold))
        answer = answer[:MAX_ANSWER_CHARS]
        if equal is None:
            return Grade("not_gradable", reason, answer)
        reason = reason if marker == "boxed" else f"{reason} ({marker})"
        return Grade("correct" if equal else "wrong", reason, answer)

    def grade_many(
        self,
        pairs: Iterable[tuple[str | None, object]],
        on_done: Callable[[int, Grade], None] | None = None,
    ) -> list[Grade]:
        """Grade (response, gold) pairs on all workers; the grades come back in order.

        Args:
            pairs: Responses with their gold answers.
            on_done: Called in this thread with the index and grade of each pair as it is done, in any order.
        """
        pairs = list(pairs)
        grades: dict[int, Grade] = {}
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="grading")
        try:
            futures = {threads.submit(self.grade, *pair): index for index, pair in enumerate(pairs)}
            for future in as_completed(futures):
                index = futures[future]
                grades[index] = future.result()
                if on_done:
                    on_done(index, grades[index])
        finally:
            threads.shutdown(cancel_futures=True)
        return [grades[index] for index in range(len(pairs))]

    def check_gold(self, gold: object) -> str | None:
        """Why a gold answer cannot be graded against, or None if it can: to be asked before anything expensive."""
        text = normalise(gold_text(gold))
        if not text:
            return "gold is empty"
        if len(text) > MAX_ANSWER_CHARS:
            return f"gold has more than {MAX_ANSWER_CHARS} characters"
        if self.kind == "choice":
            return None if choice_letter(text) else "gold is not one of the letters A to J"
        if self.kind == "numeric":
            return None if self._value(text)[0] is not None else "gold is not a number"
        if is_exact(text):
            return None
        parsed, problem = self._pool.ask("parses", split_unit(text)[0])
        return None if parsed else f"gold cannot be parsed{f' ({problem})' if problem else ''}"

    def _verdict(self, answer: str, gold: str) -> tuple[bool | None, str]:
        """(equal, reason), remembered: samples of one problem repeat the same few answers."""
        key = (answer, gold)
        verdict = self._verdicts.get(key)
        if verdict is None:
            compare = {"math": self._compare_math, "choice": self._compare_choice, "numeric": self._compare_numeric}
            verdict = _check_size(answer, gold) or compare[self.kind](normalise(answer), normalise(gold))
            if len(self._verdicts) >= _CACHE_ENTRIES:
                self._verdicts.clear()
            self._verdicts[key] = verdict
        return verdict

    def _compare_math(self, answer: str, gold: str) -> tuple[bool | None, str]:
        if not answer or not gold:
            return None, "empty answer" if gold else "gold is empty"
        gold, answer = same_form(gold, answer)
        if exact := compare_exactly(gold, answer):
            return exact
        result, problem = self._pool.ask("equal", split_unit(gold)[0], split_unit(answer)[0])
        return (result, "math-verify") if isinstance(result, bool) else (None, problem or str(result))

    def _compare_choice(self, answer: str, gold: str) -> tuple[bool | None, str]:
        gold_letter, letter = choice_letter(gold), choice_letter(answer)
        if gold_letter is None:
            return None, "gold is not one of the letters A to J"
        return (None, "no single letter") if letter is None else (letter == gold_letter, "letter")

    def _compare_numeric(self, answer: str, gold: str) -> tuple[bool | None, str]:
        target, problem = self._value(gold)
        if target is None:
            return None, f"gold is not a number{f' ({problem})' if problem else ''}"
        value, problem = self._value(answer)
        if value is None:
            return None, problem or "answer is not a number"
        close = (abs(a - g) <= max(self._rel_tol * abs(g), self._abs_tol) for g, a in readings(target, value))
        return any(close), "tolerance"

    def _value(self, text: str) -> tuple[Number | None, str | None]:
        """(value, problem) of a number or of an expression that stands for one."""
        text = right_side(text)
        if number := parse_number(text):
            return number, None
        value, problem = self._pool.ask("value", split_unit(text)[0]) if text else (None, None)
        return (None if value is None else Number(Fraction(value), False, "", -1)), problem


def gold_text(gold: object) -> str:
    """A gold answer as text: numbers as written, a list of answers joined by commas, anything else empty."""
    if isinstance(gold, str):
        return gold
    if isinstance(gold, (list, tuple)):
        return ", ".join(gold_text(item) for item in gold)
    number = isinstance(gold, (int, float)) and not isinstance(gold, bool) and gold == gold  # an empty cell is NaN
    return str(gold) if number else ""


def _check_size(answer: str, gold: str) -> tuple[None, str] | None:
    if len(gold) > MAX_ANSWER_CHARS:
        return None, "gold is too long"
    return (None, "answer is too long") if len(answer) > MAX_ANSWER_CHARS else None
