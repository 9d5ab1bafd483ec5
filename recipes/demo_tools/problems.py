"""Problems of the tools demo: small ones that the model solves in its head, large ones that need a calculator.

The small ones are stories of `recipes.demo`. The large ones tell of hundreds times hundreds, alone or with a sum: what
is to be calculated is easy to see, and the product is out of reach of a model of a million parameters.
"""

from ..demo.problems import Problem, Story, bus, garden, more_than, packing

LOW, HIGH = 101, 989  # of the factors


def delivery(story: Story) -> None:
    """A plain product."""
    b, c = story.number(LOW, HIGH), story.number(LOW, HIGH)
    story.say(
        "{name} orders {b} {holders} of {c} {items}.", "{name} gets {b} {holders} with {c} {items} each.", b=b, c=c
    )
    story.work(b, "*", c, story.items)
    story.say("How many {items} is that?", "How many {items} does {name} get?")


def stock(story: Story) -> None:
    """A product added to what is there."""
    a, b, c = story.number(11, 99), story.number(LOW, HIGH), story.number(LOW, HIGH)
    story.say("{name} has {a} {items}.", "A shop has {a} {items}.", a=a)
    story.say("Then {b} {holders} of {c} come in.", "A truck brings {b} {holders} of {c}.", b=b, c=c)
    new = story.work(b, "*", c, "new " + story.items)
    story.work(a, "+", new, story.items)
    story.say("How many {items} are there now?")


def harvest(story: Story) -> None:
    """A product, and what is lost of it."""
    b, c, d = story.number(LOW, HIGH), story.number(LOW, HIGH), story.number(11, 99)
    story.say("A field has {b} rows of {c} plants.", "{name} plants {b} rows of {c} trees.", b=b, c=c)
    story.say("{d} of them die.", "Then {d} die.", d=d)
    all_of_them = story.work(b, "*", c, "planted")
    story.work(all_of_them, "-", d, "alive")
    story.say("How many are left?")


SMALL = (packing, more_than, bus, garden)
LARGE = (delivery, delivery, stock, harvest)


def expression(problem: Problem) -> str:
    """Return the whole calculation as one line of Python, with the numbers of the story only."""
    parts: dict[int, str] = {}
    for step in problem.steps:
        left, right = parts.get(step.left, str(step.left)), parts.get(step.right, str(step.right))
        parts[step.result] = f"{left}{step.op}{right}"
    return parts[problem.steps[-1].result]
