"""`jaxtune generate`: completes prompts, or talks in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxtune.cli import arguments, source
from jaxtune.core.errors import RequestError, nearest


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "generate",
        "Completes prompts from the command line or a JSONL file of {prompt}; --chat talks.",
        """jaxtune generate --model=runs/first --max_new_tokens=50 "Once upon a time"
           jaxtune generate --model=MODEL_DIR --adapter=DIR --prompts=in.jsonl --out=out.jsonl
           jaxtune generate --workdir=runs/first --chat""",
    )
    arguments.add_source(parser)
    parser.add_argument("prompt", nargs="*", help="a prompt")
    parser.add_argument(
        "--prompt", dest="prompts_given", action="append", help="a prompt", default=[]
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSONL file of {prompt}")
    parser.add_argument("--out", metavar="FILE", help="write {prompt, completion} lines there")
    parser.add_argument("--json", action="store_true", help="print {prompt, completion} lines")
    parser.add_argument("--chat", action="store_true", help="talk; /reset forgets, /exit leaves")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    arguments.add_sampling(parser, max_new_tokens=64)
    parser.add_argument("--stop", action="append", help="a string that ends a completion")
    parser.add_argument(
        "--batch_size", type=arguments.positive, default=16, help="prompts at a time (16)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation"
    )
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    _check(args)
    found = source.find(split, args)
    prompts = _prompts(args)
    options = arguments.sampling(args)

    from jaxtune.recipes.load import load

    lm = load(str(found.path), adapter=found.adapter, dtype=args.dtype)
    if args.chat:
        chat(lm, options, args.system)
        return 0
    with arguments.flagged(args):
        completions = lm.generate(prompts, **options, batch_size=args.batch_size)
    records = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    _write(records, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    sources = [bool(args.prompt or args.prompts_given), args.prompts is not None, args.chat]
    if sum(sources) != 1:
        raise RequestError("give prompts, --prompts=FILE or --chat: one of them")
    if args.chat and (args.out is not None or args.json):
        raise RequestError("has no output file", key="--chat")
    if args.system is not None and not args.chat:
        raise RequestError("needs --chat", key="--system")
    if args.out is not None:
        out = pathlib.Path(args.out).absolute()
        if not out.parent.is_dir():
            raise RequestError(f"no such directory: {pathlib.Path(args.out).parent}", key="--out")
        if out.is_dir():
            raise RequestError(f"is a directory: {args.out}; name a file", key="--out")
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise RequestError(f"cannot be written to: {out.parent}", key="--out")


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [*args.prompt, *args.prompts_given]
    return read_prompts(pathlib.Path(args.prompts))


def read_prompts(path: pathlib.Path) -> list[str]:
    """Returns the prompts of a JSONL file of {"prompt": text}.

    Raises:
        RequestError: with FILE:LINE.
    """
    if not path.is_file():
        raise RequestError("no such file", where=path)
    prompts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"is not JSON: {error}", where=where) from None
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                hint = nearest("prompt", record) if isinstance(record, dict) else ""
                raise RequestError(f'expected {{"prompt": text}}{hint}', where=where)
            prompts.append(record["prompt"])
    if not prompts:
        raise RequestError("holds no prompt", where=path)
    return prompts


def _write(records: list[dict[str, str]], args: argparse.Namespace) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    if args.out is not None:
        out = pathlib.Path(args.out)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, out)
    elif args.json:
        print("\n".join(lines))
    else:
        for i, record in enumerate(records):
            print(("\n" if i else "") + record["prompt"] + record["completion"])


def chat(lm: Any, options: dict[str, Any], system: str | None) -> None:
    """Reads a user's turns from standard input and prints the model's, until end of file."""
    start = [] if system is None else [{"role": "system", "content": system}]
    if lm.tokenizer.chat_template is None:
        raise RequestError("the tokenizer has no chat template", key="--chat")
    messages = list(start)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"is not UTF-8: {error.reason}", where="standard input") from None
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(start)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = lm.chat(messages, **options)
            messages.append({"role": "assistant", "content": answer})
            print(answer, flush=True)
