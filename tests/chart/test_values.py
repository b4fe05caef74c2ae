"""Wrong values are refused before anything reaches a cluster, with a message that names the field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.chart import helm
from tests.chart.helm import CHART
from tests.chart.tools import HELMS
from virtbus import config

WRONG = sorted((Path(__file__).parent / "wrong").glob("*.yaml"))


@pytest.mark.parametrize("values", WRONG, ids=lambda path: path.stem)
@pytest.mark.parametrize("major", HELMS, ids=lambda major: f"helm{major}")
def test_a_wrong_value_is_refused_and_named(major: str, values: Path) -> None:
    field = values.read_text(encoding="utf-8").splitlines()[0].removeprefix("# names: ")
    done = helm.run(major, "template", "vb", str(CHART), "--values", str(values))
    assert done.returncode != 0, "helm took it"
    assert field in done.stderr
    assert "hunter2" not in done.stderr


def test_there_are_at_least_25_wrong_files() -> None:
    assert len(WRONG) >= 25


def test_every_setting_of_the_agent_is_either_a_value_or_the_charts_own() -> None:
    """No setting can be added to the agent and be forgotten here."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    offered = set(_leaves(schema["properties"]["config"]))
    model = config.json_schema()
    known = set(_leaves(model["$defs"]["Config"], model["$defs"]))
    assert known - offered == {
        "state_dir", "http.listen", "control.socket", "bus.url", "bus.url_file", "bus.password_file",
        "bus.tls.ca_file", "bus.tls.cert_file", "bus.tls.key_file", "react.state_dir", "react.listen",
        "http.allowed_hosts",
    }  # fmt: skip
    assert offered <= known


def _leaves(node: dict, definitions: dict | None = None, path: str = "") -> list[str]:
    found = []
    for name, child in node.get("properties", {}).items():
        if "$ref" in child:
            child = definitions[child["$ref"].rpartition("/")[2]]
        below = _leaves(child, definitions, f"{path}{name}.") if "properties" in child else [f"{path}{name}"]
        found += below
    return found


def test_every_default_is_described_and_every_description_has_a_default() -> None:
    import yaml

    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(defaults) == set(schema["properties"])


def test_the_schema_refers_to_nothing_outside_itself() -> None:
    assert '"$ref"' not in (CHART / "values.schema.json").read_text(encoding="utf-8")


def test_a_parent_chart_may_set_global_values() -> None:
    assert helm.render(helm.MINIMAL, sets=("global.imageRegistry=example",))


def test_every_test_that_the_list_of_promises_names_is_there() -> None:
    folder = Path(__file__).parent
    named = re.findall(r"`([\w/.]+\.py)::(test_\w+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (folder / file).resolve().read_text(encoding="utf-8")
    ]
    assert missing == []
