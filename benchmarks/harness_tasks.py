"""Tasks of lm-evaluation-harness on local files, for comparisons without a network.

    python -m benchmarks.harness_tasks ../shared/data/eval DIR

writes into DIR a JSONL file and a YAML for each of TASKS; `jaxtune eval --include_path=DIR` and
`lm_eval --include_path DIR` read them.
"""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX = "local_"
# Of each multiple-choice task: its file, and the text between question and choice.
CHOICES = {
    "arc_easy": ("arc_easy.jsonl.gz", "\nAnswer:"),
    "piqa": ("piqa.jsonl.gz", "Answer:"),
    "copa": ("copa.jsonl", ""),
    "boolq": ("boolq.jsonl.gz", "\nAnswer:"),
    "hellaswag": ("hellaswag_val.txt.bz2", ""),
}
TASKS = tuple(PREFIX + name for name in (*CHOICES, "lambada", "lambada_rolling", "lambada_words"))

# Metric → how it is put together, and whether more is better.
METRICS = {
    "multiple_choice": {"acc": ("mean", True), "acc_norm": ("mean", True)},
    "loglikelihood": {"acc": ("mean", True), "perplexity": ("perplexity", False)},
    "loglikelihood_rolling": {
        "word_perplexity": ("weighted_perplexity", False),
        "byte_perplexity": ("weighted_perplexity", False),
        "bits_per_byte": ("bits_per_byte", False),
    },
    "generate_until": {"exact_match": ("mean", True)},
}
FIELDS = {
    "multiple_choice": {
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    "loglikelihood": {"doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}"},
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{context + ' ' + continuation}}",
    },
    "generate_until": {
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12},
    },
}


def hellaswag(text: str) -> Iterator[dict[str, Any]]:
    """Yields the records of HellaSwag's text form: context, label and four endings a record."""
    lines = text.splitlines()
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        yield {"query": context, "choices": endings, "gold": int(gold)}


def records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file of `shared/data/eval`."""
    data = path.read_bytes()
    if path.suffix == ".bz2":
        return list(hellaswag(bz2.decompress(data).decode()))
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def write(
    data: Path, directory: Path, fits: Callable[[str], bool] = lambda text: True
) -> dict[str, int]:
    """Writes the tasks and their data into a directory.

    Args:
        data: `shared/data/eval`.
        directory: is made if it is not there.
        fits: whether a text may be a choice; records with another one are left out.

    Returns:
        {task: the number of records that are left out}.
    """
    dropped = dict.fromkeys(TASKS, 0)
    directory.mkdir(parents=True, exist_ok=True)
    for name, (file, between) in CHOICES.items():
        every = records(data / file)
        rows = [
            row | {"query": row["query"] + between}
            for row in every
            if all(map(fits, row["choices"]))
        ]
        dropped[PREFIX + name] = len(every) - len(rows)
        _task(directory, name, "multiple_choice", _jsonl(directory / f"{name}.jsonl", rows))
    rows = _jsonl(directory / "lambada.jsonl", records(data / "lambada_openai.jsonl.gz"))
    _task(directory, "lambada", "loglikelihood", rows)
    _task(directory, "lambada_rolling", "loglikelihood_rolling", rows)
    _task(directory, "lambada_words", "generate_until", rows)
    return dropped


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _task(directory: Path, name: str, kind: str, data: Path) -> None:
    """Writes one YAML; JSON is YAML, and quotes every string as it must be."""
    task = {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": kind,
        **FIELDS[kind],
        "metric_list": [
            {"metric": metric, "aggregation": how, "higher_is_better": more}
            for metric, (how, more) in METRICS[kind].items()
        ],
    }
    text = json.dumps(task, indent=2, ensure_ascii=False)
    (directory / f"{PREFIX}{name}.yaml").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the tasks and prints their names."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(",".join(write(Path(argv[0]), Path(argv[1]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
