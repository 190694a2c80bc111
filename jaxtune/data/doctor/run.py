"""The doctor from request to files."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.doctor import fix as fixing
from jaxtune.data.doctor.diagnose import diagnose
from jaxtune.data.doctor.page import as_page
from jaxtune.data.doctor.report import as_json, report, write
from jaxtune.data.doctor.settings import Settings


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Files to write; None writes none.

    Attributes:
        json: the report.
        html: the report as a page.
        fix: the cleaned copy.
        kinds: what to fix.
    """

    json: str | None = None
    html: str | None = None
    fix: str | None = None
    kinds: frozenset[str] = fixing.FIXABLE


def examine(
    settings: Settings, outputs: Outputs | None = None, console: Any = None
) -> dict[str, Any]:
    """Examines data and returns the report.

    Args:
        settings: the request.
        outputs: files to write besides.
        console: a `rich.console.Console` for progress, or None.

    Raises:
        RequestError: a source, evaluation set, tokenizer or output cannot be opened.
    """
    outputs = outputs or Outputs()
    _check_places(outputs)
    with tempfile.TemporaryDirectory(prefix="jaxtune-doctor-") as spool:
        found = diagnose(settings, Path(spool), console)
        result = report(found)
        if outputs.fix is not None:
            result["fixed"] = fixing.fix(found, outputs.fix, outputs.kinds)
    if outputs.json is not None:
        write(outputs.json, as_json(result))
    if outputs.html is not None:
        write(outputs.html, as_page(result))
    return result


def _check_places(outputs: Outputs) -> None:
    for flag in ("json", "html", "fix"):
        place = getattr(outputs, flag)
        if place is None:
            continue
        if os.path.isdir(place) or not place:
            raise RequestError("must be a file", key=f"--{flag}", where=place)
        if not Path(place).parent.is_dir():
            raise RequestError("no such directory", key=f"--{flag}", where=Path(place).parent)
