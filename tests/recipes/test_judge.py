"""A judge behind a server: what it is asked, how its replies are read, and what is counted."""

from __future__ import annotations

import json
import re
import threading

import pytest

from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.data.formats import Completion
from jaxtune.data.questions import Question
from jaxtune.recipes.evaluation.judge import ATTEMPTS, COMPARING, GRADING, open_judge, verdict
from jaxtune.recipes.evaluation.judged import compare, grade
from jaxtune.rl.http import Server
from tests.rl.serving import serving

SECRET = "sk-do-not-print-me"


class JudgeServer:
    """Likes the longer answer; what `says` makes of that is its reply."""

    def __init__(self):
        self.asked, self.lock = [], threading.Lock()
        self.says = lambda asked, honest: f"Because.\nVerdict: {honest}"
        self.spoil = lambda number, answer: answer

    def answer(self, path, body):
        if path != "/v1/chat/completions":
            return 404, {}, "no such path"
        text = body["messages"][0]["content"]
        a, b = (re.search(rf"<answer_{x}>\n(.*?)\n</answer_{x}>", text, re.DOTALL) for x in "ab")
        honest = "tie"
        if a and len(a[1]) != len(b[1]):
            honest = "A" if len(a[1]) > len(b[1]) else "B"
        reply = self.says(body["messages"], honest)
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]}


@pytest.fixture
def judge_server():
    held = JudgeServer()
    with serving(held) as url:
        yield held, url


def judge_of(url, kind, template=None, timeout=20.0):
    server = Server(url, timeout, attempts=2, wait=0.001, key_variable="JAXTUNE_TEST_KEY")
    return open_judge(url, "judge-1", template, kind, server)


def questions(count):
    return [Question(Completion(f"What is {n}?", f" {n}!"), (1,), f"x:{n}") for n in range(count)]


OURS, THEIRS = ["long one", "a", "same", "xx"], ["one", "longer", " same", "yy"]


def test_two_models_are_compared_in_both_orders(judge_server):
    held, url = judge_server
    found = compare(judge_of(url, COMPARING), questions(4), OURS, THEIRS)
    assert (found["wins"], found["losses"], found["ties"], found["unjudged"]) == (1, 1, 2, 0)
    assert found["win_rate"]["value"] == 0.5 and found["first"] == 0.5
    assert found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    bodies = [body for *_, body in held.asked]
    assert len(bodies) == 6  # the equal answers are not asked about
    texts = [body["messages"][0]["content"] for body in bodies]
    of_first = [text for text in texts if "What is 0?" in text]
    assert sorted(text.index("long one") < text.index("\none\n") for text in of_first) == [0, 1]
    assert {body["model"] for body in bodies} == {"judge-1"}
    assert {body["temperature"] for body in bodies} == {0.0}


def test_a_judge_that_takes_the_first_decides_nothing(judge_server):
    held, url = judge_server
    held.says = lambda *_: "Verdict: A"
    found = compare(judge_of(url, COMPARING), questions(4), OURS, THEIRS)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["first"] == 1.0 and found["ties"] == 4


def test_a_judge_is_asked_again_and_nonsense_is_left_out(judge_server):
    held, url = judge_server
    # of the second question, not one reply can be read; of the others the second
    held.says = lambda asked, honest: (
        "Both have their charm." if "What is 1?" in asked[0]["content"] or len(asked) == 1
        else f"**Verdict:** {honest}"
    )  # fmt: skip
    found = compare(judge_of(url, COMPARING), questions(2), OURS[:2], THEIRS[:2])
    assert (found["wins"], found["unjudged"]) == (1, 1)
    assert found["win_rate"]["value"] == 1.0
    lengths = sorted(len(body["messages"]) for *_, body in held.asked)
    assert lengths == [1] * 4 + [3] * (2 + 2 * (ATTEMPTS - 1))
    held.says = lambda *_: "I cannot say."
    with pytest.raises(RequestError, match="--judge: no reply of 'judge-1' has a line 'Verdict"):
        compare(judge_of(url, COMPARING), questions(2), OURS[:2], THEIRS[:2])


def test_answers_are_graded_by_a_rubric(judge_server, tmp_path):
    held, url = judge_server
    template = tmp_path / "rubric.txt"
    template.write_text("Rate {{ answer }} for {{ prompt }}; wanted: {{ wanted }}.")
    held.says = lambda asked, _: f"Grade: {3 if 'What is 1?' in asked[0]['content'] else 10}"
    found = grade(judge_of(url, GRADING, str(template)), questions(3), ["x", "y", " z"])
    assert found["grade"]["value"] == pytest.approx(23 / 3)
    assert found["grades"]["10"] == 2 and found["grades"]["3"] == 1 and found["unjudged"] == 0
    texts = {body["messages"][0]["content"] for *_, body in held.asked}
    assert "Rate z for What is 2?; wanted: 2!." in texts


@pytest.mark.parametrize(
    ("kind", "reply", "found"),
    [
        (COMPARING, "verdict: [b].", "b"),
        (COMPARING, "# Verdict: Tie", "tie"),
        (COMPARING, "Verdict: A\nor rather\nVerdict: B", None),
        (COMPARING, "Verdict: A or B", None),
        (COMPARING, "The verdict: A", None),
        (COMPARING, "Verdict: C", None),
        (GRADING, "**Grade:** 10/10", "10"),
        (GRADING, "Grade: 7.5", None),
        (GRADING, "Grade: 100", None),
        (GRADING, "", None),
    ],
)
def test_a_verdict_is_read_from_its_line_alone(kind, reply, found):
    assert verdict(kind, reply) == found


def test_a_server_that_fails_is_one_line(judge_server, monkeypatch):
    held, url = judge_server
    monkeypatch.setenv("JAXTUNE_TEST_KEY", SECRET)
    held.spoil = lambda number, answer: answer if number > 1 else (503, {}, "busy")
    compare(judge_of(url, COMPARING), questions(1), ["aa"], ["a"])  # tried again
    held.spoil = lambda number, answer: (401, {}, f"wrong key {SECRET}")
    with pytest.raises(RequestError, match=r"--judge: .*HTTP 401.*wrong key …") as told:
        compare(judge_of(url, COMPARING), questions(1), ["aa"], ["a"])
    assert SECRET not in str(told.value)
    held.spoil = lambda number, answer: {"choices": []}
    with pytest.raises(RequestError, match="the answer is not a chat completion"):
        grade(judge_of(url, GRADING), questions(1), ["a"])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, {}, "<html>welcome</html>"), "the answer is not a chat completion"),
        ({"choices": [{"message": {"content": None}}]}, "the answer is not a chat completion"),
        ((0, {}, "1"), r"no answer within 0.2 s \(2 attempts\)"),
        ((500, {}, "out\nof memory"), r"HTTP 500 .*: out of memory \(2 attempts\)"),
        (None, r"cannot be reached: .* \(2 attempts\)"),
    ],
)
def test_whatever_a_server_does_is_told_in_one_line(judge_server, answer, told):
    """No JSON, no text, no answer, an error, and no server at all."""
    held, url = judge_server
    held.spoil = lambda number, _: answer
    url = url if answer is not None else "http://127.0.0.1:9"
    with pytest.raises(RequestError, match=told) as error:
        grade(judge_of(url, GRADING, timeout=0.2), questions(1), ["a"])
    assert "\n" not in str(error.value) and f"--judge: {url}/v1/chat" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ prompt }} {{ a }}", r"does not show \{\{ b \}\}"),
        ("{{ a }} {{ b }} {{ promt }}", r"uses 'promt' \(did you mean 'prompt'"),
        ("one\n{{ a }", r"template.txt:2: --judge_template: is no Jinja template"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path, text, told):
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(RequestError, match=told):
        open_judge("http://x", "m", str(path), COMPARING)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--judge=localhost"], "--judge: expected the URL of a server; got 'localhost'"),
        (["--judge=http://x"], "--judge: needs --judge_model=NAME"),
        (["--judge_model=m"], "--judge_model: needs --judge=URL"),
        (
            ["--judge=http://x", "--judge_model=m", "--judge_template=none"],
            "none: --judge_template: no such file",
        ),
    ],
)
def test_a_wrong_request_is_refused(capsys, flags, told):
    words = ["eval", "--model=m", "--data=jsonl:x", "--format=completion"]
    assert main([*words, *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_verb_judges_what_the_model_writes(judge_server, shared, tmp_path, capsys):
    held, url = judge_server
    held.says = lambda *_: "Grade: 4"
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": p, "completion": " a time"} for p in ("Once upon", "There was")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", f"--model={shared / 'models/stories260k'}", f"--data=jsonl:{data}"]
    words += ["--format=completion", "--dtype=float32", "--json", "--max_new_tokens=4"]
    words += [f"--judge={url}/v1", "--judge_model=judge-1"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["judge"]["grade"]["value"] == 4 and report["answers"]["written"] == 2
    assert "metrics" not in report
    import jaxtune

    lm = jaxtune.load(shared / "models/stories260k", dtype="float32")
    texts = [body["messages"][0]["content"] for *_, body in held.asked]
    for row, written in zip(rows, lm.generate([r["prompt"] for r in rows], 4), strict=True):
        assert any(row["prompt"] in text and written.strip() in text for text in texts)
    # against itself, greedily: the same answers, and nobody is asked
    count = len(held.asked)
    assert main([*words, f"--against={shared / 'models/stories260k'}"]) == 0
    told = json.loads(capsys.readouterr().out)["judge"]
    assert told["ties"] == 2 and told["win_rate"]["value"] == 0.5 and len(held.asked) == count
