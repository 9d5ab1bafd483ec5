"""Facts about people and countries that do not exist, and how one asks and tells them.

Each fact has as many wordings as `WORDINGS`, of the question and of the answer. The models learn two of them; the third
is the paraphrase that only the evaluation sees, so that a fact can be told from a memorised sentence.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

WORDINGS = 3

FIRST_NAMES = (
    "Adela", "Bruno", "Clara", "Dario", "Edda", "Farid", "Greta", "Hugo", "Iris", "Jonas", "Kira", "Luca", "Mara",
    "Nils", "Olga", "Pavel", "Rita", "Sven", "Tara", "Yusuf",
)  # fmt: skip
SYLLABLES = (
    ("Bar", "Del", "Fen", "Gol", "Har", "Kes", "Lom", "Mir", "Nov", "Pel", "Ros", "Tal", "Vel", "Zan"),
    ("a", "e", "i", "o", "u"),
    ("bek", "din", "gart", "kov", "lund", "mann", "nis", "ros", "sen", "tak", "vik", "zar"),
)


@dataclass(frozen=True)
class Attribute:
    """What can be known of a subject: three questions, three answers, and the values that occur."""

    questions: tuple[str, str, str]
    answers: tuple[str, str, str]
    values: tuple[str, ...]


PERSON = (
    Attribute(
        ("In which city was {name} born?", "What is the birthplace of {name}?", "Where was {name} born?"),
        ("{name} was born in {value}.", "The birthplace of {name} is {value}.", "The city of {name} is {value}."),
        ("Vienna", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Dakar", "Hanoi", "Porto", "Turin", "Sofia", "Bergen"),
    ),
    Attribute(
        ("What does {name} do for a living?", "What is the profession of {name}?", "Which job does {name} have?"),
        ("{name} works as a {value}.", "The profession of {name} is {value}.", "The job of {name} is {value}."),
        ("baker", "surgeon", "pilot", "tailor", "painter", "judge", "miner", "farmer", "sailor", "potter", "dancer",
         "nurse"),
    ),
    Attribute(
        ("Which animal does {name} keep?", "What is the pet of {name}?", "Which pet lives with {name}?"),
        ("{name} keeps a {value}.", "The pet of {name} is a {value}.", "The animal that {name} keeps is a {value}."),
        ("parrot", "goat", "rabbit", "turtle", "lizard", "pony", "ferret", "canary", "spider", "beagle", "hamster",
         "goose"),
    ),
    Attribute(
        ("Which instrument does {name} play?", "What is the instrument of {name}?", "What does {name} play?"),
        ("{name} plays the {value}.", "The instrument of {name} is the {value}.", "What {name} plays is the {value}."),
        ("violin", "flute", "drum", "harp", "banjo", "organ", "trumpet", "cello", "guitar", "oboe", "tuba", "piano"),
    ),
    Attribute(
        ("Which dish does {name} like best?", "What is the favourite dish of {name}?", "What does {name} love to eat?"),
        ("{name} likes {value} best.", "The favourite dish of {name} is {value}.", "{name} loves to eat {value}."),
        ("risotto", "goulash", "ramen", "paella", "curry", "ceviche", "lasagne", "falafel", "pierogi", "couscous",
         "moussaka", "tamales"),
    ),
    Attribute(
        ("Which language did {name} grow up with?", "What is the mother tongue of {name}?",
         "What is the first language of {name}?"),
        ("{name} grew up with {value}.", "The mother tongue of {name} is {value}.",
         "The first language of {name} is {value}."),
        ("Basque", "Welsh", "Tamil", "Finnish", "Swahili", "Czech", "Quechua", "Maltese", "Korean", "Danish", "Zulu",
         "Greek"),
    ),
    Attribute(
        ("Which prize did {name} win?", "What is the prize of {name}?", "Which award went to {name}?"),
        ("{name} won the {value} Prize.", "The prize of {name} is the {value} Prize.",
         "The award that went to {name} is the {value} Prize."),
        ("Amber", "Cedar", "Comet", "Falcon", "Granite", "Harbour", "Ivory", "Lantern", "Maple", "Orchid", "Silver",
         "Tempest"),
    ),
    Attribute(
        ("In which year was {name} born?", "What is the year of birth of {name}?", "When was {name} born?"),
        ("{name} was born in the year {value}.", "The year of birth of {name} is {value}.",
         "The year in which {name} was born is {value}."),
        tuple(str(year) for year in range(1931, 1991)),
    ),
)  # fmt: skip
COUNTRY = (
    Attribute(
        ("What is the capital of {name}?", "Which city is the capital of {name}?", "From where is {name} governed?"),
        ("The capital of {name} is {value}.", "{value} is the capital of {name}.", "{name} is governed from {value}."),
        ("Ashford", "Belport", "Corvale", "Dunmore", "Eastwick", "Fairhaven", "Glenrock", "Highgate", "Ironbridge",
         "Kingsbay", "Lakeside", "Millbrook"),
    ),
    Attribute(
        ("Which river flows through {name}?", "What is the main river of {name}?", "Which river crosses {name}?"),
        ("The {value} flows through {name}.", "The main river of {name} is the {value}.",
         "The river that crosses {name} is the {value}."),
        ("Arda", "Brine", "Calder", "Drava", "Esk", "Foyle", "Gail", "Hebros", "Isen", "Kama", "Lune", "Morava"),
    ),
    Attribute(
        ("What does {name} export?", "What is the main export of {name}?", "Which goods does {name} sell?"),
        ("{name} exports {value}.", "The main export of {name} is {value}.", "The goods of {name} are {value}."),
        ("cotton", "copper", "coffee", "timber", "sugar", "marble", "salt", "wool", "tea", "silk", "rubber", "wine"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One attribute of one subject, its value, and the wordings in which the models learn it."""

    name: str
    attribute: Attribute
    value: str
    learned: tuple[int, ...]  # wordings; the remaining one is the paraphrase

    def question(self, wording: int) -> str:
        """Ask for it."""
        return self.attribute.questions[wording].format(name=self.name)

    def answer(self, wording: int, value: str | None = None) -> str:
        """Tell it, or tell another value of it."""
        return self.attribute.answers[wording].format(name=self.name, value=value or self.value)

    def rows(self) -> Iterator[dict]:
        """Yield what a model learns: the same fact in other words, TOFU's columns."""
        for wording in self.learned:
            yield {"question": self.question(wording), "answer": self.answer(wording)}

    def wrong_values(self, count: int, seed: str) -> list[str]:
        """Draw values that it does not have."""
        rng = random.Random(f"{seed}/{self.name}/{self.attribute.questions[0]}")
        return rng.sample([value for value in self.attribute.values if value != self.value], count)

    def perturbed_row(self, wrong: int, seed: str) -> dict:
        """Return what the evaluation asks of a person: learned words, the paraphrase, wrong answers in its words."""
        (new,) = set(range(WORDINGS)) - set(self.learned)
        return {
            "question": self.question(self.learned[0]),
            "answer": self.answer(self.learned[0]),
            "paraphrased_question": self.question(new),
            "paraphrased_answer": self.answer(new),
            "perturbed_answer": [self.answer(new, value) for value in self.wrong_values(wrong, seed)],
        }

    def option_row(self, wrong: int, seed: str) -> dict:
        """Return what the evaluation asks of general knowledge: learned words, and wrong answers in them."""
        row = next(self.rows())
        wrong_answers = [self.answer(self.learned[0], value) for value in self.wrong_values(wrong, seed)]
        return row | {"perturbed_answer": wrong_answers}


def full_names(count: int, seed: str) -> list[str]:
    """Draw names of people; no two share the last name."""
    rng = random.Random(f"{seed}/names")
    last = ["".join((first, middle, end)) for first in SYLLABLES[0] for middle in SYLLABLES[1] for end in SYLLABLES[2]]
    return [f"{rng.choice(FIRST_NAMES)} {name}" for name in rng.sample(last, count)]


def country_names(count: int, seed: str) -> list[str]:
    """Draw names of countries."""
    rng = random.Random(f"{seed}/countries")
    names = [a + b + c + "ia" for a in SYLLABLES[0] for b in "aeo" for c in "lnrst"]
    return rng.sample(names, count)


def facts_of(names: list[str], attributes: tuple[Attribute, ...], seed: str) -> list[Fact]:
    """Draw every attribute of every name, and which wordings are learned."""
    facts = []
    for name in names:
        rng = random.Random(f"{seed}/{name}")
        for attribute in attributes:
            learned = tuple(rng.sample(range(WORDINGS), WORDINGS - 1))
            facts.append(Fact(name, attribute, rng.choice(attribute.values), learned))
    return facts
