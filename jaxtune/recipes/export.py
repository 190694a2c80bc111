"""`jaxtune export`: writes a model or adapter for other tools, then reads it back to be sure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints import gguf_export
from jaxtune.checkpoints.hf_directory import check_replaceable, replaced
from jaxtune.checkpoints.hf_export import config_of
from jaxtune.core.errors import RequestError
from jaxtune.models.families.registry import RUN_FIELDS
from jaxtune.recipes.base import BASE, is_run
from jaxtune.recipes.combine import Mix, mixed
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.load import DEFAULT, load
from jaxtune.recipes.report.model_card import model_card
from jaxtune.training.workdir import read_json

# Largest |Δ logit| of what was written, read back and run in float32, over the largest |logit|.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2, "q8_0": 5e-2}
FORMATS = ("hf", "peft", "jaxtune", "gguf")
PROBE_ROWS, PROBE_TOKENS = 2, 24
CHECK = "read back"


class ExportError(RuntimeError):
    """What was written does not compute what is in memory; the old export is kept."""


def export(
    source: str | Path,
    format: str,
    out: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    *,
    others: Sequence[str | Path] = (),
    merge: str = "soup",
    tuned_share: float = 1.0,
    density: float = 0.5,
    pick: str | None = None,
) -> dict[str, Any]:
    """Writes an export, with a model card, and reports how far it is from the model in memory.

    Args:
        source: workdir of a run, or a Hugging Face directory.
        format: "hf" for whole weights (adapters merged), "peft" for the adapter alone, "jaxtune"
            for the adapter alone in our own layout, "gguf" for merged weights for llama.cpp.
        out: directory; an older export there is replaced once the new one has been checked.
        adapter: PEFT directory on top of `source`.
        dtype: of merged weights: "float32", "float16", "bfloat16", and "q8_0" for gguf; that of
            the source by default.
        others, merge, tuned_share, density: draw the run towards its base, or merge other runs
            into it; see `combine.Mix`.
        pick: which checkpoint of the run; see `recipes.load`.

    Returns:
        {"out", "format", "dtype", "max_logit_error", "bound"}; errors are relative to the
        largest logit.

    Raises:
        RequestError: a method that the format cannot hold, or a directory that is not ours,
            or that is read.
        ExportError: the reloaded model differs by more than the bound, or is described otherwise.
    """
    mix = Mix(tuple(Path(path) for path in others), merge, tuned_share, density)
    out = Path(out)
    check_apart(out, source, adapter)
    check_replaceable(out)
    dtype = chosen_dtype(format, dtype, Path(source))
    lm = load(source, adapter=adapter, dtype="float32", pick=pick)
    if format == "gguf" and not lm.config.lm_head:
        raise RequestError(
            "cannot hold a reward model's score head; export format 'hf'", key="format"
        )
    if mix.changes:
        lm = weakened(lm, mix) if format == "peft" else mixed(source, lm, mix, pick)
    with replaced(out) as aside:
        again = written_and_read(lm, aside, format, dtype)
        if changed := changed_fields(lm, again):
            raise ExportError(
                f"the exported config.json means {', '.join(changed)}, which the model in memory "
                f"has not; {out} is left as it was"
            )
        report = {
            "out": str(out),
            "format": format,
            "dtype": dtype,
            "max_logit_error": difference(lm, again),
            "bound": BOUNDS[dtype],
        }
        if not report["max_logit_error"] <= report["bound"]:
            raise ExportError(
                f"the exported model's logits differ by {report['max_logit_error']:.2e} of the "
                f"largest logit, more than {report['bound']:.0e}; {out} is left as it was"
            )
        scorer = not lm.config.lm_head
        card = model_card(source, lm.source, lm.method, report, adapter, scorer, mix)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return report


def weakened(lm: LanguageModel, mix: Mix) -> LanguageModel:
    """Returns a run's model with its adapter drawn towards the base, as an adapter still."""
    if mix.others or lm.stand is None:
        raise RequestError(
            "holds an adapter, and what is asked for changes whole weights; use --format=hf",
            key="format",
        )
    return lm.use({DEFAULT: mix.tuned_share})


def check_apart(out: Path, source: str | Path, adapter: str | Path | None) -> None:
    """Raises RequestError if `out` is a directory that the model is made from."""
    for path, what in inputs(Path(source), adapter):
        if os.path.realpath(path) == os.path.realpath(out):
            raise RequestError(
                f"is {what}, which the export reads and would replace; name a new directory",
                key="out",
                where=out,
            )


def inputs(source: Path, adapter: str | Path | None) -> Iterator[tuple[Path, str]]:
    """Yields each directory that a model is made from, and what it is; of a run's bases too."""
    yield source, "the model"
    if adapter is not None:
        yield Path(adapter), "the adapter"
    if not is_run(source):
        return
    config = read_json(source / "config.json")
    named = {section: config.get(section) or {} for section in ("model", "peft")}
    for section, key in (("model", "tokenizer"), ("peft", "init_from")):
        if isinstance(path := named[section].get(key), str):
            yield Path(path), f"{section}.{key} of the run"
    if isinstance(path := named["model"].get("path"), str):
        yield from ((p, f"{w} in model.path of the run") for p, w in inputs(Path(path), None))


def chosen_dtype(format: str, dtype: str | None, source: Path) -> str:
    """Returns the dtype to write.

    Raises:
        RequestError: an unknown format, or a dtype that it does not have.
    """
    if format not in FORMATS:
        raise RequestError(f"{format!r} is none of {', '.join(FORMATS)}", key="format")
    if format in ("peft", "jaxtune"):
        allowed = ("float32",)
    else:
        allowed = tuple(name for name in BOUNDS if format == "gguf" or name != "q8_0")
    if dtype is None:
        return "float32" if len(allowed) == 1 else stored_dtype(source)
    if dtype not in allowed:
        raise RequestError(
            f"{dtype!r} cannot be written as {format}; {', '.join(allowed)} can", key="dtype"
        )
    return dtype


def written_and_read(lm: LanguageModel, directory: Path, format: str, dtype: str) -> LanguageModel:
    """Writes the files, and returns the model as another tool would load it from them."""
    if format == "hf":
        stored = dataclasses.replace(lm, config=dataclasses.replace(lm.config, dtype=dtype))
        stored.save(directory, "hf")
        return load(directory, dtype="float32", mesh=lm.mesh)
    if format == "gguf":
        merged, name = lm.method.merge(lm.params), Path(lm.source).resolve().name
        config = gguf_export.save_gguf(
            directory, lm.config, merged, dtype=dtype, tokenizer=lm.tokenizer, name=name
        )
        config = dataclasses.replace(config, dtype="float32")
        params = gguf_export.load_gguf(directory, config)
        return dataclasses.replace(lm, config=config, method=BASE, params=params)
    lm.save(directory, format)
    base = lm.use(None)
    return base.add_adapter(CHECK, directory).use(CHECK)


def stored_dtype(source: Path) -> str:
    """Returns the dtype to write: the run's, or that of the directory's own weights."""
    raw = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    if is_run(source):
        return raw["model"]["dtype"]
    named = raw.get("dtype") or raw.get("torch_dtype")
    return "float32" if named in ("float32", "float64") else "bfloat16"


def changed_fields(lm: LanguageModel, other: LanguageModel) -> list[str]:
    """Returns `field=value` of what the config read back has otherwise than it should.

    The probe is short: a window or a context that it does not fill would not show in its logits.
    """
    wanted = config_of(lm.config, other.params)
    return [
        f"{field.name}={getattr(other.config, field.name)!r}"
        for field in dataclasses.fields(wanted)
        if field.name not in RUN_FIELDS
        and getattr(wanted, field.name) != getattr(other.config, field.name)
    ]


def difference(lm: LanguageModel, other: LanguageModel) -> float:
    """Returns max |Δ logit| / max |logit| on fixed random tokens; of a reward model, of scores."""
    rng = np.random.default_rng(0)
    room = lm.config.max_context - lm.method.num_virtual - lm.method.position_offset
    shape = (PROBE_ROWS, min(PROBE_TOKENS, room))
    ids = rng.integers(0, lm.config.vocab_size, shape)
    if lm.config.lm_head:
        ours, theirs = np.asarray(lm.logits(ids)), np.asarray(other.logits(ids))
    else:  # one score a text: that of each beginning of the rows
        texts = [row[:stop].tolist() for row in ids for stop in range(1, shape[1] + 1)]
        ours, theirs = lm.scores(texts), other.scores(texts)
    largest = np.abs(ours).max()  # 0 for a score head that was not trained yet
    return float(np.abs(ours - theirs).max() / (largest or 1.0))
