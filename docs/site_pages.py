"""Hooks of mkdocs: the documents at the top of the repository are pages too, and links lead to them.

On GitHub, links are relative to their file. On the site all pages lie in one folder, and links to code become text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {
    "index.md": "README.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md")},
}
"""Page -> document at the top."""
_LINK: Final = re.compile(r"(?<!!)\[([^]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents at the top."""
    for page, document in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links lead to pages; links to other files of the repository become their text."""

    def linked(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        name = path.removeprefix("../").removeprefix("docs/")
        return f"[{text}]({name}{anchor})" if files.get_file_from_path(name) else text

    return _LINK.sub(linked, markdown.replace("](docs/terminal.svg)", "](terminal.svg)"))
