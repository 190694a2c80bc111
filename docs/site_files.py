"""A hook of mkdocs: the site has README and other files of the repository that its pages link to.

Pages link to each other as they lie in the repository, which is how people read them there. The
site's root is `docs/`, so that what lies elsewhere is added under its own path, and every link is
written anew from there.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Pages that lie elsewhere; other files come along where a page links to them.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tpu_scripts/README.md")
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def sources() -> list[str]:
    """Returns every page of the site by its path in the repository."""
    inside = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
    return [*PAGES, *inside]


def place(source: str) -> str:
    """Returns where a file of the repository lies in the site.

    >>> place("docs/tutorials/tpu.md"), place("tpu_scripts/README.md")
    ('tutorials/tpu.md', 'tpu_scripts/README.md')
    """
    return source.removeprefix("docs/")


def targets(source: str, markdown: str) -> dict[str, str]:
    """Returns {link as written: path in the repository} of a page's links within it."""
    found = LINK.findall(markdown)
    here = posixpath.dirname(source)
    return {
        link: posixpath.normpath(posixpath.join(here, link)) for link in found if ":" not in link
    }


def on_files(files, config):
    """Adds what lies outside of `docs/`."""
    from mkdocs.structure.files import File

    wanted = dict.fromkeys(PAGES)
    for source in sources():
        linked = targets(source, (ROOT / source).read_text(encoding="utf-8")).values()
        wanted |= dict.fromkeys(path for path in linked if not path.startswith("docs/"))
    for path in wanted:
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links within the repository into links within the site."""
    uri = page.file.src_uri
    source = uri if os.path.exists(ROOT / uri) and uri in PAGES else f"docs/{uri}"
    here = posixpath.dirname(uri) or "."
    known = targets(source, markdown)

    def moved(match: re.Match[str]) -> str:
        path = known.get(match[1])
        return match[1] if path is None else posixpath.relpath(place(path), here)

    return LINK.sub(moved, markdown)
