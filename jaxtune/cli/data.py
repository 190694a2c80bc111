"""`jaxtune data`: prepare, inspect, doctor, teacher and replay."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError, nearest

ACTIONS = ("prepare", "inspect", "doctor", "teacher", "replay")

USAGE = """usage: jaxtune data ACTION [flags]

actions:
  prepare  writes a JSONL file as a TFDS dataset
  inspect  shows tokens in colour, with mask, role and segment
  doctor   looks for what is wrong with data: repeats, leaks, damage, lengths, personal data
  teacher  writes what a model says of each target, for distillation
  replay   writes what a model writes by itself, to mix in or to be retained

example:
  jaxtune data prepare --source=jsonl:FILE --format=chat --out=datasets --name=mine
  jaxtune data inspect --source=jsonl:FILE --format=chat --model=MODEL_DIR
  jaxtune data doctor --data=jsonl:FILE --format=chat --model=MODEL_DIR --html=report.html"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    action, *rest = argv or ("",)
    if action in ("-h", "--help"):
        print(USAGE)
        return 0
    if action not in ACTIONS:
        hint = nearest(action, ACTIONS)
        raise RequestError(
            f"jaxtune data: expected {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}; got "
            f"{action!r}{hint}"
        )
    if action in ("doctor", "teacher", "replay"):
        return importlib.import_module(f"jaxtune.cli.{action}").run(rest)
    return _prepare(rest) if action == "prepare" else _inspect(rest)


def _prepare(argv: Sequence[str]) -> int:
    parser = arguments.Parser(
        "data prepare",
        "Checks every record of a source and writes them as a TFDS dataset.",
        """jaxtune data prepare --source=jsonl:FILE --format=chat --out=datasets --name=mine \\
             --splits=train=0.9,test=0.1""",
    )
    parser.add_argument("--source", metavar="SOURCE", help="jsonl:PATH[.gz] or another source")
    parser.add_argument("--format", metavar="FORMAT", help="what a record holds")
    parser.add_argument("--out", metavar="DIR", help="directory of datasets")
    parser.add_argument("--name", help="of the dataset: lower-case letters, digits, _")
    parser.add_argument("--splits", metavar="NAME=SHARE,…", default="train=1", help="(train=1)")
    parser.add_argument("--seed", type=int, default=0, help="of the division into splits (0)")
    args = parser.parse(argv)
    _check_source(args)
    for name in ("out", "name"):
        if getattr(args, name) is None:
            raise RequestError("is missing", key=f"--{name}")
    splits = _splits(args.splits)

    from jaxtune.data.prepare import prepare

    report = prepare(args.source, args.format, args.out, args.name, splits=splits, seed=args.seed)
    print(f"written to {report['directory']}")
    for split, size in report["splits"].items():
        print(f"  tfds:{args.out}/{args.name}:{split}  {size} examples")
    return 0


def _check_source(args: argparse.Namespace) -> None:
    from jaxtune.recipes.schema.keys import TRAIN_ENTRY
    from jaxtune.recipes.schema.values import check

    for key in TRAIN_ENTRY[:2]:
        value = getattr(args, key.name)
        if value is None:
            raise RequestError(f"is missing: {key.doc}", key=f"--{key.name}")
        check(key, value, f"--{key.name}")


def _splits(text: str) -> dict[str, float]:
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            raise RequestError(
                f"expected NAME=SHARE,NAME=SHARE; got {text!r}", key="--splits"
            ) from None
        if not 0 < value <= 1:  # not NaN either
            raise RequestError(f"expected shares > 0, ≤ 1; got {text!r}", key="--splits")
        if not name or name in splits:
            raise RequestError(f"each split needs a name of its own; got {text!r}", key="--splits")
        splits[name] = value
    return splits


def _inspect(argv: Sequence[str]) -> int:
    parser = arguments.Parser(
        "data inspect",
        "Shows the first examples of a source, or the first rows that a config trains on.",
        """jaxtune data inspect --source=jsonl:FILE --format=chat --model=MODEL_DIR
           jaxtune data inspect --config=configs/sft_lora.py --config.model.path=MODEL_DIR \\
             '--config.data.train[0].source=jsonl:FILE' --count=5""",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=arguments.CONFIG_HELP)
    parser.add_argument("--source", metavar="SOURCE", help="jsonl:PATH, text:PATH or tfds:…")
    parser.add_argument("--format", metavar="FORMAT", help="what a record holds")
    parser.add_argument("--model", metavar="DIR", help="directory with the tokenizer")
    parser.add_argument("--template", metavar="FILE", help="chat template in place of its own")
    parser.add_argument("--seq_len", type=arguments.positive, default=2048, help="(2048)")
    parser.add_argument("--count", type=arguments.positive, default=3, help="how many (3)")
    parser.add_argument("--start", type=int, default=0, help="the first (0)")
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    if args.start < 0:
        raise RequestError(f"expected an integer ≥ 0; got {args.start}", key="--start")
    if split.config is not None:
        given = [name for name in ("source", "format", "model", "template") if getattr(args, name)]
        if given:
            raise RequestError("is the config's when --config is given", key=f"--{given[0]}")
        from jaxtune.cli import config_file

        loaded = config_file.load(split.config, split.overrides)
        config = loaded.resolve()
        with loaded.located():
            _show(*_stream(config), args)
        return 0
    _check_source(args)
    if args.model is None and args.format != "tokens":
        raise RequestError("is missing: the directory with the tokenizer", key="--model")
    _show(*_store(args), args)
    return 0


def _show(data: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    from jaxtune.data.inspect import inspect

    inspect(data, tokenizer, args.count, start=args.start)


def _tokenizer(directory: str, template: str | None) -> Any:
    """Loads the tokenizer of a model, or of a run, which keeps its own."""
    from jaxtune.checkpoints.hub import local_directory
    from jaxtune.data.tokenizer import load_tokenizer

    directory = local_directory(directory, "model.path")
    own = directory / "tokenizer"
    return load_tokenizer(own if own.is_dir() else directory, template)


def _store(args: argparse.Namespace) -> tuple[Any, Any]:
    from jaxtune.data.sources import open_source
    from jaxtune.data.store import tokenize

    tokenizer = None if args.model is None else _tokenizer(args.model, args.template)
    source = open_source(args.source, "--source")
    if args.format == "prompt":
        from jaxtune.data.prompts import Prompts, read_prompts

        prompts = read_prompts(source, tokenizer, max_prompt=args.seq_len, key="--source")
        return Prompts((prompts,), shuffle=False), tokenizer
    store = tokenize(
        source,
        args.format,
        tokenizer,
        seq_len=args.seq_len,
        vocab_size=None if tokenizer else 2**31 - 1,
        key="--source",
        keep_roles=True,
    )
    return store, tokenizer


def _stream(config: Any) -> tuple[Any, Any]:
    from jaxtune.data.sources import open_source
    from jaxtune.data.store import tokenize
    from jaxtune.data.stream import Stream
    from jaxtune.recipes.schema.formats import splits_pairs

    data = config.data
    directory = config.model.tokenizer or config.model.path
    needs = any(entry.format != "tokens" for entry in data.train)
    tokenizer = _tokenizer(directory, data.template) if directory and needs else None
    virtual = _virtual(config) if config.peft.method == "prompt" else 0
    if any(entry.format == "prompt" for entry in data.train):
        return _prompts(config, virtual), tokenizer
    stores = [
        tokenize(
            open_source(entry.source, f"data.train[{i}].source"),
            entry.format,
            tokenizer,
            seq_len=data.seq_len,
            overlong=data.overlong,
            num_virtual=virtual,
            vocab_size=None if tokenizer else 2**31 - 1,
            key=f"data.train[{i}]",
            keep_roles=True,
            shared=data.packing,
            split_pairs=splits_pairs(config.objective.name, entry.format),
        )
        for i, entry in enumerate(data.train)
    ]
    stream = Stream(
        stores,
        [entry.weight for entry in data.train],
        seq_len=data.seq_len,
        packing=data.packing,
        shuffle=data.shuffle,
        seed=config.seed,
        num_virtual=virtual,
    )
    return stream, tokenizer


def _prompts(config: Any, virtual: int) -> Any:
    """Returns the prompts of a config, in the order in which a run takes them."""
    from jaxtune.data.prompts import Prompts
    from jaxtune.recipes.prompt_data import open_one
    from jaxtune.recipes.runs import open_base

    data, base = config.data, open_base(config.model, config.seed, config.data.template)
    return Prompts(
        tuple(
            open_one(entry, config, base, virtual, f"data.train[{i}]")
            for i, entry in enumerate(data.train)
        ),
        tuple(entry.weight for entry in data.train),
        shuffle=data.shuffle,
        seed=config.seed,
    )


def _virtual(config: Any) -> int:
    """Returns how many virtual tokens a prompt has, which peft.init_from may say."""
    if "num_tokens" in config.peft:
        return config.peft.num_tokens
    from jaxtune.recipes.build import method_of
    from jaxtune.recipes.runs import open_base

    return method_of(config, open_base(config.model, config.seed)).num_virtual
