"""Decides what of a name, a text or a URI may leave the host.

It decides on the names of images, the hosts of storage, texts and URIs; a guest's own name, serials, aliases
and targets leave as they are. They leave in events, log lines, recordings, status, `doctor`, dead letters'
reasons, and the text of every VirtbusError. Guarantees:

1. what may be a secret is hidden: passwords (and, in a source's name, users) before an "@", values of a query
   or of options whose key is not known to be harmless, `json:` pseudo-protocol paths as a whole;
2. a name or text without a secret comes back as it is: file names byte for byte, `?socket=/run/x` too;
3. each function leaves its own result, and that of the others, as it is.

Works on the text, not on a parsed URL: a password with "/", "?" or "@" in it must not pass for a path. Where
the two can't be told apart, too much is hidden rather than too little.
"""

from __future__ import annotations

import re

HIDDEN = "***"

# Options and query keys that say where or how, never with which secret: libvirt's remote URIs
# (https://libvirt.org/uri.html), QEMU's block drivers, and virtbus's own.
_HARMLESS = re.compile(
    "socket|mode|name|command|proxy|pkipath|no_sanity|no_verify|no_tty|sshauth|netcat|keyfile|known_hosts"
    "|known_hosts_verify|tls_priority|transport|exportname|max_bytes|speed"
)
_SECRET_WORDS = re.compile(
    r"pass|pwd|secret|token|credential|jaas|cookie|apikey|authorization|sessionid|oauthbearer\.config"
    r"|(^|[._-])(sig|signature|sas)($|[._-])"
    r"|(^|[._-])key($|[._-])(?!file)",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Whether a setting of this dotted key, or an option of this name, holds what is never shown."""
    name = key.rpartition("options.")[2] if "options." in key else key.rpartition(".")[2]
    return bool(_SECRET_WORDS.search(name)) and not name.endswith(("_file", ".location", "_command"))


# ------------------------------------------------------------------------------------------- our own URIs


def uri(given: str) -> str:
    """A URI of the settings (or several, by ";") without passwords and without the values of unknown keys."""
    return ";".join(_one_uri(part) for part in re.split(r";(?=[a-z][a-z0-9+.-]*:)", given))


def _one_uri(given: str) -> str:
    shown = re.sub(r"^([^:/]*:/*)([^:@?]*):.*@", rf"\1\2:{HIDDEN}@", given, flags=re.DOTALL)
    head, mark, query = shown.partition("?")
    return f"{head}{mark}{_query(query)}"


def _query(query: str) -> str:
    """A query with the values of unknown keys hidden."""
    return "".join(_pair(word) if at % 2 == 0 else word for at, word in enumerate(re.split(r"([&;])", query)))


def _pair(word: str) -> str:
    key, equals, value = word.partition("=")
    if not word or (_HARMLESS.fullmatch(key) and "://" not in value):
        return word
    return f"{key}={HIDDEN}" if equals else HIDDEN


# ------------------------------------------------------------------------------- names of files and images

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)(.*)", re.DOTALL)
_USER_AND_PASSWORD = re.compile(r"[^/:?]*:(?![\w.-]+=).*@", re.DOTALL)
_OPTIONS = re.compile(r"[:;&][\w.-]+=.*", re.DOTALL)  # of rbd:…:key=…, also without the "rbd:"
_COMMA_OPTION = re.compile(r"(?:^|,)\s*([\w.-]+)=")


def path(name: str, *, local: bool = False) -> str:
    """What an image or device is called, without what could be a secret.

    `local` says that it is known to be a path of the host's file system: then it is kept as it is. Otherwise
    it may be a network image's, of which a URI's query was never parted (libvirt's callbacks don't say).
    """
    if name.startswith("/"):
        return name if local else name.split("?", 1)[0]
    if name.startswith("json:"):
        return f"json:{HIDDEN}"
    if url := _URL.fullmatch(name):
        return url[1] + _without_user(*_cut_query(url[2]))
    if _USER_AND_PASSWORD.match(name):
        return f"{HIDDEN}@{_without_options(host(name).split('?', 1)[0])}"
    return _without_options(name.split("?", 1)[0])


def host(name: str) -> str:
    """A host's name without the user and password before it."""
    return name.rpartition("@")[2]


def _cut_query(rest: str) -> tuple[str, str]:
    """What follows a URL's scheme → (all but the query, the query when it is harmless)."""
    head, tail = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr] # it matches
    if "@" in tail and "@" not in head and ":" in head:  # the "?" or "#" stands in a password
        return rest, ""
    harmless = tail.startswith("?") and _query(tail[1:]) == tail[1:]
    return head, tail if harmless else ""


def _without_user(rest: str, query: str) -> str:
    authority, slash, tail = rest.partition("/")
    _, at, after = authority.rpartition("@")
    if at:
        authority = f"{HIDDEN}@{after}"
    elif ":" in authority and "@" in tail:
        # A password may hold a "/": then what looks like a host and a port is a user and a password.
        authority, slash, tail = f"{HIDDEN}@{host(tail)}", "", ""
    return _without_options(authority + slash + tail) + query


def _without_options(name: str) -> str:
    name = _OPTIONS.sub("", name)
    for option in _COMMA_OPTION.finditer(name):
        if is_secret(option[1]):
            return name[: option.start()]
    return name


# ------------------------------------------------------------------------------------------------ any text

# Lengths are bounded where a pattern may begin at every letter: text of a guest must not cost its square.
# What does not even match the first one has nothing to hide.
_SUSPECT = re.compile(r"[@=?]|://|json:|earer |uthorization:|[\"']\s*:")
_JSON_PATH = re.compile(r"json:\s*\{(?:.*\}|.*)", re.DOTALL)
_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,30})://([^\s@]*)@")
_URL_QUERY = re.compile(r"(://[^\s?#\"'<>]*[?#])([^\s\"'<>]*)")
_NAME_QUERY = re.compile(r"(\?(?=[\w.%-]{1,64}=))([^\s\"'<>]*)")
_OPTION = re.compile(r"(^|.)\b([\w.-]{1,64})=(\"[^\"]*\"|'[^']*'|(?:\\.|[^\s,;&:'\")])+)", re.DOTALL)
_MEMBER = re.compile(r"([\"'])([\w.-]+)\1\s*:\s*(\"(?:\\.|[^\"])*\"?|'(?:\\.|[^'])*'?)")
_LOGIN = re.compile(r"(?<![\w/@.+-])([\w.+-]{1,64}):(?!//)([^\s'\"]{1,256})@(?=[\w\[])")
_BEARER = re.compile(r"\b([Bb]earer|[Aa]uthorization:\s*\w+)\s+[^\s'\"]+")


def text(words: object) -> str:
    """Text for people, an exception's say, that may hold names, URLs or options anywhere in it.

    Raises nothing: what has no text ("str" of somebody's exception raises) is named by its type.
    """
    try:
        shown = str(words)
    except Exception:  # noqa: BLE001 - whatever it is, a log line must not end who writes it
        return f"({type(words).__name__} without words)"
    if not _SUSPECT.search(shown):
        return shown
    shown = _JSON_PATH.sub(f"json:{HIDDEN}", shown)
    shown = _USER.sub(_user, shown)
    shown = _NAME_QUERY.sub(_without_values, _URL_QUERY.sub(_without_values, shown))
    shown = _OPTION.sub(_option, shown)
    shown = _MEMBER.sub(
        lambda found: f"{found[1]}{found[2]}{found[1]}: {HIDDEN}" if is_secret(found[2]) else found[0], shown
    )
    shown = _LOGIN.sub(rf"\1:{HIDDEN}@", shown)
    return _BEARER.sub(rf"\1 {HIDDEN}", shown)


def _user(found: re.Match[str]) -> str:
    scheme, user = found[1], found[2]
    name, colon, _ = user.partition(":")
    if colon:
        return f"{scheme}://{name}:{HIDDEN}@"
    # A token stands there for some servers; who logs in at a broker or hypervisor is not a secret.
    # libiscsi parts user and password by "%".
    hidden = scheme.lower() in ("http", "https", "ftp", "ftps") or "%" in name
    return f"{scheme}://{HIDDEN if hidden else name}@"


def _without_values(found: re.Match[str]) -> str:
    query = found[2].rstrip(":,.;)")  # punctuation belongs to the sentence
    return found[1] + _query(query) + found[2][len(query) :]


def _option(found: re.Match[str]) -> str:
    before, key = found[1], found[2]
    # A bare "key=" is an option where it follows another one (rbd:…:key=…), and a word of ours elsewhere.
    hidden = is_secret(key) and (key.lower() != "key" or before in tuple(":,;&?"))
    value = HIDDEN if hidden else _OPTION.sub(_option, found[3])  # of path='rbd:…:key=…', say
    return f"{before}{key}={value}"
