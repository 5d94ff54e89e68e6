"""What publishing needs to know before anything is made: the id of the repository, and a token."""

import re

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it names it only by importing it

from pipeline.core.errors import ConfigError, explained


def check_repository_id(repo_id: str) -> None:
    """Refuse what is not the id of a dataset on the Hub, user/name.

    Raises:
        ConfigError: it is none.
    """
    what, fix = f"{repo_id!r} is not the id of a dataset on the Hub", "write it as user/name"
    with explained(what, fix, errors=(HFValidationError,), kind=ConfigError):
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it names no user")


def read_token() -> str:
    """The token as the client finds it: in the environment, or where `hf auth login` put it.

    Raises:
        ConfigError: there is none, or it cannot be one.
    """
    token = get_token()
    if token is None:
        raise ConfigError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch(r"[!-~]+", token):
        # An error of the HTTP library would show it.
        raise ConfigError(
            "The token for the Hub holds characters that no token has; log in again, or correct HF_TOKEN."
        )
    return token
