"""What libraries raise, as one sentence."""

import socket
from http.client import IncompleteRead
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from pipeline.core.errors import ConfigError, PipelineError, TemporaryError, explained, is_temporary


def test_an_exception_becomes_a_sentence_with_what_helps() -> None:
    with pytest.raises(PipelineError) as raised, explained("a.parquet cannot be read", "see fgsm verify"):
        raise ValueError("\ntoo short\nmore")
    assert str(raised.value) == "a.parquet cannot be read (too short); see fgsm verify."
    assert isinstance(raised.value.__cause__, ValueError)


def test_without_a_fix_the_reason_ends_it() -> None:
    with pytest.raises(ConfigError) as raised, explained("user/images cannot be read", kind=ConfigError):
        raise OSError("too short")
    assert str(raised.value) == "user/images cannot be read: too short"


def test_what_is_a_sentence_already_or_a_bug_passes() -> None:
    for errors, raised in (((Exception,), PipelineError("a sentence")), ((OSError,), KeyError("a bug"))):
        with pytest.raises(type(raised)) as passed, explained("a.parquet cannot be read", errors=errors):
            raise raised
        assert passed.value is raised


def test_a_sentence_whose_kind_is_named_is_explained() -> None:
    with pytest.raises(PipelineError, match=r"^row 7: no image$"), explained("row 7", errors=(ConfigError,)):
        raise ConfigError("no image")


def answered(status: int) -> Exception:
    """What httpx and requests raise for a server's answer."""
    error = OSError("refused")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def client_error(status: int) -> ClientError:
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}, "GetObject")


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionResetError(), TimeoutError(), socket.gaierror(-2, "not known"), IncompleteRead(b"")),
        *(aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError(), EndpointConnectionError(endpoint_url="x")),
        *(answered(500), answered(429), client_error(503)),
    ],
    ids=repr,
)
def test_a_network_that_failed_is_told_from_a_config_that_is_wrong(error: Exception) -> None:
    with pytest.raises(TemporaryError), explained("source.path: x cannot be opened", kind=ConfigError):
        raise RuntimeError("wrapped") from error


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError("x"), PermissionError("x"), ValueError("x"), DatasetNotFoundError("x")),
        *(answered(404), client_error(403)),
        # Nothing is asked of the network, however often.
        *(OfflineModeIsEnabled("x"), ConnectionError("Couldn't reach x: offline mode is enabled")),
    ],
    ids=repr,
)
def test_what_stays_as_it_is_is_not_temporary(error: Exception) -> None:
    assert not is_temporary(error)
