"""The sample file says what the settings' model says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from virtbus import loading
from virtbus.commands.settings import sample, settings


def test_the_sample_with_its_defaults_uncommented_is_the_default_configuration(tmp_path: Path) -> None:
    lines = [
        re.sub(r"^# (?=[a-z_]+ = )", "", line)
        for line in sample()
        if not line.endswith("# not set by default")
    ]
    file = tmp_path / "virtbus.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert loading.load(file=file, environment={}).config == loading.load(environment={}).config
    assert len(tomllib.loads("\n".join(lines))) > 5


def test_the_sample_as_it_is_printed_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "virtbus.toml"
    file.write_text("\n".join(sample()), encoding="utf-8")
    assert loading.load(file=file, environment={}).config == loading.load(environment={}).config


def test_every_setting_says_what_it_is_for() -> None:
    assert [each.key for each in settings() if not each.says] == []
    assert [each.section for each in settings() if each.section and not each.purpose] == []
