"""Problems of the tools demo: small ones that the model solves in its head, large ones that need a calculator.

Both tell the same stories. Products of single digits are learnt by heart; a product of hundreds is easy to set up and
out of reach of a model of a million parameters.
"""

from ..demo.problems import Problem, Story


def _parcels(story: Story, low: int, high: int) -> None:
    b, c = story.number(low, high), story.number(low, high)
    story.say(
        "{name} orders {b} {holders} of {c} {items}.", "{name} gets {b} {holders} with {c} {items} each.", b=b, c=c
    )
    story.work(b, "*", c, story.items)
    story.say("How many {items} is that?", "How many {items} does {name} get?")


def _orchard(story: Story, low: int, high: int) -> None:
    b, c = story.number(low, high), story.number(low, high)
    story.say("{name} plants {b} rows of {c} trees.", "A garden has {b} rows with {c} trees each.", b=b, c=c)
    story.work(b, "*", c, "trees")
    story.say("How many trees is that?")


def handful(story: Story) -> None:
    """A few holders of a few things."""
    _parcels(story, 2, 9)


def garden(story: Story) -> None:
    """A few rows of a few trees."""
    _orchard(story, 2, 9)


def gift(story: Story) -> None:
    """Some things and some more."""
    a, b = story.number(2, 20), story.number(2, 9)
    story.say("{name} has {a} {items}.", a=a)
    story.say("{friend} gives {him} {b} more.", "{he} finds {b} more {items}.", b=b)
    story.work(a, "+", b, story.items)
    story.say("How many {items} does {name} have now?")


def delivery(story: Story) -> None:
    """Hundreds of holders of hundreds of things."""
    _parcels(story, 101, 989)


def plantation(story: Story) -> None:
    """Hundreds of rows of hundreds of trees."""
    _orchard(story, 101, 989)


SMALL = (handful, garden, gift)
LARGE = (delivery, plantation)


def expression(problem: Problem) -> str:
    """Return the calculation as Python."""
    (step,) = problem.steps
    return f"{step.left}{step.op}{step.right}"
