"""The command `jaxtune`: picks the verb, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from jaxtune.core.errors import RequestError, RunFailure, nearest, shortened

VERBS = {
    "train": "runs or continues the run in the workdir",
    "eval": "loss and perplexity of a model or run on data; tasks",
    "generate": "completes prompts; --chat talks in the terminal",
    "export": "writes weights or adapter for other tools",
    "plan": "memory, time and money of a config before it runs",
    "data": "prepare (JSONL to TFDS dataset), inspect (tokens, masks), doctor (faults)",
    "sweep": "runs a config's trials and ranks them",
    "diff": "what differs between two runs",
    "quickstart": "the whole story on built-in data in a few minutes",
}

USAGE = """usage: jaxtune VERB [flags]

Adapts pretrained language models with JAX.

verbs:
{verbs}

example:
  jaxtune train --config=configs/sft_lora.py --config.model.path=MODEL_DIR \\
      '--config.data.train[0].source=jsonl:FILE' --workdir=runs/first

jaxtune VERB --help tells more. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0 done; 1 the run failed; 2 the request was wrong; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _hush_absl()
    code, failure = _run(arguments)
    if "jaxtune.parallel.processes" in sys.modules:
        _part(code, failure)
    return code


def _run(arguments: list[str]) -> tuple[int, BaseException | None]:
    """Returns the exit code, and the error that ended the verb, which was told."""
    try:
        return _dispatch(arguments), None
    except RequestError as error:
        print(f"jaxtune: error: {error}", file=sys.stderr)
        return 2, error
    except RunFailure as error:
        said = "; ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"jaxtune: failed: {' '.join(said.split())}", file=sys.stderr)
        return 1, error
    except KeyboardInterrupt as error:
        print("jaxtune: interrupted", file=sys.stderr)
        return 130, error
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0, None
    except OSError as error:
        # A file that the request names cannot be read or written. What a run meets once it has
        # begun is its own failure, and its note says so.
        if error.filename is None or getattr(error, "__notes__", None):
            return _failed(), error
        name = shortened(os.fsdecode(error.filename)) if _is_path(error.filename) else "file"
        print(f"jaxtune: error: {name}: {error.strerror}", file=sys.stderr)
        return 2, error
    except SystemExit as stop:  # argparse leaves this way after --help
        return (stop.code if isinstance(stop.code, int) else 0), None
    except Exception as error:
        return _failed(), error


def _part(code: int, failure: BaseException | None) -> None:
    """Tells the other processes of the run, if there are any, how this one ends."""
    from jaxtune.parallel import processes

    if not processes.joined():
        return
    processes.part(failure, code)
    if failure is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # JAX would wait for the others, who end as well


def _failed() -> int:
    traceback.print_exc()
    print("jaxtune: failed; the reason stands above", file=sys.stderr)
    return 1


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def _hush_absl() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_worth_telling)
    logging.basicConfig(handlers=[handler])


def _worth_telling(record: logging.LogRecord) -> bool:
    """Leaves out what Orbax, Grain and TFDS remark through absl's logger; their errors stay.

    An exception they log is raised as well, and told where it is caught.
    """
    return record.name != "absl" or (record.levelno >= logging.ERROR and not record.exc_info)


def _dispatch(arguments: list[str]) -> int:
    verbs = "\n".join(f"  {name:11} {text}" for name, text in VERBS.items())
    usage = USAGE.format(verbs=verbs)
    if not arguments:
        print(usage, file=sys.stderr)
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help", "help"):
        print(usage)
        return 0
    if verb == "--version":
        from importlib import metadata

        try:
            version = metadata.version("jaxtune")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"jaxtune {version}")
        return 0
    if verb not in VERBS:
        raise RequestError(
            f"unknown verb {verb!r}{nearest(verb, VERBS)}; valid: {', '.join(VERBS)}"
        )
    return importlib.import_module(f"jaxtune.cli.{verb}").run(rest)


if __name__ == "__main__":
    sys.exit(main())
