"""What mkdocs needs to build docs/ as it is: README.md as the index, and links that leave docs/ as addresses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages that stand above docs/, by their names among the pages.
ABOVE = {"index.md": "README.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from above docs/, as if they stood in it."""
    for name, source in ABOVE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        # What is not below docs/ is one folder up from there.
        text = re.sub(r"(?<=\]\()(?![a-z]+:|#|docs/)", "../", text)
        files.append(File.generated(config, name, content=re.sub(r"(?<=\]\()docs/", "", text)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Links to what is not a page, such as the chart's own README, lead to the repository."""
    return re.sub(r"(?<=\]\()\.\./", f"{config.repo_url.rstrip('/')}/blob/main/", markdown)
