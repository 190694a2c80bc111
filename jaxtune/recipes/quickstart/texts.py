"""The quickstart's texts: a corpus to pretrain on, and instructions to tune on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxtune.recipes.quickstart.world import (
    JOBS,
    LARGEST_TERM,
    NUMBERS,
    TOWNS,
    Fact,
    Person,
    World,
    facts,
    make_world,
    person_facts,
    sum_facts,
    town_facts,
)

DOCUMENTS = 5000
HELD_OUT_DOCUMENTS = 200
HELD_OUT_SHARE = 0.2  # of the sums; of the people it is one a town

Record = dict[str, object]


def documents(world: World, count: int, seed: int = 0) -> list[str]:
    """Returns `count` different documents: sketches of people and towns, sums, little stories.

    Args:
        world: whose facts they state.
        count: how many.
        seed: of the choices; the same seed gives the same documents.
    """
    rng = random.Random(f"documents {seed}")
    sums = sum_facts()
    found: dict[str, None] = {}  # a dict keeps the order and drops the doubles
    while len(found) < count:
        kind = rng.random()
        if kind < 0.4:
            text = _sketch(rng, person_facts(rng.choice(world.people)))
        elif kind < 0.5:
            text = _sketch(rng, town_facts(rng.choice(world.towns)))
        elif kind < 0.8:
            text = _two_sums(rng, sums)
        else:
            text = story(rng, world, rng.choice(world.people))
        found.setdefault(text)
    return list(found)


def _sketch(rng: random.Random, about: tuple[Fact, ...]) -> str:
    """Says some of the facts in any order, the plain statement as often as all others."""
    chosen = rng.sample(about, rng.randint(min(3, len(about)), len(about)))
    return " ".join(
        fact.answer if rng.random() < 0.5 else rng.choice(fact.statements) for fact in chosen
    )


def _two_sums(rng: random.Random, sums: Sequence[Fact]) -> str:
    """Says two sums in every way, one after the other: to repeat a sum is to copy its terms."""
    sentences = []
    for number in rng.sample(range(len(sums) // 2), 2):
        in_digits, in_words = sums[2 * number : 2 * number + 2]
        said = (*in_digits.statements, *in_words.statements)
        sentences += rng.sample(said, len(said))
    return " ".join(sentences)


def story(rng: random.Random, world: World, hero: Person) -> str:
    """Returns a story of six to nine sentences in which all that is said is true in the world."""
    friend = rng.choice(world.neighbours(hero))
    opening = rng.choice(
        (
            f"One morning {hero.name} the {hero.job} walked through {hero.town}.",
            f"Once {hero.name} of {hero.town} woke up early.",
            f"It was a cold day in {hero.town}, and {hero.name} the {hero.job} was at home.",
        )
    )
    plot = rng.choice((_lost, _gift, _count))
    closing = rng.choice(
        (
            f"In the evening {hero.name} ate {hero.dish} and was happy.",
            f"Then {hero.name} and {friend.name} shared {friend.dish}, because {friend.name} "
            f"likes it best.",
            f"{hero.name} went home to {hero.their} {hero.animal} {hero.pet} and slept well.",
        )
    )
    return " ".join((opening, *plot(rng, hero, friend), closing))


def _lost(rng: random.Random, hero: Person, friend: Person) -> Iterable[str]:
    place = rng.choice(("under the bridge", "behind the mill", "in the long grass", "on the roof"))
    return (
        f"{hero.pet} the {hero.animal} was gone.",
        f'"Where are you, {hero.pet}?" called {hero.name}.',
        f"{friend.name} the {friend.job} heard {hero.them} and came to help.",
        f"They looked everywhere, and at last they found {hero.pet} {place}.",
        f'"Thank you, {friend.name}," said {hero.name}.',
    )


def _gift(rng: random.Random, hero: Person, friend: Person) -> Iterable[str]:
    gift, wish = JOBS[hero.job][1], rng.choice(("a kind word", "a song", "a smile"))
    return (
        f"There {hero.they} met {friend.name} the {friend.job}, who looked sad.",
        f'"What is the matter?" asked {hero.name}.',
        f'"I have lost my {JOBS[friend.job][1]}," said {friend.name}.',
        f"So {hero.name} gave {friend.them} a {gift} and {wish}.",
        f"{friend.name} laughed again.",
    )


def _count(rng: random.Random, hero: Person, friend: Person) -> Iterable[str]:
    things = JOBS[hero.job][2]
    first, second = rng.randint(1, LARGEST_TERM), rng.randint(1, LARGEST_TERM)
    return (
        f"{hero.name} had {NUMBERS[first]} of the {things}.",
        f"{friend.name} the {friend.job} brought {hero.them} {NUMBERS[second]} more.",
        f'"How many {things} are there now?" asked {friend.name}.',
        f"In words, {NUMBERS[first]} plus {NUMBERS[second]} is {NUMBERS[first + second]}.",
        f'"There are {NUMBERS[first + second]}," said {hero.name}.',
    )


def instructions(world: World, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Returns (training, held-out) conversations `{"messages": [user, assistant]}` about the world.

    The split is by subject: some people and sums are never mentioned in the training half, so a
    right held-out answer was learnt from the corpus.

    Args:
        world: what is asked about.
        seed: of the split, the order and the choices.
    """
    rng = random.Random(f"instructions {seed}")
    held_out = held_out_subjects(world, seed)
    halves: tuple[list[Record], list[Record]] = ([], [])
    for fact in facts(world):
        for question in fact.questions:
            _add(halves[fact.subject in held_out], question, fact.answer)
    for person in world.people:
        half = halves[person.name in held_out]
        _add(half, f"Tell me a story about {person.name}.", _short_story(person))
    for half in halves:
        rng.shuffle(half)
    return halves


def held_out_subjects(world: World, seed: int = 0) -> frozenset[str]:
    """Returns the people and the sums that no training conversation mentions.

    The people are one of each town, each of another trade, so that every town and trade is still
    asked about.
    """
    rng = random.Random(f"held out {seed}")
    homes = set(zip(TOWNS, rng.sample(list(JOBS), len(TOWNS)), strict=True))
    people = [person.name for person in world.people if (person.town, person.job) in homes]
    sums = sorted({fact.subject for fact in sum_facts()})
    return frozenset((*people, *rng.sample(sums, round(HELD_OUT_SHARE * len(sums)))))


def _add(records: list[Record], question: str, answer: str) -> None:
    records.append(
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
    )


def _short_story(hero: Person) -> str:
    return " ".join(
        (
            f"Once {hero.name} of {hero.town} woke up early.",
            f"{hero.pet} the {hero.animal} was gone.",
            f'"Where are you, {hero.pet}?" called {hero.name}.',
            f"At last {hero.they} found {hero.pet} under the bridge.",
            f"In the evening {hero.name} ate {hero.dish} and was happy.",
        )
    )


def write(directory: str | Path, seed: int = 0, count: int = DOCUMENTS) -> dict[str, Path]:
    """Writes the texts of a world as JSONL and returns the files by name.

    Args:
        directory: is made if it is not there; files of the same names are replaced.
        seed: of the world and of all choices.
        count: documents to train on; `HELD_OUT_DOCUMENTS` others are held out.

    Returns:
        `corpus` and `corpus_held_out` ({"text"} a line), `chat` and `chat_held_out`
        ({"messages"} a line).
    """
    world = make_world(seed)
    corpus = documents(world, count + HELD_OUT_DOCUMENTS, seed)
    chat, chat_held_out = instructions(world, seed)
    records = {
        "corpus": [{"text": text} for text in corpus[:count]],
        "corpus_held_out": [{"text": text} for text in corpus[count:]],
        "chat": chat,
        "chat_held_out": chat_held_out,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.jsonl" for name in records}
    for name, path in paths.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records[name])
        path.write_text("".join(lines), encoding="utf-8")
    return paths
