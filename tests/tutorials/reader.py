"""A reader who goes through pages of docs/tutorials: `python -m tests.tutorials.reader PAGE ...`.

Apart from the tests, whose conftest makes eight devices where a reader has one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from jaxtune.recipes.quickstart import story, texts
from jaxtune.recipes.quickstart.tokenizer import train_tokenizer
from tests.tutorials.runner import run

PAGES = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
PRETRAIN_STEPS = 60  # the pages' base need not know much, only be a language model


def pretrain(workdir: Path) -> None:
    """Makes the part of `runs/quickstart` that the pages use, from a shorter pretraining."""
    from jaxtune.recipes.load import load
    from jaxtune.recipes.train import train

    paths = texts.write(workdir / "texts")
    corpus = story._fields(paths["corpus"], "text")
    tokenizer = train_tokenizer(corpus, workdir / "tokenizer")
    config = story.pretrain_config(paths, tokenizer, PRETRAIN_STEPS)
    config["data"]["eval"], config["eval"] = [], {}
    assert train(config, workdir / "pretrain").summary["stop_reason"] == "finished"
    load(workdir / "pretrain", dtype="float32").save(workdir / "base")


def read_on() -> None:
    """Follows the pages in the current directory, and notes in `told.json` how each one ended.

    All in one process, since a start of Python with JAX costs as much as a page.
    """
    if not Path("runs/quickstart").exists():
        pretrain(Path("runs/quickstart").absolute())
    told = {}
    for page in sys.argv[1:]:
        try:
            run((PAGES / f"{page}.md").read_text(encoding="utf-8"), os.environ)
            told[page] = ""
        except (Exception, SystemExit):  # a verb on the page may exit
            told[page] = traceback.format_exc()
        Path("told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    read_on()
