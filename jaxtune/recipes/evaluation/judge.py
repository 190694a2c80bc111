"""Another language model as a judge, behind a server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.meta
import jinja2.sandbox

from jaxtune.core.errors import RequestError, nearest
from jaxtune.rl.http import Server, ServerError

CHAT = "/v1/chat/completions"
ATTEMPTS = 3  # at a verdict that can be read
REPLY = 1024  # the most tokens of one

COMPARE = """Which of two answers to the same prompt is better? Judge how correct, helpful and \
clear they are. Neither their length nor their order matters.

<prompt>
{{ prompt }}
</prompt>
<answer_a>
{{ a }}
</answer_a>
<answer_b>
{{ b }}
</answer_b>

Say in a few sentences why. Then end with one line: Verdict: A, Verdict: B, or Verdict: tie."""

GRADE = """Grade an answer to a prompt from 1 (wrong or useless) to 10 (as good as it can be). A \
reference shows what is wanted; another answer may be as good.

<prompt>
{{ prompt }}
</prompt>
<reference>
{{ wanted }}
</reference>
<answer>
{{ answer }}
</answer>

Say in a few sentences why. Then end with one line: Grade: N."""

_LINE = r"^[\s*_#]*{word}[\s*_]*:[\s*_]*\[?({values})\]?(?:\s*/\s*10)?[\s*_.]*$"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is asked of a judge.

    Attributes:
        word: before the verdict on its line.
        line: finds the lines with a verdict in a reply.
        template: by default.
        needed: names that a template must use.
        known: names that it may use.
    """

    word: str
    line: re.Pattern[str]
    template: str
    needed: frozenset[str]
    known: frozenset[str]


def _kind(word: str, values: str, template: str, needed: Sequence[str]) -> Kind:
    line = re.compile(_LINE.format(word=word, values=values), re.IGNORECASE | re.MULTILINE)
    return Kind(word, line, template, frozenset(needed), frozenset({"prompt", "wanted", *needed}))


COMPARING = _kind("Verdict", "A|B|tie", COMPARE, ("a", "b"))
GRADING = _kind("Grade", "10|[1-9]", GRADE, ("answer",))


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge.

    Attributes:
        server: where.
        model: the name by which the server knows it.
        kind: what is asked.
        template: Jinja text of the request.
    """

    server: Server
    model: str
    kind: Kind
    template: str

    def ask(self, fields: Mapping[str, str]) -> str | None:
        """Returns the verdict, in lower case; None where no reply has one.

        Args:
            fields: of the template.

        Raises:
            ServerError: no answer, a refusal, or no chat completion.
        """
        environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
        asked = environment.from_string(self.template).render(fields)
        messages = [{"role": "user", "content": asked}]
        for _ in range(ATTEMPTS):
            reply = self._reply(messages)
            found = verdict(self.kind, reply)
            if found is not None:
                return found
            again = f"Give your verdict alone, as one line that begins with '{self.kind.word}: '."
            messages = [
                *messages[:1],
                {"role": "assistant", "content": reply or "…"},
                {"role": "user", "content": again},
            ]
        return None

    def _reply(self, messages: Sequence[Mapping[str, str]]) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0.0,
            "max_tokens": REPLY,
            "seed": 0,
        }
        answer = self.server.post(CHAT, body)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            url = self.server.url.rstrip("/")
            raise ServerError(f"{url}{CHAT}: the answer is not a chat completion")
        return text


def verdict(kind: Kind, reply: str) -> str | None:
    """Returns what a reply says on its line of verdict; None without one, or with several that
    differ.

    >>> verdict(COMPARING, "B is longer.\\n**Verdict: A**"), verdict(COMPARING, "I like A.")
    ('a', None)
    >>> verdict(GRADING, "Grade: 7/10"), verdict(GRADING, "Grade: 11"), verdict(GRADING, "Grade: 0")
    ('7', None, None)
    """
    found = {match.lower() for match in kind.line.findall(reply)}
    return found.pop() if len(found) == 1 else None


def open_judge(
    url: str, model: str | None, template: str | None, kind: Kind, server: Server | None = None
) -> Judge:
    """Returns the judge that was asked for.

    Args:
        url: of the server's root.
        model: the name by which it knows the judge.
        template: file of a Jinja template, or None for the default.
        kind: COMPARING or GRADING.
        server: in place of one with the usual patience.

    Raises:
        RequestError: no URL, no model, or a template that cannot be read or lacks an answer.
    """
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"expected the URL of a server; got {url!r}", key="--judge")
    if model is None:
        raise RequestError("needs --judge_model=NAME, as the server knows it", key="--judge")
    text = kind.template if template is None else read_template(Path(template), kind)
    # The protocol's own clients take the URL with its version.
    root = url.rstrip("/").removesuffix("/v1")
    return Judge(server or Server(root), model, kind, text)


def read_template(path: Path, kind: Kind) -> str:
    """Returns the text of a template; RequestError if it cannot be used."""
    if not path.is_file():
        raise RequestError("no such file", key="--judge_template", where=path)
    try:
        text = path.read_text(encoding="utf-8")
        names = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
    except UnicodeDecodeError as error:
        raise RequestError(f"is not UTF-8: {error}", key="--judge_template", where=path) from None
    except jinja2.TemplateSyntaxError as error:
        where = f"{path}:{error.lineno}"
        raise RequestError(
            f"is no Jinja template: {error.message}", key="--judge_template", where=where
        ) from None
    for name in sorted(names - kind.known):
        raise RequestError(
            f"uses {name!r}{nearest(name, kind.known)}; there are {', '.join(sorted(kind.known))}",
            key="--judge_template",
            where=path,
        )
    for name in sorted(kind.needed - names):
        raise RequestError(f"does not show {{{{ {name} }}}}", key="--judge_template", where=path)
    return text
