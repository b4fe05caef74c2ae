"""The README as a package index shows it: links into the repository are whole addresses there.

hatchling calls it (pyproject.toml, tool.hatch.metadata.hooks.custom).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Sets `readme` from README.md."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See MetadataHookInterface."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        base = f"{metadata['urls']['Repository'].rstrip('/')}/blob/main/"
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, base)}


def absolute(text: str, base: str) -> str:
    """Markdown with each relative link put below `base`; addresses and anchors stay as they are."""
    return re.sub(r"(?<=\]\()(?![a-z]+:|#)(?=[^)\s])", base, text)
