"""No module and no class grows beyond what a reader takes in."""

from __future__ import annotations

import ast
from pathlib import Path

import virtbus

MODULE_LINES, CLASS_LINES = 500, 300
ROOT = Path(virtbus.__file__).parent


def test_no_module_and_no_class_is_too_long() -> None:
    long: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT.parent)
        if (lines := len(text.splitlines())) > MODULE_LINES:
            long.append(f"{name}: {lines} lines, {MODULE_LINES} at most: split it by what it decides")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > CLASS_LINES:
                    long.append(f"{name}: class {node.name} has {lines} lines, {CLASS_LINES} at most")
    assert not long, "\n".join(long)
