"""Planted faults that show once a row is rendered, or beside all others: recall and precision.

With `test_seeded`, every kind of the registry is planted and measured.
"""

from __future__ import annotations

import json
import random

import pytest

from jaxtune.data.doctor import kinds, topics
from jaxtune.data.tokenizer import load_tokenizer
from tests.data.conftest import TEMPLATES
from tests.data.doctor import world
from tests.data.doctor.conftest import lines_of
from tests.data.doctor.test_seeded import scores

EACH, ROWS = 10, 250
# Measured in `test_seeded`.
ELSEWHERE = {*world.FAULTS, "invalid_json", "not_utf8", "duplicate", "near_duplicate", "conflict"}
ELSEWHERE |= {"split_leak", "near_split_leak", "contamination", "near_contamination"}
FOREIGN = (
    "Die alte Katze sitzt gern vor dem Haus und schläft in der warmen Sonne. Der Hund bellt laut.",
    "Le vieux chat dort devant la maison pendant que les enfants jouent dans le grand jardin.",
    "El perro viejo duerme delante de la casa mientras los niños juegan en el jardín grande.",
)


SYSTEM = {"role": "system", "content": "Be kind."}
# Of a conversation with one question and one answer.
CHAT = {
    "role_order": lambda user, answer, r: r.choice(
        ([user, answer, user], [user, SYSTEM, answer], [{**user, "role": "wizard"}, answer])
    ),
    "turn_order": lambda user, answer, r: r.choice(([answer, user, answer], [user, user, answer])),
    "template_refused": lambda user, answer, r: [SYSTEM, user, answer],
    "overlong": lambda user, answer, r: [user, {**answer, "content": answer["content"] * 4}],
    "target_lost": lambda user, answer, r: [{**user, "content": user["content"] * 12}, answer],
    "other_language": lambda user, answer, r: [
        {**turn, "content": r.choice(FOREIGN)} for turn in (user, answer)
    ],
}


IDS = {
    "doubled_bos": lambda ids, r: {"input_ids": [ids[0], *ids]},
    "missing_terminator": lambda ids, r: r.choice(
        ({"input_ids": ids[:-1]}, {"input_ids": ids, "loss_mask": [1] * (len(ids) - 1) + [0]})
    ),
    "no_target": lambda ids, r: {"input_ids": ids, "loss_mask": [0] * len(ids)},
}
PAIRS = {
    "same_pair": lambda row, r: {**row, "rejected": row["chosen"]},
    "overlong": lambda row, r: {**row, "chosen": row["chosen"] * 12},
    "target_lost": lambda row, r: {**row, "prompt": row["prompt"] * 24},
}


def of_talk(fault):
    return lambda row, r: {"messages": fault(*row["messages"], r)}


def of_ids(fault):
    return lambda row, r: fault(row["input_ids"], r)


def planted(rows, faults, seed):
    """The rows with EACH faults of a kind, each in a row of its own, and {kind: lines}."""
    r = random.Random(seed)
    free, rows, found = r.sample(range(len(rows)), len(rows)), list(rows), {}
    for kind, fault in faults.items():
        for _ in range(EACH):
            at = free.pop()
            rows[at] = fault(rows[at], r)
            found.setdefault(kind, set()).add(at + 1)
    return rows, found


@pytest.mark.slow
def test_faults_of_rendered_rows_are_found(clean_rows, doctor, tokenizer_dir, tmp_path):
    template = tmp_path / "gemma.jinja"
    template.write_text(TEMPLATES["gemma"])
    tokenizer = load_tokenizer(tokenizer_dir)
    clean = clean_rows[:ROWS]
    others = clean_rows[1] | clean_rows[2]
    talks = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in clean
    ]
    ids = [{"input_ids": [*tokenizer.encode(row["completion"]), tokenizer.eos_id]} for row in clean]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": others["completion"][:i]}
        for i, row in enumerate(clean, 20)
    ]
    measured = {}
    told = {"tokenizer": str(tokenizer_dir), "template": str(template)}
    for format, rows, faults, seq_len in (
        ("chat", talks, {k: of_talk(f) for k, f in CHAT.items()}, 700),
        ("tokens", ids, {k: of_ids(f) for k, f in IDS.items()}, 700),
        ("preference", pairs, PAIRS, 1400),
    ):
        rows, found = planted(rows, faults, seed=8)
        path = tmp_path / f"{format}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = doctor(path, format, seq_len=seq_len, **told)
        if "target_lost" in found:  # what lost its target is too long as well
            found["overlong"] = found["overlong"] | found["target_lost"]
        for kind, lines in found.items():
            measured[kind, format] = scores(lines_of(report, kind), lines, set())
    assert {kind: s for kind, s in measured.items() if s[0] < 0.98 or s[1] < 0.95} == {}
    assert {kind for kind, _ in measured} | ELSEWHERE == kinds.BY_NAME.keys()


def test_topics_are_what_rows_share():
    """Three subjects, each with words of its own and words of all."""
    r = random.Random(9)
    words = {s: [f"{s}{i}" for i in range(30)] for s in ("law", "sea", "art", "all")}
    truth = [r.choices(("law", "sea", "art"), (6, 3, 1))[0] for _ in range(200)]
    rows = [frozenset(r.sample(words[s], 8) + r.sample(words["all"], 4)) for s in truth]
    terms = [word for some in words.values() for word in some]
    found = topics.topics(rows, terms)
    for topic in found:
        assert len({term[:3] for term in topic["terms"]} - {"all"}) == 1, topic
    shares = {
        s: sum(t["share"] for t in found if any(x.startswith(s) for x in t["terms"]))
        for s in ("law", "sea", "art")
    }
    assert shares == pytest.approx({s: truth.count(s) / 200 for s in shares}, abs=0.03)
    assert topics.topics(rows[:30], terms) == []
