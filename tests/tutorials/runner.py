"""Runs the fenced blocks of a page in order, in the current directory, as its reader would.

    python -m tests.tutorials.runner PAGE.md ... [--write]

`bash` blocks of nothing but `jaxtune` lines run in this process, one line after the other, which
saves a start of Python for each; other `bash` blocks run in bash; `python` blocks share one
namespace, as in a session. The first failure ends it. With `--write` a `text` block is replaced by
what the block before it printed, so that no figure of a page is typed by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and where the text stands."""

    language: str
    text: str
    start: int
    end: int


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, in order.

    >>> [(b.language, b.text) for b in blocks("a\\n```bash\\nls\\n```\\nb")]
    [('bash', 'ls\\n')]
    """
    return [Block(m[1], m[2], m.start(2), m.end(2)) for m in FENCE.finditer(page)]


def lines(script: str) -> list[str]:
    """Returns the commands of a script, those that go on after a backslash as one.

    >>> lines("a \\\\\\n  b\\n\\nc")
    ['a b', 'c']
    """
    joined = re.sub(r"\\\n\s*", "", script)
    return [line for line in joined.splitlines() if line.strip()]


def run_jaxtune(line: str) -> None:
    """Runs `jaxtune VERB … [> FILE] [|| true]` in this process.

    Raises:
        AssertionError: it ended with another exit code than 0, and `|| true` is not there.
    """
    from jaxtune.cli.main import main

    words = shlex.split(line)[1:]
    forgiven = words[-2:] == ["||", "true"]
    words = words[:-2] if forgiven else words
    target = words[-1] if words[-2:-1] == [">"] else None
    words = words[:-2] if target else words
    assert not {"|", "||", "&&", ";", ">", ">>"} & set(words), f"not understood: {line}"
    with contextlib.ExitStack() as stack:
        if target:
            file = stack.enter_context(Path(target).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        code = main(words)
    assert code == 0 or forgiven, f"exit code {code}: {line}"


def run_block(block: Block, namespace: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Runs one block of a language that can be run; others are for the reader alone."""
    if block.language == "python":
        exec(compile(block.text, "<block>", "exec"), namespace)
    elif block.language == "bash":
        commands = lines(block.text)
        if all(line.startswith("jaxtune ") for line in commands):
            for line in commands:
                run_jaxtune(line)
        else:
            script = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="")
            assert done.returncode == 0, f"exit code {done.returncode}: {block.text}"


def run(page: str, environment: Mapping[str, str]) -> str:
    """Runs the blocks of a page, and returns the page with what they printed.

    Args:
        page: Markdown; a `text` block holds what the block before it prints.
        environment: of the bash blocks.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parts, at, printed = [], 0, ""
    for block in blocks(page):
        if block.language == "text":
            parts += [page[at : block.start], f"{printed.strip(chr(10))}\n"]
            at = block.end
            continue
        told, started = io.StringIO(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(told):
                run_block(block, namespace, environment)
        finally:
            printed = told.getvalue()
            print(block.text, printed, sep="\n")
            print(f"# {time.perf_counter() - started:.1f} s\n", flush=True)
    return "".join([*parts, page[at:]])


def main() -> None:
    """Runs the pages that the command line names."""
    write = "--write" in sys.argv
    for name in sys.argv[1:]:
        if name != "--write":
            path = Path(name)
            after = run(path.read_text(encoding="utf-8"), os.environ)
            if write:
                path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
