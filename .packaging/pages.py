"""What mkdocs needs to build docs/ as it is: README.md as the index, and links that leave docs/ as whole addresses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<=\]\()docs/", "", text)
    files.append(
        File.generated(
            config, "index.md", content=_outside(text, config, r"(?![a-z]+:|#)(?=charts/|\.github/|[A-Z])")
        )
    )
    files.append(
        File.generated(config, "CHANGELOG.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    )
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Links to what is not a page, such as the chart's own README."""
    return _outside(markdown, config, r"\.\./")


def _outside(text: str, config: Any, prefix: str) -> str:
    return re.sub(rf"(?<=\]\(){prefix}", f"{config.repo_url.rstrip('/')}/blob/main/", text)
