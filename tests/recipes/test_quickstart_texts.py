"""The quickstart's world, texts and tokenizer."""

import json
import os
import random
import re
import subprocess
import sys

import pytest

from jaxtune.recipes.quickstart import texts, tokenizer, world

WORLD = world.make_world(0)


def words(text):
    return set(re.findall(r"\w+", text))


def contents(records, turn):
    return [record["messages"][turn]["content"] for record in records]


@pytest.mark.smoke
def test_every_town_has_one_person_of_each_trade():
    homes = {(person.town, person.job) for person in WORLD.people}
    assert homes == {(town, job) for town in world.TOWNS for job in world.JOBS}
    assert len({person.name for person in WORLD.people}) == len(WORLD.people) == len(homes)


def test_road_passes_every_town_once():
    following = {town.name: town.next for town in WORLD.towns}
    place, passed = world.TOWNS[0], []
    while place not in passed:
        passed.append(place)
        place = following[place]
    assert sorted(passed) == sorted(world.TOWNS)


def test_each_question_has_one_answer():
    answers = {}
    for fact in world.facts(WORLD):
        for question in fact.questions:
            assert answers.setdefault(question, fact.answer) == fact.answer


def test_sums_are_right():
    signs = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}
    named = {"plus": "+", "minus": "-"}
    sums = world.sum_facts()
    assert len(sums) == 2 * (5 * 5 + 5 * 6 // 2)
    for fact in sums:
        if fact.answer.startswith("In words"):
            a, sign, b, _, c = fact.answer.rstrip(".").split()[2:]
            a, b, c = (world.NUMBERS.index(word) for word in (a, b, c))
            assert signs[named[sign]](a, b) == c
        else:
            a, sign, b, _, c = fact.answer.rstrip(".").split()
            assert signs[sign](int(a), int(b)) == int(c)


@pytest.mark.smoke
def test_same_seed_same_texts_in_another_process(tmp_path):
    texts.write(tmp_path / "here", seed=3, count=50)
    code = "import sys; from jaxtune.recipes.quickstart import texts; "
    code += "texts.write(sys.argv[1], seed=3, count=50)"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment)
    for here in (tmp_path / "here").iterdir():
        assert here.read_bytes() == (tmp_path / "there" / here.name).read_bytes()


def test_another_seed_is_another_world():
    assert world.make_world(1) != WORLD
    assert texts.documents(WORLD, 5, seed=0) != texts.documents(WORLD, 5, seed=1)


def test_documents_differ_from_each_other_and_state_only_facts():
    documents = texts.documents(WORLD, 400)
    assert len(set(documents)) == 400
    stated = {statement for fact in world.facts(WORLD) for statement in fact.statements}
    for text in documents:
        sentences = re.split(r"(?<=\.) ", text)
        if not text.startswith(("One morning", "Once", "It was")):
            assert set(sentences) <= stated


def test_stories_are_true_to_the_world():
    rng = random.Random(0)
    for person in WORLD.people:
        story = texts.story(rng, WORLD, person)
        others = {p.name for p in WORLD.people if p.town != person.town}
        assert person.name in story
        assert person.town in story
        assert not words(story) & others
        assert not words(story) & (set(world.TOWNS) - {person.town})


def test_every_fact_is_stated_in_the_corpus_and_no_question_is_asked():
    corpus = " ".join(texts.documents(WORLD, texts.DOCUMENTS))
    for fact in world.facts(WORLD):
        assert fact.answer in corpus
        assert not any(question in corpus for question in fact.questions)


@pytest.mark.smoke
def test_held_out_subjects_are_never_mentioned_in_training():
    train, held_out = texts.instructions(WORLD)
    subjects = texts.held_out_subjects(WORLD)
    people = {person.name for person in WORLD.people} & subjects
    homes = [(person.town, person.job) for person in WORLD.people if person.name in people]
    assert [len(set(part)) for part in zip(*homes, strict=True)] == [4, 4]
    assert len(subjects - people) == round(0.2 * 30)
    for question, answer in zip(contents(train, 0), contents(train, 1), strict=True):
        assert not words(question + answer) & people
    sums = {fact.subject: fact for fact in world.sum_facts()}
    asked = set(contents(train, 0))
    for subject in subjects - people:
        a, sign, b = re.fullmatch(r"(\d)([+-])(\d)", subject).groups()
        assert f"What is {a} {sign} {b}?" not in asked
        assert subject in sums
        if sign == "+":
            assert f"What is {b} + {a}?" not in asked
    assert not asked & set(contents(held_out, 0))


def test_both_halves_ask_every_kind_of_question_about_people():
    train, held_out = texts.instructions(WORLD)
    for half in (train, held_out):
        asked = " ".join(contents(half, 0))
        for phrase in ("Who is", "Where does", "Which animal", "story", "Compute", "How much"):
            assert phrase in asked


def test_written_files_hold_what_the_functions_return(tmp_path):
    paths = texts.write(tmp_path, seed=0, count=30)
    records = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
    }
    documents = texts.documents(WORLD, 30 + texts.HELD_OUT_DOCUMENTS)
    assert [r["text"] for r in records["corpus"]] == documents[:30]
    assert [r["text"] for r in records["corpus_held_out"]] == documents[30:]
    assert (records["chat"], records["chat_held_out"]) == texts.instructions(WORLD)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_tokenizer(texts.documents(WORLD, 1000), directory)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def ids_of(trained, *args, **options):
    return trained.apply_chat_template(*args, tokenize=True, return_dict=False, **options)


def test_tokenizer_gives_texts_back(trained):
    assert len(trained) <= tokenizer.VOCAB_SIZE
    for text in [*texts.documents(WORLD, 1100)[1000:], "Füße, 東京 \n\t 🙂"]:
        ids = trained(text)["input_ids"]
        assert ids[0] == trained.bos_token_id
        assert trained.decode(ids[1:]) == text


def test_tokenizer_keeps_digits_apart_and_its_special_tokens_are_three(trained):
    assert len({trained.bos_token_id, trained.eos_token_id, trained.pad_token_id}) == 3
    pieces = trained.convert_ids_to_tokens(trained("12 + 345")["input_ids"][1:])
    assert [piece for piece in pieces if piece.isdigit()] == list("12345")


def test_names_are_one_piece_inside_a_sentence(trained):
    for person in WORLD.people:
        assert len(trained(f" {person.name}")["input_ids"]) == 2


def test_template_opens_each_turn_with_bos_and_ends_it_with_eos(trained):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nora."}]
    text = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nNora.<|im_end|>\n"
    ids = ids_of(trained, turns)
    assert ids == trained(text, add_special_tokens=False)["input_ids"]
    assert ids.count(trained.bos_token_id) == ids.count(trained.eos_token_id) == 2
    prompt = ids_of(trained, turns[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_conversations_fit_a_row(trained):
    longest = max(
        len(ids_of(trained, record["messages"]))
        for half in texts.instructions(WORLD)
        for record in half
    )
    assert longest <= 128
