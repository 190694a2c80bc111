"""Writes docs/config.md, the reference of the config, from the schema: `make docs`."""

from __future__ import annotations

from pathlib import Path

from jaxtune.recipes.schema.keys import ABSENT, KEYS, PRESETS, REQUIRED, Key

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Config keys

Written by `make docs` from `jaxtune/recipes/schema/keys.py`; not edited by hand.

A config is a Python file with `get_config(arg)` that returns an `ml_collections.ConfigDict` (see
`configs/`). On the command line `--config.KEY=VALUE` sets any key. An unknown key, a key that the
chosen method, optimizer or schedule does not use, and a contradiction are errors before anything is
loaded. Exactly one of `total_steps`, `total_epochs`, `total_examples` and `total_tokens` is given,
and at most one `optim.warmup_*`.
"""


def page() -> str:
    """Returns the text of the page."""
    parts = [HEAD]
    section = None
    for key in sorted(KEYS, key=_place):
        if _section(key) != section:
            section = _section(key)
            parts.append(f"\n## {section}\n\n| key | default | values | |\n|---|---|---|---|")
        parts.append(_row(key, key.path))
        if key.kind == "entries":
            parts += [_row(part, f"{key.path}[i].{part.name}") for part in key.entry]
        if key.kind == "groups":
            parts += [_row(part, f"{key.path}[REGEX].{part.name}") for part in key.entry[1:]]
    return "\n".join(parts) + f"\n\nPresets: {', '.join(f'`{name}`' for name in PRESETS)}.\n"


def _section(key: Key) -> str:
    return key.path.partition(".")[0] if "." in key.path else "run"


def _place(key: Key) -> int:
    """Sections stay together, in the order in which the schema first names them."""
    return [_section(other) for other in KEYS].index(_section(key))


def _row(key: Key, path: str) -> str:
    defaults = [_default(key.default)]
    defaults += [f"{name}: {_default(value)}" for name, value in key.defaults.items()]
    uses = " and ".join(
        f"`{selector}` {' or '.join(values)}" for selector, values in key.used_by if len(values) < 6
    )
    notes = key.doc + (f" (with {uses})" if uses else "")
    cells = (f"`{path}`", ", ".join(filter(None, defaults)), _values(key), notes)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: object) -> str:
    if value == REQUIRED:
        return "required"
    if value == ABSENT:
        return ""
    return f"`{list(value) if isinstance(value, tuple) else value!r}`"


def _values(key: Key) -> str:
    if key.path == "model.preset":
        return "a name below"
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    bounds = (("≥", key.low), (">", key.above), ("≤", key.high), ("<", key.below))
    limits = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return " ".join((key.kind, ", ".join(limits))).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
