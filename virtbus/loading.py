"""Reads the settings: a flag wins over the environment, that over the file, that over the default.

All problems are reported at once, each with the place it comes from.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from virtbus import redaction
from virtbus.config import Config, json_schema, read_secret
from virtbus.errors import ConfigError, InputMissing

DEFAULT_FILE = Path("/etc/virtbus/virtbus.toml")
ENVIRONMENT_PREFIX = "VIRTBUS_"
# Not settings: what is read elsewhere, what an exec hook is given, what the tests use, and what Kubernetes
# puts into every pod beside a Service that is named like us (VIRTBUS_SERVICE_HOST, VIRTBUS_PORT_9466_TCP, …).
_NOT_SETTINGS = re.compile(
    r"VIRTBUS_(CONFIG|DEBUG|CI|FAULTS|EVENT_.*|SOAK_.*|FUZZ_.*|TEST_.*|([A-Z0-9]+_)*SERVICE_(HOST|PORT(_.*)?)|([A-Z0-9]+_)*PORT(_.*)?)"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, where each value that is not a default comes from, and the file that was read."""

    config: Config
    origins: Mapping[str, str]
    file: Path | None


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Read and check all settings.

    `file` must exist when it is named; without it DEFAULT_FILE is read if it is there. `flags` maps
    dotted keys ("bus.url") to values; None means not given.

    Raises ConfigError with one line a problem, InputMissing when the named file can't be read.
    """
    schema, problems = json_schema(described=False), []
    merged, origins = _read(file or DEFAULT_FILE, must_exist=file is not None)
    used = None if merged is None else file or DEFAULT_FILE
    merged = merged or {}
    for name, raw in sorted((environment if environment is not None else os.environ).items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or _NOT_SETTINGS.fullmatch(name):
            continue
        key = name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
        try:
            value = _from_text(schema, key, raw)
        except ValueError as error:
            problems.append(f"environment {name}: {error}")
            continue
        if not _set(merged, key, value):
            problems.append(f"environment {name}: {key.rpartition('.')[0]} is not a section")
        origins[key] = f"environment {name}"
    for key, given in (flags or {}).items():
        if given is not None:
            _set(merged, key, given)
            origins[key] = f"flag --{key.replace('.', '-').replace('_', '-')}"
    _take_the_flags_broker(merged, flags or {})
    # The schema's check can't even read text that is not UTF-8.
    problems += list(_unusable_text(merged, origins)) or _check(schema, merged, origins)
    if not problems:
        try:
            config = msgspec.convert(merged, Config)
        except msgspec.ValidationError as error:  # 12.0 is an integer for the schema, and none for us
            words, _, at = str(error).partition(" - at `$.")
            key = at.rstrip("`")
            expected = _expected(_schema_at(schema, key)) or words
            raise ConfigError(
                f"{_place(key, origins)}: {key}: expected {expected}, without a decimal point"
            ) from error
        problems += [f"{_place(key, origins)}: {text}" for key, text in _cross_checks(config, origins)]
        if not problems:
            return Loaded(config, origins, used)
    raise ConfigError("\n".join(problems))


def _read(path: Path, *, must_exist: bool) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The file's settings (None: there is none), and where each stands in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
        found = tomllib.loads(text)
    except FileNotFoundError:
        if not must_exist:
            return None, {}
        raise InputMissing(f"configuration file {path} does not exist; name another with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error})"
        raise InputMissing(
            f"configuration file {path} can't be read: {why}; fix it, or name another with --config"
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    lines = _lines_of_keys(text)
    return found, {key: f"{path}:{lines[key]}" if key in lines else str(path) for key, _ in leaves(found)}


def _take_the_flags_broker(merged: dict[str, Any], flags: Mapping[str, object]) -> None:
    """A flag's broker is logged into as the flag says: address and login of another one go."""
    url, bus = flags.get("bus.url"), merged.get("bus")
    if not isinstance(url, str) or not isinstance(bus, dict):
        return
    login = url.partition("://")[2].rpartition("@")[0]
    for name in ("url_file", *(("username", "password_file") if ":" in login else ())):
        if flags.get(f"bus.{name}") is None:
            bus.pop(name, None)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key with its value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lines_of_keys(text: str) -> dict[str, int]:
    """Dotted key → line number, for plain `[section]` and `key = value` lines (for messages only)."""
    section, found = "", {}
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[+\s*([\w.\"-]+)\s*\]+", line):
            section = head[1].replace('"', "") + "."
        elif item := re.match(r"\s*([\w.\"-]+)\s*=", line):
            found[section + item[1].replace('"', "")] = number
    return found


def _set(tree: dict[str, Any], key: str, value: object) -> bool:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            return False
        tree = child
    tree[last] = value
    return True


# ------------------------------------------------------------------------------------- the schema's word


def resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A node of the JSON schema, or the definition that it refers to."""
    if "$ref" not in node:
        return node
    target: Mapping[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return target


def _schema_at(schema: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    node = resolved(schema, schema)
    for part in key.split(".") if key else ():
        properties = node.get("properties", {})
        if part in properties:
            node = resolved(schema, properties[part])
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
        else:
            return None
    return node


def knows(key: str) -> bool:
    """Whether a dotted key is a setting (or a place for free ones)."""
    return _schema_at(json_schema(described=False), key) is not None


def from_text(key: str, raw: str) -> object:
    """A setting's value from text, as in the environment. Raises ConfigError naming the key."""
    try:
        return _from_text(json_schema(described=False), key, raw)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _from_text(schema: Mapping[str, Any], key: str, raw: str) -> object:
    """An environment variable's text as the type its setting has; what is not text is written as in TOML."""
    node = _schema_at(schema, key)
    if node is None:
        return raw  # unknown: the check names it
    types = {option["type"] for option in node.get("anyOf", [node]) if "type" in option}
    if "null" in types and raw == "":
        return None
    if not types - {"null"} or "string" in types:
        return raw
    try:
        (value,) = tomllib.loads(f"value = {raw}").values()  # a second line is not part of a value
        return value
    except (ValueError, RecursionError):
        wanted = " or ".join(sorted(types - {"null"}))
        # A table or list may hold secrets; a number does not.
        shown = "it" if types & {"object", "array"} else repr(raw)
        raise ValueError(f"{shown} is not a TOML {wanted}") from None


def _check(schema: dict[str, Any], merged: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    problems = []
    for error in jsonschema_rs.validator_for(schema).iter_errors(merged):
        where = ".".join(str(part) for part in error.instance_path)
        unexpected = getattr(error.kind, "unexpected", None)
        if unexpected:
            known = list((_schema_at(schema, where) or {}).get("properties", {}))
            for name in unexpected:
                key = f"{where}.{name}" if where else name
                problems.append(f"{_place(key, origins)}: unknown setting {key}{_did_you_mean(name, known)}")
            continue
        shown = repr(error.instance)
        # A URL with a password, in whatever it was wrapped.
        if redaction.is_secret(where) or ("://" in shown and "@" in shown):
            shown = redaction.HIDDEN
        message = error.message.removeprefix(json.dumps(error.instance, ensure_ascii=False)).strip()
        expected = _expected(_schema_at(schema, where) if where else None)
        why = f"expected {expected}" if expected else message
        problems.append(f"{_place(where, origins)}: {where or 'the file'} = {shown}: {why}")
    return sorted(problems)


_KINDS = {"string": "text", "number": "a number", "integer": "a whole number", "boolean": "true or false",
          "array": "a list", "object": "a table"}  # fmt: skip
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}


def _expected(node: Mapping[str, Any] | None) -> str:
    words = []
    for option in (node or {}).get("anyOf", [node or {}]):
        words += [repr(value) for value in option.get("enum", ()) if value is not None]
        kind = _KINDS.get(option.get("type", ""))
        if "enum" in option or kind is None:
            continue
        limits = [f"{sign} {option[name]}" for name, sign in _LIMITS.items() if name in option]
        if "pattern" in option:
            limits.append("of the form " + ", ".join(option.get("examples", [option["pattern"]])))
        if option.get("minLength"):
            limits.append("not empty")
        words.append(" ".join([kind, *limits]))
    return " or ".join(words)


def _unusable_text(node: Any, origins: Mapping[str, str], key: str = "") -> Iterator[str]:
    """Text that no file, socket or broker takes: it would break whoever uses it, on its own thread."""
    if isinstance(node, str):
        try:
            node.encode()
        except UnicodeEncodeError:
            yield f"{_place(key, origins)}: {key} is not UTF-8 text"
        if "\0" in node:
            yield f"{_place(key, origins)}: {key} holds a NUL character"
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _unusable_text(value, origins, f"{key}.{name}" if key else name)
            yield from _unusable_text(name, origins, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _unusable_text(value, origins, key)


def _did_you_mean(name: str, known: list[str]) -> str:
    import difflib  # here only: an agent whose settings are right never needs it

    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _place(key: str, origins: Mapping[str, str]) -> str:
    while key:
        found = [place for name, place in origins.items() if name == key or name.startswith(f"{key}.")]
        if found:
            return origins.get(key, found[0])
        key = key.rpartition(".")[0]
    return "configuration"


def _cross_checks(config: Config, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Rules between settings: the key, and what is wrong."""
    bus = config.bus
    if bus.url is not None and bus.url_file is not None:
        place = _place("bus.url", origins)
        yield "bus.url_file", f"bus.url and bus.url_file are both set (bus.url by {place}); keep one"
    if (bus.tls.cert_file is None) != (bus.tls.key_file is None):
        yield "bus.tls", "bus.tls.cert_file and bus.tls.key_file go together; set both"
    if bus.auth == "external" and bus.tls.cert_file is None:
        yield "bus.auth", "bus.auth = 'external' needs bus.tls.cert_file and key_file"
    if len(bus.exchange.encode()) > 255:  # AMQP's short string
        yield "bus.exchange", "bus.exchange is longer than 255 bytes of UTF-8"
    if config.incidents.max_window_seconds < config.incidents.first_window_seconds:
        then = "make it at least as long"
        yield "incidents", f"incidents.max_window_seconds is less than incidents.first_window_seconds; {then}"
    listens = (config.http.listen, config.react.listen, config.react.fleet_listen)
    for key, listen in zip(("http.listen", "react.listen", "react.fleet_listen"), listens, strict=True):
        if listen and not 0 < int(listen.rpartition(":")[2]) < 65536:
            yield key, f"{key} = {listen!r}: port out of 1 to 65535"


def bus_url(config: Config) -> str:
    """The bus URL, from the setting or its file. Raises ConfigError when there is none."""
    url = config.bus.url
    if url is None and config.bus.url_file is not None:
        url = read_secret(config.bus.url_file, "bus.url_file")
    if not url:
        raise ConfigError(
            "no bus URL: name one with --bus amqp://…|kafka://…|embedded:, VIRTBUS_BUS__URL, "
            f"or bus.url in {DEFAULT_FILE}"
        )
    return url


# ------------------------------------------------------------------------------------ what may be shown


def differences(old: Config, new: Config) -> list[str]:
    """The dotted keys whose values differ, sorted."""
    before, after = (dict(leaves(msgspec.to_builtins(config))) for config in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def effective(config: Config) -> dict[str, Any]:
    """All settings as plain data, redacted: safe to print."""

    def clean(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: clean(value, f"{key}.{name}" if key else name) for name, value in node.items()}
        if isinstance(node, list | tuple):
            if key.endswith("command"):  # whatever stands behind the program may be a password or a token
                return [word if at == 0 else redaction.HIDDEN for at, word in enumerate(node)]
            return [clean(item, key) for item in node]
        if node is not None and redaction.is_secret(key):
            return redaction.HIDDEN
        return redaction.uri(node) if isinstance(node, str) and (key == "bus.url" or "://" in node) else node

    redacted: dict[str, Any] = clean(msgspec.to_builtins(config), "")
    return redacted


def exposed_secrets(loaded: Loaded) -> list[str]:
    """Secrets that another user of this host can read: what, where, and what to do; one line each."""
    plain, shown = msgspec.to_builtins(loaded.config), dict(leaves(effective(loaded.config)))
    found = []
    for key, value in leaves(plain):
        origin = loaded.origins.get(key, loaded.origins.get(key.rpartition(".")[0], ""))
        if value is not None and key.endswith(("password_file", "url_file", "token_file", "key_file")):
            if _is_open(value):
                found.append(f"{key}: {value} can be read by every user: chmod o-r it")
        elif value is None or (list(value) if isinstance(value, tuple) else value) == shown[key]:
            continue
        elif origin.startswith("flag"):
            found.append(f"{key}: a secret in a flag shows in ps: put it into a file (bus.url_file, say)")
        elif loaded.file is not None and origin.startswith(str(loaded.file)) and _is_open(loaded.file):
            found.append(f"{key}: {origin} holds a secret and can be read by every user: chmod o-r it")
    return found


def _is_open(path: str | Path) -> bool:
    try:
        return bool(Path(path).stat().st_mode & 0o004)
    except OSError:
        return False
