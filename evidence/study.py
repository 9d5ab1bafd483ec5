"""A study: what is claimed, what is measured, against which controls, and what decides. Stated before the first run.

It is the key `study` of a pipeline's recipe:

    study:
      title: GLOW against its controls
      claim: ...                          # in the source's terms
      source: arXiv 2601.04992, abstract
      setup: ...
      tasks: {problems_unseen: out of domain}
      arms: {glow: ..., positives: ...}   # labels of the pipeline's evaluations, and what each is
      task: problems_unseen               # the primary metric is `metric` of `arm` on this task,
      metric: pass@1
      arm: glow
      margin: 0.02                        # the smallest difference that would matter
      against: {positives: what the claim compares with, half: "control: half the learning rate"}

The rule. Every difference is paired: `arm` minus another arm, seed by seed and problem by problem. Its interval is the
hull of two 95% intervals, Student's t over the seeds (other trainings) and paired t over the problems (other problems).

* supported: the interval of every difference in `against` lies above zero;
* not supported: that of at least one lies below `margin`: whatever there is, is smaller than what would matter;
* inconclusive: otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.errors import RecipeError
from ..core.recipe import Section, build, read_recipe
from ..eval.uncertainty import mean_over_seeds, paired_difference
from .results import Results

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
RECIPES = "evidence/{}.yaml"


@dataclass
class Study:
    """What `study` holds."""

    title: str = field(metadata={"help": "Heading of the page."})
    claim: str = field(metadata={"help": "What is claimed, in the source's terms and numbers."})
    source: str = field(metadata={"help": "Where."})
    setup: str = field(metadata={"help": "Model, data and what the tasks are."})
    tasks: dict[str, str] = field(metadata={"help": "Task -> what it is called on the page."})
    arms: dict[str, str] = field(metadata={"help": "Label of an evaluation -> what it is."})
    task: str = field(metadata={"help": "Task of the primary metric."})
    metric: str = field(metadata={"help": "The primary metric; larger is better."})
    arm: str = field(metadata={"help": "The arm that the claim is about."})
    margin: float = field(metadata={"help": "The smallest difference that would matter."})
    against: dict[str, str] = field(metadata={"help": "Arm -> why the claim must hold against it."})
    metrics: list[str] = field(
        default_factory=lambda: ["pass@1", "pass@4"], metadata={"help": "Metrics of the table of scores."}
    )

    def __post_init__(self):
        if not any("control" in why for why in self.against.values()):
            raise ValueError("`against` names no control: say `control: ...` of the arm that could prove it useless")
        if unknown := [arm for arm in (self.arm, *self.against) if arm not in self.arms]:
            raise ValueError(f"`{unknown[0]}` is none of the `arms`: {', '.join(self.arms)}")
        if self.arm in self.against:
            raise ValueError(f"`against` names `{self.arm}`, the arm itself")
        if self.task not in self.tasks:
            raise ValueError(f"`task: {self.task}` is none of the `tasks`: {', '.join(self.tasks)}")
        if not self.margin > 0:
            raise ValueError(f"`margin` must be above 0, got {self.margin}")


def read_study(name: str) -> Study:
    """Read the statement of a study from its pipeline's recipe.

    Raises:
        RecipeError: there is no such study, or something in it is wrong.
    """
    section = read_recipe(RECIPES.format(name))
    values = section.values.get("study")
    if not isinstance(values, dict):
        raise RecipeError(f"{section.where}: no key `study`, a mapping that says what is claimed and what decides.")
    where = section.place("study")
    (study,) = build(Section(values, dict.fromkeys(values, where), where), Study)
    return study


@dataclass(frozen=True)
class Difference:
    """`arm` minus `other`, as a share, with the hull of its intervals over seeds and over problems."""

    arm: str
    other: str
    value: float
    low: float
    high: float
    of_seeds: tuple[float, ...]


def difference(results: Results, arm: str, other: str, task: str, metric: str) -> Difference:
    """Compare two arms, paired by seed and, where the metric is pass@k, by problem.

    Raises:
        DataError: an arm is missing, or has other seeds or problems than the other.
    """
    first, second = results.by_seed(other, task, metric), results.by_seed(arm, task, metric)
    results.check_same_seeds(arm, other)
    of_seeds = [second[seed] - first[seed] for seed in sorted(first)]
    intervals = [mean_over_seeds(of_seeds)]
    if (problems := results.by_problem(other, task, metric)) is not None:
        intervals.append(paired_difference(problems, results.by_problem(arm, task, metric) or {}))
    low, high = min(found.low for found in intervals), max(found.high for found in intervals)
    return Difference(arm, other, intervals[0].value, low, high, tuple(of_seeds))


def deciding_differences(study: Study, results: Results) -> list[Difference]:
    """Return the differences that the verdict rests on.

    Raises:
        DataError: an arm of `against` was not run: there is no verdict without its control.
    """
    return [difference(results, study.arm, other, study.task, study.metric) for other in study.against]


def verdict(differences: Sequence[Difference], margin: float) -> str:
    """Apply the rule that this module's docstring states."""
    if all(found.low > 0 for found in differences):
        return SUPPORTED
    return NOT_SUPPORTED if any(found.high < margin for found in differences) else INCONCLUSIVE


def reason(study: Study, differences: Sequence[Difference]) -> str:
    """Say in words on which differences the verdict rests."""
    said = verdict(differences, study.margin)
    if said == NOT_SUPPORTED:
        shown = [found.other for found in differences if found.high < study.margin]
        return f"against {_names(shown)} the interval ends below the smallest difference that would matter"
    if said == INCONCLUSIVE:
        shown = [found.other for found in differences if found.low <= 0]
        return f"against {_names(shown)} the interval holds both zero and a difference that would matter"
    return "every interval lies above zero"


def _names(arms: Sequence[str]) -> str:
    return " and ".join(f"`{arm}`" for arm in arms)
