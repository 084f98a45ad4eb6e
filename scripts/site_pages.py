"""mkdocs hooks: the site also gets the pages outside docs/, and links between files become links between pages.

README.md and the other files of PAGES are pages of the site under other names. A link to a page of the repository
becomes a link to its page of the site. A link to any other file (a test, a result) becomes plain text, since the site
does not have the file. A link to a file that does not exist ends the build.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "readme.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
    "experiments/README.md": "experiments.md",
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<label>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
_ATTRIBUTE = re.compile(r'(?<= )(?P<name>src|href)="(?P<target>[^"]+)"')
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


class DeadLink(ValueError):
    """A link names nothing in the repository."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/."""
    from mkdocs.structure.files import File

    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them."""
    sources = {name: source for source, name in PAGES.items()}
    return rewritten(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def rewritten(markdown: str, source: str) -> str:
    """``markdown`` of the repository's file ``source``, its links between pages and files turned into the site's; not
    inside code."""

    def address(target: str) -> str | None:
        """Where the site has it; None: it is a file that a site has not."""
        target, _, anchor = target.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return target + (f"#{anchor}" if anchor else "")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("..") or not (ROOT / path).exists():
            raise DeadLink(f"{source}: {target} leads to nothing")
        name = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
        if name is None or not (ROOT / path).is_file():
            return None
        here = posixpath.dirname(PAGES.get(source, source.removeprefix("docs/")))
        return posixpath.relpath(name, here or ".") + (f"#{anchor}" if anchor else "")

    def link(found: re.Match[str]) -> str:
        there = address(found["target"])
        return found["label"] if there is None else f"{found['image']}[{found['label']}]({there})"

    def attribute(found: re.Match[str]) -> str:
        return f'{found["name"]}="{address(found["target"]) or "#"}"'

    def fresh(part: str) -> str:
        return _ATTRIBUTE.sub(attribute, _LINK.sub(link, part))

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else fresh(part) for index, part in enumerate(parts))


def on_post_build(config: Any) -> None:
    """Nothing of a page is fetched from elsewhere when it opens."""
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^\">\s]*", re.IGNORECASE)
    for folder, _, names in os.walk(config["site_dir"]):
        for path in (Path(folder) / name for name in names if name.endswith(".html")):
            if found := fetched.search(path.read_text(encoding="utf-8")):
                raise ValueError(f"{path.name} fetches from elsewhere: {found[0]}")
