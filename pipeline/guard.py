"""Guard: what must not get out. Credentials out of a config, a log or a message; control characters into a terminal.

Names of classes, files and splits, and reasons that libraries give, come from elsewhere: a terminal takes some of
their characters for commands. A config is written into manifest.json and published with it, so it holds no
credential at all; they come from the environment, or from where `hf auth login` puts them.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Names of keys whose values are credentials. `class_token` and `reg_tokens` are parameters of models.
SECRET_KEY = re.compile(
    r"token|((use|hf|hub|auth|access|api|bearer|session|github|refresh)_?)+token|authorization"
    r"|.*(passwd|password|passphrase|secret|credential|api_?key|private_?key|access_?key|account_?key"
    r"|connection_?string).*",
    re.IGNORECASE,
)
# Tokens of the Hub, user:password@ in an address, what signs an address, and what a request or a connection string of
# Azure is signed with. (Before the @ of abfs:// is a container.)
SECRET_TEXT = re.compile(
    r"(?P<token>\bhf_[A-Za-z0-9]{20,})"
    r"|(?P<scheme>\b(?!abfss?:)[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\"@]{1,300}@"
    r"|(?P<key>[?&]([\w-]{0,40}(signature|credential|security-token|access_?key(id)?)|sig|token|api_?key|password)=)[^\s&'\")]+"
    r"|(?P<signed>\b(authorization['\"]?: ?['\"]?(bearer|basic|token) |bearer (?=\S*\d)|(account|sharedaccess)key=))"
    r"[^\s;'\",)]{8,}",
    re.IGNORECASE,
)
# Variables of the environment that hold credentials: HF_TOKEN, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_CONNECTION_STRING
# and the like.
SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|PRIVATE_?KEY|_(KEY|PASS|CONNECTION_STRING))", re.IGNORECASE
)
# The keys of a label_map are names of classes.
CLASS_NAMES = ("model.label_map", "evaluators.label_map")
# Shorter values are switches and numbers, and hiding them would garble messages.
SECRET_LENGTH = 8


def find_secret(config: Any) -> str | None:
    """The dotted key of the first credential in a config, None where there is none. Its value is never shown."""
    # Found once: an environment of a hundred variables is slow to search for each of a config's values.
    return _find(config, "", tuple(_environment()))


def _find(value: Any, where: str, known: Collection[str]) -> str | None:
    if isinstance(value, str):
        return where if _without(value, known) != value else None
    if isinstance(value, Mapping):
        for key, inside in value.items():
            named = f"{where}.{key}" if where else str(key)
            if _without(str(key), known) != str(key):
                return where or "a key"
            names_secret = isinstance(key, str) and SECRET_KEY.fullmatch(key) and where not in CLASS_NAMES
            if names_secret and inside not in (None, False):
                return named
            if found := _find(inside, named, known):
                return found
    if isinstance(value, list | tuple):
        return next((found for inside in value if (found := _find(inside, where, known))), None)
    return None


def redact(text: str) -> str:
    """A text without credentials: those of the environment, tokens of the Hub, and those in addresses."""
    return _without(text, _environment())


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return SECRET_TEXT.sub(_shown, text)


def redact_answer(text: str) -> str:
    """What a server or its client has said, without credentials: an address loses user and query, which may sign it."""
    # These at any length, and the name that goes with them.
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", redact(text))
    return re.sub(r"(\w://[^\s?'\"]+)\?[^\s'\")]+", r"\1?...", text)


def _shown(found: re.Match[str]) -> str:
    if found["scheme"]:
        return f"{found['scheme']}***@"
    return f"{found['key'] or found['signed'] or ''}***"


def _environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_VARIABLE.fullmatch(name) and len(value) >= SECRET_LENGTH and not _is_path(value):
            yield value


def _is_path(value: str) -> bool:
    """Whether a variable holds the path to credentials, which is none. AWS's secrets may begin like one."""
    try:
        return Path(value).is_absolute() and Path(value).exists()
    except (OSError, ValueError):  # too long for a name, or not for us to see
        return False


def printable(text: str, keep: str = "") -> str:
    """A text that a terminal only shows: what is not printable becomes its escape, but for some characters to keep."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def presentable(text: str, keep: str = "") -> str:
    """A text for people, or a log: printable, and without credentials."""
    return printable(redact(text), keep)
