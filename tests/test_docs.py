"""The site of docs/: its navigation names every page, its links lead somewhere, and what its Python page names
exists."""

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = _hooks()
# name on the site -> file of the repository
SOURCES = {
    path.relative_to(ROOT / "docs").as_posix(): path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
}
SOURCES |= {name: source for source, name in site.PAGES.items()}


def named(nav: list[Any]) -> list[str]:
    """The pages of a navigation, however deep."""
    values = [value for entry in nav for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [page for value in values for page in (named(value) if isinstance(value, list) else [value])]


def anchors(name: str) -> set[str]:
    """Those of the headings of a page, as mkdocs makes them."""
    text = re.sub(r"(?s)```.*?```", "", (ROOT / SOURCES[name]).read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_the_navigation_names_every_page_once() -> None:
    assert sorted(named(CONFIG["nav"])) == sorted(SOURCES)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_links_lead_to_pages_and_headings(name: str) -> None:
    text = site.rewritten((ROOT / SOURCES[name]).read_text(encoding="utf-8"), SOURCES[name])  # a dead link raises
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (Path("/") / Path(name).parent / path).as_posix().lstrip("/") if path else name
        there = Path(re.sub(r"[^/]+/\.\./", "", there)).as_posix()
        assert there in SOURCES or (ROOT / "docs" / there).is_file(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target}"


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("docs/reliability.md", "[a](../tests/test_docs.py): b", "a: b"),  # a site has no tests
        ("docs/serving.md", "[t](../README.md#quality)", "[t](readme.md#quality)"),
        ("README.md", "[theory](docs/theory.md)", "[theory](theory.md)"),
        ("README.md", "[decisions](docs/decisions)", "decisions"),
        ("docs/decisions/0001-greenlet-for-the-block-walk.md", "[log](../log.md)", "[log](../log.md)"),
        ("benchmarks/README.md", "[p](../docs/performance.md)", "[p](performance.md)"),
        ("docs/performance.md", "![f](figures/scaling-rows.svg)", "![f](figures/scaling-rows.svg)"),
        ("docs/faq.md", "[x](https://example.org/a) [y](#before)", "[x](https://example.org/a) [y](#before)"),
        (
            "README.md",
            '<img src="docs/figures/scaling-rows.svg" alt="a">',
            '<img src="figures/scaling-rows.svg" alt="a">',
        ),
        ("docs/faq.md", "`[a](nothing.md)`", "`[a](nothing.md)`"),
    ],
)
def test_links_become_the_sites(source: str, before: str, after: str) -> None:
    assert site.rewritten(before, source) == after


@pytest.mark.parametrize("target", ["nothing.md", "../../outside.md", "../src/none.py"])
def test_a_dead_link_ends_the_build(target: str) -> None:
    with pytest.raises(site.DeadLink, match="leads to nothing"):
        site.rewritten(f"[a]({target})", "docs/faq.md")


def test_a_page_that_fetches_from_elsewhere_ends_the_build(tmp_path: Path) -> None:
    assert CONFIG["theme"]["font"] is False and "repo_url" not in CONFIG  # fonts, and a counter of stars
    page = tmp_path / "index.html"
    page.write_text('<a href="https://example.org">fine</a><script src="a.js"></script>', encoding="utf-8")
    site.on_post_build({"site_dir": str(tmp_path)})
    page.write_text('<link rel="stylesheet" href="https://fonts.example.org/x.css">', encoding="utf-8")
    with pytest.raises(ValueError, match="fetches from elsewhere"):
        site.on_post_build({"site_dir": str(tmp_path)})


def test_the_python_page_names_what_exists() -> None:
    found = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 15
    for name in found:
        pkgutil.resolve_name(name)
    public = importlib.import_module("leangrid").__all__
    assert {name.rpartition(".")[2] for name in found} >= set(public) - {"__version__", "grids"}
