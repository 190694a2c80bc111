"""The documentation is true: links, commands, and the generated page."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tpu_scripts/*.md")])
FENCED = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made by a command on the same page, or the reader's own.
THEIRS = ("MODEL_DIR", "train.jsonl", "FILE", "DIR")


def commands():
    """Yields (page, words) of each `jaxtune` command, indented or fenced, and of the configs.

    So are those that a script of tpu_scripts/ is to run on other machines.
    """
    for page in [*PAGES, *sorted(ROOT.glob("configs/*.py"))]:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        start = r"^    (?:\.venv/bin/|tpu_scripts/.* -- )?"
        fenced = "".join(FENCED.findall(text))
        for line in re.findall(start + r"(jaxtune .*)$", text, re.MULTILINE) + re.findall(
            r"^(?:tpu_scripts/.* -- )?(jaxtune .*?)(?: > \S+)?(?: \|\| true)?$",
            fenced,
            re.MULTILINE,
        ):
            yield page.relative_to(ROOT), shlex.split(line)[1:]


COMMANDS = list(commands())


@pytest.fixture(scope="module")
def flags():
    """Returns a function from a verb's words to the flags that its help names."""
    known = {}

    def of(*verb):
        if verb not in known:
            command = [sys.executable, "-m", "jaxtune.cli.main", *verb, "--help"]
            help_text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            known[verb] = set(re.findall(r"--\w+", help_text.split("example:")[0]))
        return known[verb]

    return of


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(COMMANDS)]
)
def test_commands_have_known_verbs_flags_and_keys(page, words, flags):
    from jaxtune.recipes.schema.overrides import declared

    verb = words[:2] if words[0] == "data" else words[:1]
    for word in words[len(verb) :]:
        flag, _, value = word.partition("=")
        if match := re.fullmatch(r"--(?:config|sweep)\.(.+)", flag):
            assert declared(match[1]) is not None, word
        elif flag == "--config":
            assert value in THEIRS or (ROOT / value.partition(":")[0]).is_file(), word
        elif flag.startswith("--"):
            assert flag in flags(*verb), word


def test_makefile_has_the_targets_that_the_pages_name():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^    |`)make ([\w-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page


def test_config_page_is_what_the_schema_says():
    code = "import write_reference as w; assert w.page() == w.PAGE.read_text('utf-8'), 'make docs'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "docs")


def test_families_page_has_every_family_within_its_bound():
    from jaxtune.models.families.registry import FAMILIES
    from tests.models.families import ROWS

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    variants = dict(re.findall(r"^- `(\w+)`: (.*)$", page, re.MULTILINE))
    table.pop("model_type")
    assert set(table) == set(variants) == set(FAMILIES), "make families-page"
    for name, cells in table.items():
        figures = [float(x) for x in re.findall(r"\b\d\.\de-\d\d\b", cells)]
        assert len(figures) >= 3 and max(figures) < 1e-4
        assert "60 of 60" in cells and "same bytes" in cells
        rows = [row for row, fields in ROWS.items() if fields["model_type"] == name]
        assert variants[name] == ", ".join(rows), "make families-page"


def navigation(entries):
    """Returns the pages that the site's navigation names, in order."""
    found = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += navigation(value) if isinstance(value, list) else [value]
    return found


def test_site_names_every_page_once():
    from docs.site_files import place, sources

    named = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(place(source) for source in sources())


def test_links_lead_somewhere_from_the_site_too():
    """Those of pages that lie elsewhere, such as README, are written anew, and still lead there."""
    from docs.site_files import place, sources, targets

    known = {place(source) for source in sources()}
    for source in sources():
        for link, path in targets(source, (ROOT / source).read_text(encoding="utf-8")).items():
            assert (ROOT / path).is_file(), (source, link)
            assert not link.endswith(".md") or place(path) in known, (source, link)


@pytest.mark.slow
def test_site_builds_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(set(tmp_path.rglob("*.html")) - {tmp_path / "404.html"})
    assert len(pages) > 30 and not [*tmp_path.rglob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?([^\" >]+)", text)
        assert loaded and not [url for url in loaded if url.startswith(("http", "//"))], page
        for link in re.findall(r'<a\b[^>]*?href="?([^" >#]+)', text):
            if ":" not in link:
                assert (page.parent / link).exists(), (page, link)
