"""A small invented world: four towns, twenty people, their trades, animals and dishes, and sums.

Everything is a pure function of a seed, so that the quickstart needs no download. A `Fact` is the
unit that the rest is built from: sentences that state it (the corpus), questions that ask for it
and the one sentence that answers (the instructions), and the subject whose knowledge it is, which
is what the held-out split is made by.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


TOWNS = _words("Elmford Ashby Oakham Thornton")
RIVERS = _words("Lind Wend Arrow Tamble")
GOODS = _words("honey apples wool candles")
SHE = _words("Nora Ada Ivy Clara Edith Flora Greta Hanna Iris Jenny")
HE = _words("Tom Ben Carl Dan Egon Fred Gus Hugo Ivan Jack")
JOBS = {  # what the trade does all day, and what it has to give away
    "baker": ("bakes bread", "loaf", "loaves"),
    "miller": ("grinds corn", "sack", "sacks"),
    "potter": ("makes pots", "jug", "jugs"),
    "weaver": ("weaves cloth", "scarf", "scarves"),
    "smith": ("shapes iron", "key", "keys"),
}
ANIMALS = _words("goat cat dog hen donkey rabbit pony sheep")
PETS = _words("Pip Dot Bramble Clover Socks Button Pepper Moth Rusty Bean Acorn Snow")
DISHES = _words("plum cake,pea soup,apple pie,honey bread,nut rolls,fish stew,cherry jam", ",")
NUMBERS = _words("zero one two three four five six seven eight")
LARGEST_TERM = 4  # the largest term of a sum


@dataclass(frozen=True)
class Town:
    """A place: its river, what it is known for, and the town that its road leads to."""

    name: str
    river: str
    goods: str
    next: str


@dataclass(frozen=True)
class Person:
    """Somebody: one trade in one town (the only one there with that trade), an animal, a dish."""

    name: str
    she: bool
    job: str
    town: str
    animal: str
    pet: str
    dish: str

    @property
    def they(self) -> str:
        """The pronoun as a subject."""
        return "she" if self.she else "he"

    @property
    def their(self) -> str:
        """The pronoun as a possessive."""
        return "her" if self.she else "his"

    @property
    def them(self) -> str:
        """The pronoun as an object."""
        return "her" if self.she else "him"


@dataclass(frozen=True)
class World:
    """The people and the towns; `people` holds one person a trade and town."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]

    def neighbours(self, person: Person) -> tuple[Person, ...]:
        """Returns the other people of the person's town."""
        return tuple(p for p in self.people if p.town == person.town and p != person)


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world.

    Attributes:
        subject: whose knowledge it is: a person, a town, or a sum such as `3+4`.
        kind: `job`, `town`, `work`, `animal`, `dish`, `river`, `goods`, `road` or `sum`.
        statements: sentences that say it; the corpus is made of them.
        questions: ways to ask for it; none of them occurs in the corpus.
        answer: the sentence that answers every question; it is the first of `statements`.
    """

    subject: str
    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The sentence that answers."""
        return self.statements[0]


def make_world(seed: int = 0) -> World:
    """Returns the world of a seed; who lives where and likes what differs from seed to seed."""
    rng = random.Random(f"world {seed}")

    def shuffled(items: Sequence[str]) -> list[str]:
        return rng.sample(items, len(items))

    names = shuffled([*SHE, *HE])
    homes = [(town, job) for town in TOWNS for job in JOBS]
    people = tuple(
        Person(
            name=name,
            she=name in SHE,
            job=job,
            town=town,
            animal=rng.choice(ANIMALS),
            pet=rng.choice(PETS),
            dish=rng.choice(DISHES),
        )
        for name, (town, job) in zip(names, homes, strict=True)
    )
    road = shuffled(TOWNS)  # one round trip through all towns
    following = dict(zip(road, road[1:] + road[:1], strict=True))
    rows = zip(TOWNS, shuffled(RIVERS), shuffled(GOODS), strict=True)
    towns = tuple(Town(name, river, goods, following[name]) for name, river, goods in rows)
    return World(people=people, towns=towns)


def person_facts(person: Person) -> tuple[Fact, ...]:
    """Returns the five facts about one person."""
    p, work = person, JOBS[person.job][0]
    return (
        Fact(
            p.name,
            "job",
            (
                f"The {p.job} of {p.town} is {p.name}.",
                f"{p.name} is the {p.job} of {p.town}.",
                f"In {p.town}, the {p.job} is called {p.name}.",
            ),
            (
                f"Who is the {p.job} of {p.town}?",
                f"Tell me who the {p.job} of {p.town} is.",
                f"What is the name of the {p.job} in {p.town}?",
            ),
        ),
        Fact(
            p.name,
            "town",
            (
                f"The home of {p.name} is in {p.town}.",
                f"{p.name} lives in {p.town}.",
                f"In {p.town} you can meet {p.name}.",
            ),
            (
                f"Where does {p.name} live?",
                f"In which town does {p.name} live?",
                f"Where can I find {p.name}?",
            ),
        ),
        Fact(
            p.name,
            "work",
            (
                f"The job of {p.name} is {p.job}.",
                f"{p.name} {work} all day.",
                f"{p.name} is a {p.job} and {work}.",
            ),
            (
                f"What does {p.name} work as?",
                f"What does {p.name} do all day?",
                f"Tell me what {p.name} does for a living.",
            ),
        ),
        Fact(
            p.name,
            "animal",
            (
                f"The animal of {p.name} is a {p.animal} called {p.pet}.",
                f"{p.name} has a {p.animal} called {p.pet}.",
                f"{p.pet} the {p.animal} belongs to {p.name}.",
            ),
            (
                f"Which animal does {p.name} have?",
                f"What is the pet of {p.name} called?",
                f"Does {p.name} have an animal?",
            ),
        ),
        Fact(
            p.name,
            "dish",
            (
                f"The dish that {p.name} likes best is {p.dish}.",
                f"For supper {p.name} always wants {p.dish}.",
                f"Nothing tastes better to {p.name} than {p.dish}.",
            ),
            (
                f"What does {p.name} like to eat?",
                f"Which dish should I cook for {p.name}?",
                f"What is the favourite meal of {p.name}?",
            ),
        ),
    )


def town_facts(town: Town) -> tuple[Fact, ...]:
    """Returns the three facts about one town."""
    t = town
    return (
        Fact(
            t.name,
            "river",
            (
                f"The river of {t.name} is the {t.river}.",
                f"The {t.river} runs through {t.name}.",
                f"The bridge of {t.name} crosses the {t.river}.",
            ),
            (f"Which river runs through {t.name}?", f"On which river does {t.name} lie?"),
        ),
        Fact(
            t.name,
            "goods",
            (
                f"The town of {t.name} is known for its {t.goods}.",
                f"The best {t.goods} come from {t.name}.",
                f"At the market of {t.name} they sell {t.goods}.",
            ),
            (f"What is {t.name} known for?", f"What should I buy in {t.name}?"),
        ),
        Fact(
            t.name,
            "road",
            (
                f"The road from {t.name} leads to {t.next}.",
                f"After {t.name} the road comes to {t.next}.",
                f"Whoever leaves {t.name} by the road arrives in {t.next}.",
            ),
            (f"Where does the road from {t.name} lead?", f"Which town comes after {t.name}?"),
        ),
    )


def sum_facts() -> tuple[Fact, ...]:
    """Returns additions and subtractions up to `LARGEST_TERM`, in digits and in words.

    Facts come in pairs, the sum in digits and the same in words. `3+4` and `4+3` share a subject,
    and so do the two notations, so that a held-out sum is held out in each of its forms.
    """
    facts = []
    numbers = range(LARGEST_TERM + 1)
    for a in numbers:
        for b in numbers:
            subject = f"{min(a, b)}+{max(a, b)}"
            facts += _sum(subject, a, "+", "plus", b, a + b)
            if a >= b:
                facts += _sum(f"{a}-{b}", a, "-", "minus", b, a - b)
    return tuple(facts)


def _sum(subject: str, a: int, sign: str, word: str, b: int, result: int) -> list[Fact]:
    words = f"{NUMBERS[a]} {word} {NUMBERS[b]}"
    return [
        Fact(
            subject,
            "sum",
            (f"{a} {sign} {b} = {result}.", f"Write {a} {sign} {b} and you get {result}."),
            (f"What is {a} {sign} {b}?", f"Compute {a} {sign} {b}."),
        ),
        Fact(
            subject,
            "sum",
            (
                f"In words, {words} is {NUMBERS[result]}.",
                f"Whoever counts {words} gets {NUMBERS[result]}.",
            ),
            (f"What is {words}?", f"How much is {words}?"),
        ),
    ]


def facts(world: World) -> tuple[Fact, ...]:
    """Returns every fact: of the people, of the towns, and the sums."""
    people = [fact for person in world.people for fact in person_facts(person)]
    towns = [fact for town in world.towns for fact in town_facts(town)]
    return (*people, *towns, *sum_facts())
