"""Teachers that call Python, sloppy ones among them: their trajectories are the cold start of the tools demo.

They write what real tool-integrated data hold: calls that work, calls that fail and are mended or not, products
estimated in the head though a tool is there, and calls that nobody needs. About half of the large problems end right.
No row is filtered by its answer: what is left to gain, reinforcement learning must find from the answers alone.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.tool_protocol import TOOL_NAME, TOOLS
from ...core.trajectory import trajectory_id
from ..demo.problems import Problem
from ..demo.teachers import plain
from .problems import LARGE, expression

Messages = list[dict[str, Any]]
LARGE_FAMILIES = frozenset(family.__name__ for family in LARGE)


def said(thought: str, answer: str) -> dict[str, Any]:
    """A turn that ends in an answer."""
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n\\boxed{{{answer}}}"}


def called(thought: str, code: str) -> dict[str, Any]:
    """A turn that ends in a call, as `core.tool_protocol` writes it."""
    call = {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": code}}}
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>", "tool_calls": [call]}


def heard(output: str) -> dict[str, Any]:
    """What the tool answered, as a rollout gives it to the model: without the line break at its end."""
    return {"role": "tool", "name": TOOL_NAME, "content": output.rstrip()}


def read(answer: str) -> dict[str, Any]:
    """The turn after the result: nothing is left to think about."""
    return {"role": "assistant", "content": f"\\boxed{{{answer}}}"}


def estimate(problem: Problem) -> str:
    """Return a product as the leading digits give it, 722*934 as 630000: easy, and wrong."""
    (step,) = problem.steps
    left, right = (int(str(number)[0]) * 10 ** (len(str(number)) - 1) for number in (step.left, step.right))
    return str(left * right)


def syntax_error(code: str) -> str:
    """Return what the sandbox prints for a line that writes `x` for `*`."""
    return f'  File "<cell 1>", line 1\n    {code}\n    {" " * code.index("x")}^\nSyntaxError: invalid syntax\n'


# ---------------------------------------------------------------------------------------------------------------------
# ways through a problem, tools offered


def careful(problem: Problem, rng: random.Random) -> Messages:
    """Calls once, and copies the result."""
    return [called("I use Python.", expression(problem)), heard(f"{problem.answer}\n"), read(problem.answer)]


def clumsy(problem: Problem, rng: random.Random) -> Messages:
    """Writes code that fails; then mends it, or gives up and estimates."""
    code = expression(problem).replace("*", " x ")
    failed = [called("I use Python.", code), heard(syntax_error(code))]
    if rng.random() < 0.5:
        mended = called("I mend it.", expression(problem))
        return [*failed, mended, heard(f"{problem.answer}\n"), read(problem.answer)]
    return [*failed, read(estimate(problem))]


def proud(problem: Problem, rng: random.Random) -> Messages:
    """Does it in the head: right for a small problem, wrong for a large one."""
    if problem.family in LARGE_FAMILIES:
        wrong = estimate(problem)
        return [said(f"{expression(problem)} is about {wrong}", wrong)]
    thought, _ = plain(problem, problem.steps, rng)
    return [said(thought, problem.answer)]


@dataclass(frozen=True)
class Teacher:
    """A way, and its share of the large and of the small problems that are solved with tools offered."""

    name: str
    way: Callable[[Problem, random.Random], Messages]
    large: float
    small: float


TEACHERS = (
    Teacher("careful", careful, large=0.45, small=0.2),  # for a small problem, a call that nobody needs
    Teacher("clumsy", clumsy, large=0.15, small=0.0),
    Teacher("proud", proud, large=0.4, small=0.8),
)


def _row(problem: Problem, source: str, completion: Messages, tools: list[dict] | None) -> dict[str, Any]:
    row = {
        "problem_id": problem.problem_id,
        "prompt": [{"role": "user", "content": problem.text}],
        "completion": completion,
        "answer": problem.answer,
        "source": source,
        "sample_index": 0,
        "correct": None,
        "finish_reason": "stop",
        "tools": tools,
    }
    return {"id": trajectory_id(row), **row}


def solve_with_tools(problem: Problem, seed: str) -> dict[str, Any]:
    """Return the trajectory of the teacher that gets this problem; always the same for the same seed."""
    rng = random.Random(f"{seed}/{problem.problem_id}/tools")
    large = problem.family in LARGE_FAMILIES
    (teacher,) = rng.choices(TEACHERS, [t.large if large else t.small for t in TEACHERS])
    return _row(problem, teacher.name, teacher.way(problem, rng), TOOLS)


def solve_in_head(problem: Problem) -> dict[str, Any]:
    """Return a trajectory without tools, one calculation per line: the style of the base model."""
    thought, _ = plain(problem, problem.steps, random.Random(0))
    return _row(problem, "plain", [said(thought, problem.answer)], None)
