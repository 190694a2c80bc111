"""The model card: a README.md that says where an export comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.peft.method import Method
from jaxtune.peft.registry import spec_of
from jaxtune.recipes import workdir as files
from jaxtune.recipes.base import is_run
from jaxtune.recipes.combine import Mix
from jaxtune.training.workdir import read_json

LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf", "jaxtune": "jaxtune"}
RELATIONS = {"hf": "finetune", "peft": "adapter", "gguf": "quantized", "jaxtune": "adapter"}
HOW = {
    "hf": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
    "peft": "from peft import AutoPeftModelForCausalLM\n\n"
    'model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")',
    "gguf": "llama-cli -m DIRECTORY/model.gguf",
    "jaxtune": 'import jaxtune\n\nlm = jaxtune.load("BASE", adapter="DIRECTORY")',
}
HOW_TO_SCORE = {
    "hf": "from transformers import AutoModelForSequenceClassification\n\n"
    'model = AutoModelForSequenceClassification.from_pretrained("DIRECTORY")',
    "peft": "from peft import AutoPeftModelForSequenceClassification\n\n"
    'model = AutoPeftModelForSequenceClassification.from_pretrained("DIRECTORY", num_labels=1)',
    "jaxtune": HOW["jaxtune"] + "\nlm.scores([text])",
}
SCORER = (
    "It is a reward model: one number a text, read at its last token, larger for what is "
    "preferred.\n"
)


def model_card(
    source: str | Path,
    base: str,
    method: Method,
    report: Mapping[str, Any],
    adapter: str | Path | None = None,
    scorer: bool = False,
    mix: Mix | None = None,
) -> str:
    """Returns the Markdown of a card, with YAML front matter for the Hugging Face hub.

    Args:
        source: a run's workdir, or a Hugging Face directory.
        base: what the model was made from.
        method: how.
        report: of the export: format, dtype, max_logit_error, bound.
        adapter: directory of the adapter on `source`, if one was given.
        scorer: whether it is a reward model.
        mix: what was done to the run afterwards, if anything.
    """
    source, run = Path(source), is_run(Path(source))
    config = read_json(source / files.CONFIG) if run else {}
    summary = {}
    if run and (source / files.SUMMARY).is_file():
        summary = read_json(source / files.SUMMARY)
    objective = config.get("objective", {}).get("name")
    how, outputs = (HOW_TO_SCORE, "score") if scorer else (HOW, "logit")
    parts = [
        front_matter(base, method, report["format"], objective, scorer),
        f"# {source.resolve().name}\n",
        f"Made from `{base}` by [jaxtune](https://pypi.org/project/jaxtune/)"
        + (f" with the objective `{objective}`" if objective else "")
        + (f" and the adapter `{adapter}`" if adapter else "")
        + ".\n",
        *([SCORER] if scorer else []),
        section("Use", f"```\n{how[report['format']]}\n```"),
        section("Method", block({k: v for k, v in spec_of(method).items() if v not in (None, ())})),
    ]
    if mix is not None and mix.changes:
        settings = {k: v for k, v in dataclasses.asdict(mix).items() if k != "others"}
        runs = [str(path) for path in mix.others]
        parts.append(section("Merged afterwards", block({"merge": settings, "with": runs})))
    if config:
        parts.append(section("Data", table(("source", "format", "weight"), data_rows(config))))
    if summary:
        done = {
            name: summary.get(name)
            for name in ("stop_reason", "step", "total_steps", "tokens", "trained_tokens")
        }
        rows = [*done.items(), *summary.get("metrics", {}).items()]
        known = [(name, value) for name, value in rows if value is not None]
        parts.append(section("Metrics", table(("metric", "value"), known)))
        digests = [item for item in summary["fingerprints"].items() if item[1] is not None]
        parts.append(section("Fingerprints", table(("of", "digest"), digests)))
        parts.append(
            section("Versions", table(("package", "version"), summary["versions"].items()))
        )
    checked = {k: report[k] for k in ("format", "dtype", "max_logit_error", "bound")}
    note = f"Read back and compared before it was kept; errors are of the largest {outputs}.\n"
    parts.append(section("Export", note + "\n" + table(("", "value"), checked.items())))
    if config:
        parts.append(section("Config", block(config)))
    return "\n".join(parts)


def front_matter(
    base: str, method: Method, format: str, objective: str | None, scorer: bool = False
) -> str:
    """Returns the YAML header; a JSON string is a YAML string."""
    tags = ["jaxtune", *([] if method.name == "base" else [method.name])]
    tags += [objective] if objective else []
    pipeline = "text-classification" if scorer else "text-generation"
    lines = [
        "---",
        f"library_name: {LIBRARIES[format]}",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        f"base_model_relation: {RELATIONS[format]}",
        f"pipeline_tag: {pipeline}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---\n",
    ]
    return "\n".join(lines)


def section(title: str, text: str) -> str:
    """Returns a section."""
    return f"## {title}\n\n{text.rstrip()}\n"


def block(value: Any) -> str:
    """Returns a value as a block of JSON."""
    return f"```json\n{json.dumps(value, indent=1, ensure_ascii=False)}\n```"


def table(head: tuple[str, ...], rows: Any) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def data_rows(config: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Returns source, format and weight of the training data, and of what was replayed."""
    train = config.get("data", {}).get("train", [])
    old = config.get("retention", {}).get("replay_data", [])
    rows = [(one.get("source"), one.get("format"), one.get("weight", 1.0)) for one in train]
    return rows + [
        (one.get("source"), f"{one.get('format')}, replayed", one.get("weight", 1.0)) for one in old
    ]
