"""`jaxtune data doctor`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError

if TYPE_CHECKING:
    from jaxtune.data.doctor.settings import Evaluation, Input, Settings

EXAMPLE = """jaxtune data doctor --data=jsonl:FILE --format=chat --model=MODEL_DIR --seq_len=512 \\
               --html=report.html --fail_on=error"""
_SOURCE = re.compile(r"(?:(?P<name>[A-Za-z_][\w.\-]*)=)?(?P<source>(?:jsonl|text|tfds):.+)", re.S)
# Of a config, these are the config's.
_CONFIGS = ("data", "format", "tokenizer", "model", "template", "seq_len")


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code: 1 if --fail_on is hit."""
    parser = _parser()
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    from jaxtune.data.doctor import kinds
    from jaxtune.data.doctor.fix import FIXABLE

    fatal = kinds.select(args.fail_on, "--fail_on")
    fixed = kinds.select(args.fix_kinds, "--fix_kinds") if args.fix_kinds else FIXABLE
    if args.fix_kinds and args.fix is None:
        raise RequestError("needs --fix=OUT.jsonl", key="--fix_kinds")
    settings = _settings(args, split)

    from rich.console import Console

    from jaxtune.data.doctor.report import failed, summary
    from jaxtune.data.doctor.run import Outputs, examine

    outputs = Outputs(args.json, args.html, args.fix, fixed)
    report = examine(settings, outputs, Console(file=sys.stderr))
    print("\n".join(summary(report)))
    for entry in report.get("fixed", ()):
        print(
            f"written to {entry['file']}: {entry['kept']:,} rows kept ({entry['changed']:,} of "
            f"them changed), {entry['removed']:,} removed; log in {entry['log']}"
        )
    for place in filter(None, (args.json, args.html)):
        print(f"written to {place}")
    hit = failed(report, fatal)
    if hit:
        print(f"jaxtune: data doctor found {', '.join(hit)} (--fail_on)", file=sys.stderr)
    return 1 if hit else 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        "data doctor", "Looks for what is wrong with data before they are trained on.", EXAMPLE
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help=arguments.CONFIG_HELP)
    add(
        "--data",
        metavar="[NAME=]SOURCE",
        action="append",
        help="jsonl:PATH[.gz], text:PATH or tfds:…; several are splits, the first is trained on",
    )
    add("--format", action="append", help="what a record holds; one for all data, or one for each")
    add("--tokenizer", metavar="DIR", help="directory with the tokenizer")
    add("--model", metavar="DIR", help="the same: a model's directory or a run's workdir")
    add("--template", metavar="FILE", help="chat template in place of its own")
    add("--seq_len", type=arguments.positive, help="tokens a row")
    add(
        "--against",
        metavar="NAME=SOURCE[:FIELD]",
        action="append",
        default=[],
        help="an evaluation set that the data must not hold",
    )
    add("--near", type=float, default=0.8, help="Jaccard similarity of near duplicates (0.8)")
    add("--words", metavar="FILE", help="toxic words, one a line")
    add("--groups", metavar="FILE", help='JSON {axis: {group: [words]}} in place of "gender"')
    add("--fail_on", metavar="error|warning|KIND,…", default="", help="exit code 1 if found")
    add("--fix", metavar="OUT.jsonl", help="writes a cleaned copy, and a log of each change")
    add("--fix_kinds", metavar="KIND,…", help="what --fix cleans (all that can be)")
    add("--json", metavar="FILE", help="writes the report")
    add("--html", metavar="FILE", help="writes the report as a page")
    add("--workers", type=arguments.positive, help="processes (one for each core)")
    return parser


def _settings(args: argparse.Namespace, split: arguments.Split) -> Settings:
    from jaxtune.data.doctor.settings import GROUPS, Settings

    if not 0.5 <= args.near <= 1:  # not NaN either
        raise RequestError(f"expected a number from 0.5 to 1; got {args.near}", key="--near")
    if split.config is not None:
        given = [name for name in _CONFIGS if getattr(args, name)]
        if given:
            raise RequestError("is the config's when --config is given", key=f"--{given[0]}")
        from jaxtune.cli import config_file
        from jaxtune.recipes.doctor import of_config

        loaded = config_file.load(split.config, split.overrides)
        config = loaded.resolve()
        with loaded.located():
            about: dict[str, Any] = of_config(config)
    else:
        about = {
            "inputs": _inputs(args.data or [], args.format or []),
            "tokenizer": _directory(args),
            "template": args.template,
            "seq_len": args.seq_len,
        }
    return Settings(
        **about,
        evaluations=tuple(_evaluation(text) for text in args.against),
        near=args.near,
        words=_words(args.words) if args.words else (),
        groups=_groups(args.groups) if args.groups else GROUPS,
        workers=args.workers,
    )


def _inputs(sources: Sequence[str], formats: Sequence[str]) -> tuple[Input, ...]:
    from jaxtune.data.doctor.settings import Input
    from jaxtune.data.formats import check_format

    if not sources:
        raise RequestError("is missing: jsonl:PATH, text:PATH or tfds:…", key="--data")
    if len(formats) not in (1, len(sources)):
        message = "is missing" if not formats else f"is given {len(formats)} times"
        raise RequestError(f"{message}: give one for all data, or one for each", key="--format")
    found: list[Input] = []
    for at, text in enumerate(sources):
        match = _SOURCE.fullmatch(text)
        if match is None:
            raise RequestError(
                f"expected [NAME=]jsonl:PATH, text:PATH or tfds:…; got {text!r}", key="--data"
            )
        name = match["name"] or ("data" if len(sources) == 1 else f"data{at}")
        if name in {item.name for item in found}:
            raise RequestError(f"the name {name!r} is given twice", key="--data")
        format = formats[at % len(formats)]
        check_format(format, "--format")
        found.append(Input(name, match["source"], format, name))
    return tuple(found)


def _directory(args: argparse.Namespace) -> str | None:
    if args.tokenizer and args.model:
        raise RequestError("gives the tokenizer, and so does --tokenizer", key="--model")
    directory = args.tokenizer or args.model
    if directory is None:
        for name in ("template", "seq_len"):
            if getattr(args, name):
                raise RequestError("needs --tokenizer or --model", key=f"--{name}")
        return None
    from jaxtune.checkpoints.hub import local_directory

    return str(local_directory(directory, "--tokenizer" if args.tokenizer else "--model"))


def _evaluation(text: str) -> Evaluation:
    from jaxtune.data.doctor.settings import Evaluation

    match = _SOURCE.fullmatch(text)
    if match is None or not match["name"]:
        raise RequestError(f"expected NAME=SOURCE[:FIELD]; got {text!r}", key="--against")
    source, field = match["source"], None
    head, _, tail = source.rpartition(":")
    # A file of that very name wins; so does the split of a dataset.
    if not source.startswith("tfds:") and re.fullmatch(r"[A-Za-z_]\w*", tail) and ":" in head:
        path = Path(source.partition(":")[2])
        if not path.exists():
            source, field = head, tail
    return Evaluation(match["name"], source, field)


def _words(path: str) -> tuple[str, ...]:
    words = {line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()}
    words -= {""}
    if not words:
        raise RequestError("holds no word", key="--words", where=path)
    return tuple(sorted(words))


def _groups(path: str) -> dict[str, dict[str, tuple[str, ...]]]:
    wrong = RequestError('expected JSON {"axis": {"group": ["word"]}}', key="--groups", where=path)
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}", key="--groups", where=path) from error
    if not isinstance(table, dict):
        raise wrong
    out: dict[str, dict[str, tuple[str, ...]]] = {}
    for axis, groups in table.items():
        if not isinstance(groups, dict) or not groups:
            raise wrong
        for group, words in groups.items():
            if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
                raise wrong
            out.setdefault(axis, {})[group] = tuple(word.lower() for word in words)
    return out
