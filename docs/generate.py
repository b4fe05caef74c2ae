"""Write what the documents take from the code: `python docs/generate.py [--check]`.

asyncapi.json and the tables of events.md come from the schemas, configuration.md from the settings' model.
With `--check` nothing is written; it ends with 1 when a document is stale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from virtbus import schema
from virtbus.bus import BusOptions
from virtbus.commands.settings import settings, toml
from virtbus.envelope import CONTENT_TYPE, ROUTING_WORDS, STRUCTURED_CONTENT_TYPE
from virtbus.errors import SchemaError

DOCS = Path(__file__).resolve().parent
_MARKER = re.compile(r"<!-- generated: (?P<name>[\w.]+) -->\n.*?<!-- end -->", re.DOTALL)
# AsyncAPI's schema object is draft-07: it has no $defs, and these keywords mean something else there.
_LEFT_OUT = {"$schema", "$id", "$defs", "examples"}


def main() -> int:
    """Write each document that is stale, or with --check name it; the exit code."""
    stale = 0
    for name, text in documents().items():
        path = DOCS / name
        if path.read_text(encoding="utf-8") == text:
            continue
        stale = 1
        print(
            f"{path.name} is stale: run `python docs/generate.py`"
            if "--check" in sys.argv
            else f"{path.name} written"
        )
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    return stale if "--check" in sys.argv else 0


def documents() -> dict[str, str]:
    """The text of each document, by its name in this folder."""
    return {
        "asyncapi.json": json.dumps(asyncapi_document(), indent=2, ensure_ascii=False) + "\n",
        "events.md": renewed((DOCS / "events.md").read_text(encoding="utf-8")),
        "configuration.md": "\n".join(configuration()) + "\n",
    }


# --------------------------------------------------------------------------------------------- AsyncAPI


def asyncapi_document() -> dict[str, Any]:
    """The AsyncAPI 3.0 document of everything an agent publishes."""
    names = BusOptions()
    components: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for type_, word in ROUTING_WORDS.items():
        entry = schema.latest(type_)
        payload = _component(components, word, schema.load(entry.id))
        for binding, prefix in (("amqp", "ce-"), ("kafka", "ce_")):
            messages[f"{binding}.{word}"] = _message(binding, prefix, type_, entry.id, payload)
    envelope = _component(components, "envelope", schema.load(schema.latest("envelope").id))
    for binding in ("amqp", "kafka"):
        messages[f"{binding}.structured"] = {
            "name": "structured",
            "title": "Any event in structured mode",
            "summary": "The whole event as one JSON object; used where an agent is set to structured mode.",
            "contentType": STRUCTURED_CONTENT_TYPE,
            "payload": envelope,
            "bindings": _message_binding(binding),
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "virtbus events",
            "version": schema.latest("envelope").version + ".0",
            "description": "Guest I/O errors, their resolution, gaps and heartbeats as CloudEvents 1.0. "
            "Delivered at least once; order is kept for each source and partition key.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": {
            "amqp": {
                "address": "{word}.{agent}.{domain}",
                "title": "AMQP 0-9-1 topic exchange",
                "description": f"Exchange {names.exchange}; the address is the routing key.",
                "parameters": {
                    "word": {"description": "What the event is.", "enum": list(ROUTING_WORDS.values())},
                    "agent": {"description": "The agent's id, a UUID."},
                    "domain": {"description": "The domain's UUID; - for gap and heartbeat."},
                },
                "messages": _channel_messages("amqp", messages),
                "bindings": {
                    "amqp": {
                        "is": "routingKey",
                        "exchange": {
                            "name": names.exchange,
                            "type": "topic",
                            "durable": True,
                            "autoDelete": False,
                        },
                        "bindingVersion": "0.3.0",
                    }
                },
            },
            "kafka": {
                "address": names.topic,
                "title": "Kafka topic",
                "description": "The key of each record is its partition key.",
                "messages": _channel_messages("kafka", messages),
                "bindings": {"kafka": {"topic": names.topic, "bindingVersion": "0.5.0"}},
            },
        },
        "operations": {
            f"publish.{binding}": {
                "action": "send",
                "title": f"An agent publishes over {name}",
                "channel": {"$ref": f"#/channels/{binding}"},
            }
            for binding, name in (("amqp", "AMQP"), ("kafka", "Kafka"))
        },
        "components": {"messages": messages, "schemas": components},
    }


def _channel_messages(binding: str, messages: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.partition(".")[2]: {"$ref": f"#/components/messages/{name}"}
        for name in messages
        if name.startswith(binding + ".")
    }


def _message(
    binding: str, prefix: str, type_: str, schema_id: str, payload: Mapping[str, Any]
) -> dict[str, Any]:
    envelope = schema.load(schema.latest("envelope").id)
    properties: dict[str, Any] = {
        "content-type": {"type": "string", "const": CONTENT_TYPE, "description": "Content type of the data."}
    }
    required = ["content-type"]
    for name, attribute in envelope["properties"].items():
        if name in ("data", "datacontenttype"):
            continue
        header = {key: value for key, value in attribute.items() if key not in {*_LEFT_OUT, "minimum"}}
        header["type"] = "string"  # every header is text, numbers too
        if name == "type":
            header["const"] = type_
        properties[prefix + name] = header
        if name in envelope["required"]:
            required.append(prefix + name)
    document = schema.load(schema_id)
    return {
        "name": type_,
        "title": document["title"],
        "summary": document["description"],
        "contentType": CONTENT_TYPE,
        "headers": {"type": "object", "properties": properties, "required": required},
        "payload": dict(payload),
        "bindings": _message_binding(binding),
        "examples": [{"name": f"example{n}", "payload": data} for n, data in enumerate(document["examples"])],
        "x-dataschema": schema_id,
    }


def _message_binding(binding: str) -> dict[str, Any]:
    if binding == "kafka":
        key = {"type": "string", "description": "The partition key: the domain's UUID, or the agent's id."}
        return {"kafka": {"key": key, "bindingVersion": "0.5.0"}}
    return {"amqp": {"bindingVersion": "0.3.0"}}


def _component(components: dict[str, Any], word: str, document: Mapping[str, Any]) -> dict[str, str]:
    """Put a schema and its definitions among the components; the reference to it."""
    for name, definition in document.get("$defs", {}).items():
        components[f"{word}.{name}"] = _draft07(definition, word)
    components[word] = _draft07(document, word)
    return {"$ref": f"#/components/schemas/{word}"}


def _draft07(node: Any, word: str) -> Any:
    if isinstance(node, list):
        return [_draft07(item, word) for item in node]
    if not isinstance(node, dict):
        return node
    converted: dict[str, Any] = {}
    for key, value in node.items():
        if key in _LEFT_OUT:
            continue
        if key == "$ref":
            # Beside a $ref draft-07 ignores all else, so title and description need a level of their own.
            converted["allOf"] = [{"$ref": f"#/components/schemas/{word}.{value.rpartition('/')[2]}"}]
        elif key == "properties":
            converted[key] = {name: _draft07(item, word) for name, item in value.items()}
        else:
            converted[key] = _draft07(value, word)
    return converted


# ------------------------------------------------------------------------------------------- docs/events.md


def renewed(page: str) -> str:
    """The page with every generated block made anew; raises SchemaError for a marker of no block."""
    known = blocks()

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise SchemaError(f"no generated block {name!r}: there are {', '.join(known)}")
        return f"<!-- generated: {name} -->\n{known[name]}<!-- end -->"

    return _MARKER.sub(fill, page)


def blocks() -> dict[str, str]:
    """The generated blocks by name: types, attributes, and fields and an example of each type."""
    envelope = schema.load(schema.latest("envelope").id)
    made = {"types": _types_table(), "attributes": _attributes_table(envelope)}
    for type_, word in ROUTING_WORDS.items():
        document = schema.load(schema.latest(type_).id)
        made[f"{word}.fields"] = _fields_table(document)
        made[f"{word}.example"] = f"```json\n{json.dumps(document['examples'][0], indent=2)}\n```\n"
    made["structured.example"] = f"```json\n{json.dumps(envelope['examples'][0], indent=2)}\n```\n"
    return made


def _types_table() -> str:
    rows = []
    for type_, word in ROUTING_WORDS.items():
        entry = schema.latest(type_)
        description = schema.load(entry.id)["description"]
        rows.append(f"| `{type_}` | `{word}` | `{entry.version}` | {description} |")
    return "| type | routing word | newest schema | when |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _attributes_table(envelope: Mapping[str, Any]) -> str:
    rows = []
    for name, attribute in envelope["properties"].items():
        if name == "data":
            continue
        optional = "" if name in envelope["required"] else " (not on every event)"
        example = attribute["examples"][0]
        rows.append(f"| `{name}`{optional} | {_cell(attribute['description'])} | `{example}` |")
    return "| attribute | meaning | example |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _fields_table(document: Mapping[str, Any]) -> str:
    rows = [
        f"| `{path}` | {_type_words(document, node)} | {_cell(node['description'])}{_known(node)} |"
        for path, node in _walk(document, document, "")
    ]
    return "| field | type | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _walk(document: Mapping[str, Any], node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, child
        inner, suffix = child, ""
        if child.get("type") == "array":
            inner, suffix = child["items"], "[]"
        yield from _walk(document, _target(document, inner), here + suffix)


def _target(document: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The definition behind a reference, or behind the object branch of one that may be null."""
    if "anyOf" in node:
        node = node["anyOf"][0]
    if "$ref" in node:
        found: Mapping[str, Any] = document["$defs"][node["$ref"].rpartition("/")[2]]
        return found
    return node


def _type_words(document: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if "anyOf" in node:
        return "object or null"
    if "$ref" in node:
        return "object"
    types = node["type"]
    if types == "array":
        return f"array of {_target(document, node['items'])['type']}s"
    words = types if isinstance(types, str) else " or ".join(types)
    return "time" if node.get("format") == "date-time" and words == "string" else words


def _known(node: Mapping[str, Any]) -> str:
    words = node.get("x-known-values") or node.get("enum")
    return " Known: " + ", ".join(f"`{word}`" for word in words) + "." if words else ""


_OPEN = "; the words of this version are listed in x-known-values."


def _cell(text: str) -> str:
    return re.sub(r"<([^>]*)>", r"`<\1>`", text.replace("|", "\\|").replace(_OPEN, "."))


# ------------------------------------------------------------------------------------- docs/configuration.md


def configuration() -> Iterator[str]:
    """The page docs/configuration.md: a table a section, a row a setting."""
    yield "# Configuration reference"
    yield ""
    yield "Written by `docs/generate.py`; do not edit. A flag wins over the environment, that over"
    yield "the file `/etc/virtbus/virtbus.toml`, that over the default. `virtbus config sample` prints all"
    yield "of this as a commented file, `virtbus config show` what is in force and where each value comes"
    yield "from, and `virtbus config check` every problem with its place. In the environment `bus.url` is"
    yield "`VIRTBUS_BUS__URL`: two underscores for each dot."
    section = None
    for each in settings():
        if each.section != section:
            section = each.section
            yield ""
            yield f"## {f'[{section}]' if section else 'Top level'}"
            yield ""
            if section:
                yield f"{each.purpose.rstrip('.')}."
                yield ""
            yield "| setting | takes | default | |"
            yield "|---|---|---|---|"
        takes = each.type + (f", {each.bounds}" if each.bounds else "")
        default = "" if each.default is None else f"`{toml(each.default)}`"
        says = each.says if each.example is None else f"{each.says}; for example `{toml(each.example)}`"
        yield f"| `{each.name}` | {_bar(takes)} | {_bar(default)} | {_bar(says)} |"


def _bar(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
