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
from urllib.parse import quote

# Names of keys whose values are credentials, with `_` for `-`. `class_token` and `reg_tokens` are parameters of models.
SECRET_KEY = re.compile(
    r"token|((x|use|hf|hub|auth|access|api|amz|bearer|csrf|github|gitlab|id|oauth|private|refresh|sas|security|session"
    r"|slack)_?)+token"
    r"|(proxy_)?authorization|auth|(basic|http|proxy)_auth|(set_)?cookies?"
    r"|((user|db|proxy|smtp|ftp|http)_?)?(pass|pwd)|passcode"
    r"|.*(passwd|password|passphrase|secret|credential|api_?key|private_?key|access_?key|account_?key"
    r"|connection_?string).*",
    re.IGNORECASE,
)
# Tokens as their issuers write them, by the prefixes that these publish so that scanners find them; upper and lower
# case matter. A list of our own: the one of detect-secrets 1.5 lacks Hugging Face's and GitHub's newer tokens, and its
# measure of entropy takes file names of weights for keys.
TOKENS = (
    r"hf_[A-Za-z0-9]{20,}",
    r"gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(pat|oas|soat|dt|rt|cbt|ptt|ft|imt|agent|ffct)-[\w-]{20,}",
    r"sk-(proj|ant|or|svcacct|admin)-[\w-]{16,}|sk-[A-Za-z0-9]{32,}|[rs]k_(live|test)_[A-Za-z0-9]{16,}",
    r"(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{35}|ya29\.[\w-]{20,}",
    r"xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}|hooks\.slack\.com/services/[\w/]{20,}",
    r"npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{40,}|dckr_pat_[\w-]{20,}|nvapi-[\w-]{40,}",
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}(\.[\w-]*)?",
)
# Those, private keys, user:password@ in an address, what signs an address, and what a request or a connection string
# is signed with; all of it also where an address is quoted within another, as %3A%2F%2F. (Before the @ of abfs:// is a
# container.)
SECRET_TEXT = re.compile(
    rf"(?P<token>(?<![A-Za-z0-9])(?-i:{'|'.join(TOKENS)})"
    r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY( BLOCK)?-----(.*?-----END [A-Z ]{0,20}PRIVATE KEY( BLOCK)?-----|.*))"
    r"|(?P<scheme>\b(?!abfss?:)[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\"@]{1,300}@"
    r"|(?P<encoded>\b(?!abfss?%)[a-z][a-z0-9+.-]{0,20}%3A%2F%2F)((?!%2F|%3F|%23|%40)[^\s/?#'\"@]){1,300}%40"
    r"|(?P<key>([?&]|%3F|%26)(amp;)?([\w-]{0,40}(signature|credential|token|secret|access_?key(id)?|api_?key|password)"
    r"|sig|passwd|pass|pwd)(=|%3D))((?!%26)[^\s&'\")])+"
    r"|(?P<signed>\b(authorization['\"]?: ?['\"]?(bearer|basic|token|digest) |bearer (?=\S*\d)"
    r"|(account|sharedaccess)key=|x-[a-z-]{0,30}(key|token)['\"]?: ?['\"]?|cookie['\"]?: ?['\"]?"
    r"|(password|passwd|pwd)=(?!/)))[^\s;'\",)]{8,}",
    re.IGNORECASE | re.DOTALL,
)
# Variables of the environment that hold credentials: HF_TOKEN, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_CONNECTION_STRING
# and the like.
SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|COOKIE|API_?KEY|PRIVATE_?KEY|_(KEY|PASS|PWD|PAT|CONNECTION_STRING))",
    re.IGNORECASE,
)
# The keys of a label_map are names of classes.
CLASS_NAMES = re.compile(r"model(s\.[^.]+)?\.label_map")
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
            names_secret = (
                isinstance(key, str)
                and SECRET_KEY.fullmatch(key.replace("-", "_"))
                and not CLASS_NAMES.fullmatch(where)
            )
            # `use_auth_token: true` says where to look.
            if names_secret and inside is not None and not isinstance(inside, bool):
                return named
            if found := _find(inside, named, known):
                return found
    if isinstance(value, list | tuple):
        return next((found for inside in value if (found := _find(inside, where, known))), None)
    return None


def redact(text: str) -> str:
    """A text without credentials: those of the environment, tokens, keys, and those in addresses."""
    return _without(text, _environment())


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        # An address quotes what it carries.
        for form in (secret, quote(secret, safe=""), quote(secret)):
            text = text.replace(form, "***")
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
    if found["encoded"]:
        return f"{found['encoded']}***%40"
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
