"""Command-line arguments that the verbs share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jaxtune.core.errors import RequestError, nearest
from jaxtune.core.places import is_remote, place

CONFIG_HELP = "a config and its argument; --config.KEY=VALUE sets any key of it"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are RequestErrors and whose help ends with an example."""

    def __init__(self, verb: str, description: str, example: str):
        super().__init__(
            prog=f"jaxtune {verb}",
            description=description,
            epilog=f"example:\n{_indent(example)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises the RequestError that `main` prints as one line."""
        raise RequestError(f"{self.prog}: {message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of argv; an unknown flag is an error with the nearest valid one."""
        args, unknown = self.parse_known_args(list(argv))
        if unknown:
            flag = unknown[0].partition("=")[0]
            valid = [name for action in self._actions for name in action.option_strings]
            kind = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {kind} {flag}{nearest(flag, valid)}")
        return args


def _indent(text: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in text.strip().splitlines())


@dataclasses.dataclass(frozen=True)
class Split:
    """The command line, taken apart.

    Attributes:
        config: FILE[:ARG] of `--config`, or None.
        overrides: (key, text) of each `--config.key=text`, in order.
        sweeps: (key, text) of each `--sweep.key=text`, in order.
        rest: all other arguments.
    """

    config: str | None
    overrides: tuple[tuple[str, str], ...]
    sweeps: tuple[tuple[str, str], ...]
    rest: tuple[str, ...]


def split(argv: Sequence[str], *, sweep: bool = False) -> Split:
    """Takes `--config…` (and `--sweep.…`) out of the arguments, in both forms, `=` and a space.

    Raises:
        RequestError: for a flag without value, a second `--config`, or a key without `--config`.
    """
    config: str | None = None
    found: dict[str, list[tuple[str, str]]] = {"config": [], "sweep": []}
    rest: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += [word, *queue]
            break
        match = re.fullmatch(r"--?(no)?(config|sweep)(?:\.([^=]+))?(?:=(.*))?", word, re.DOTALL)
        if match is None or (match[2] == "sweep" and not sweep):
            rest.append(word)
            continue
        negated, kind, key, text = match.groups()
        flag = word.partition("=")[0]
        if text is None:
            text = _value(flag, kind, key, bool(negated), queue)
        if key is not None:
            found[kind].append((key, text))
        elif kind == "sweep":
            raise RequestError("expected --sweep.KEY=VALUE,VALUE")
        elif config is not None:
            raise RequestError(f"--config is given twice: {config} and {text}")
        else:
            config = text
    if found["config"] and config is None:
        raise RequestError(f"--config.{found['config'][0][0]} needs --config=FILE")
    return Split(config, tuple(found["config"]), tuple(found["sweep"]), tuple(rest))


def _value(flag: str, kind: str, key: str | None, negated: bool, queue: list[str]) -> str:
    from jaxtune.recipes.schema.overrides import declared

    if kind == "config" and key is not None:
        known = declared(key)
        if negated or (known is not None and known.kind == "bool"):
            return "false" if negated else "true"
    if not queue or queue[0].startswith("--"):
        raise RequestError(f"{flag} needs a value: {flag}=…")
    return queue.pop(0)


def positive(text: str) -> int:
    """An integer ≥ 1, for argparse."""
    value = int(text)
    if not 1 <= value < 2**31:
        most = "" if value < 1 else " and < 2**31"
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1{most}; got {text}")
    return value


positive.__name__ = "integer"


def add_source(parser: Parser) -> None:
    """Adds --config, --workdir, --model and --adapter: what a verb reads a model from."""
    parser.add_argument("--config", metavar="FILE[:ARG]", help=CONFIG_HELP)
    parser.add_argument("--workdir", metavar="DIR", help="directory of a run")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory or a run's workdir")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT directory on top of --model")


def add_distributed(parser: Parser) -> None:
    """Adds --distributed: this process's place among several."""
    parser.add_argument(
        "--distributed",
        metavar="auto|none|HOST:PORT,COUNT,INDEX",
        default="auto",
        help="the processes of the run: those of a cluster that is found, none, or as given (auto)",
    )


SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def add_sampling(parser: Parser, *, max_new_tokens: int, temperature: float = 0.0) -> None:
    """Adds the flags of drawing tokens, None where they are not given.

    Args:
        parser: of the verb.
        max_new_tokens, temperature: the defaults, for the help.
    """
    parser.add_argument(
        "--max_new_tokens", type=positive, help=f"the most tokens of a text ({max_new_tokens})"
    )
    parser.add_argument("--temperature", type=float, help=f"0 is greedy ({temperature:g})")
    parser.add_argument("--top_p", type=float, help="nucleus (1)")
    parser.add_argument("--top_k", type=int, help="0 is off (0)")
    parser.add_argument("--seed", type=int, help="of the sampling (0)")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns those of the flags SAMPLING that the verb has and that were given.

    Raises:
        RequestError: a value out of range.
    """
    flags = {name: getattr(args, name, None) for name in SAMPLING}
    given = {name: value for name, value in flags.items() if value is not None}
    temperature, top_p = given.get("temperature", 0.0), given.get("top_p", 1.0)
    if not 0 <= temperature < math.inf:
        raise RequestError(f"expected a number ≥ 0; got {temperature}", key="--temperature")
    if not 0 < top_p <= 1:
        raise RequestError(f"expected a number > 0 and ≤ 1; got {top_p}", key="--top_p")
    for name, most in (("top_k", 2**31 - 1), ("seed", 2**32 - 1)):
        if not 0 <= given.get(name, 0) <= most:
            raise RequestError(
                f"expected an integer ≥ 0, ≤ {most}; got {given[name]}", key=f"--{name}"
            )
    if "" in given.get("stop", ()):
        raise RequestError("a stop string must not be empty", key="--stop")
    return given


def names(text: str) -> tuple[str, ...]:
    """The names of a list with commas, for argparse."""
    found = tuple(filter(None, (name.strip() for name in text.split(","))))
    if not found:
        raise argparse.ArgumentTypeError(f"expected names with commas between them; got {text!r}")
    return found


@contextlib.contextmanager
def flagged(args: argparse.Namespace) -> Iterator[None]:
    """Writes the key of a RequestError as its flag, `--format` for `format`."""
    try:
        yield
    except RequestError as error:
        if error.key not in vars(args):
            raise
        raise RequestError(error.message, key=f"--{error.key}", where=error.where) from None


def require_workdir(workdir: str | None, *, remote: bool = False) -> pathlib.Path:
    """Returns the workdir as a path.

    Args:
        workdir: what was given.
        remote: whether it may lie in an object store.

    Raises:
        RequestError: if it is not given, or is not a directory.
    """
    if workdir is None:
        raise RequestError("--workdir=DIR is missing: the directory that the run lives in")
    if is_remote(workdir):
        if not remote:
            raise RequestError("must be a directory on disk", key="--workdir", where=workdir)
        return place(workdir, "--workdir")
    path = pathlib.Path(workdir)
    taken = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if not workdir or taken is not None:
        raise RequestError("is not a directory", key="--workdir", where=taken)
    return path
