"""Config → what the data doctor looks at."""

from __future__ import annotations

from typing import Any

from jaxtune.data.doctor.settings import Input


def of_config(config: Any) -> dict[str, Any]:
    """Returns the inputs, tokenizer, template and seq_len of a resolved config.

    All of `data.train` is one split; each entry of `data.eval` is one of its own.
    """
    data = config.data
    inputs = [
        Input(f"train{i}" if len(data.train) > 1 else "train", entry.source, entry.format, "train",
              f"data.train[{i}]")
        for i, entry in enumerate(data.train)
    ]  # fmt: skip
    inputs += [
        Input(f"eval.{entry.name}", entry.source, entry.format, f"eval.{entry.name}",
              f"data.eval[{i}]")
        for i, entry in enumerate(data.eval)
    ]  # fmt: skip
    directory = config.model.tokenizer or config.model.path
    tokenizer = None
    if directory:
        from jaxtune.checkpoints.hub import local_directory

        tokenizer = str(local_directory(directory, "model.path"))
    return {
        "inputs": tuple(inputs),
        "tokenizer": tokenizer,
        "template": data.template,
        "seq_len": data.seq_len,
    }
