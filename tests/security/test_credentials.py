"""Credentials: refused in a config, and shown nowhere."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipeline.engine.decode
from pipeline.config.load import load_config
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import find_secret, presentable, redact
from tests.conftest import WriteConfig, fgsm

SECRET = "hf_" + "S3cretS3cret" * 3

# --------------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"source.kwargs={{token: {SECRET}}}", "source.kwargs.token"),
        ("source.kwargs={a: {storage: [{password: swordfish}]}}", "source.kwargs.a.storage.password"),
        ("model.kwargs={use_auth_token: swordfish}", "model.kwargs.use_auth_token"),
        ("model.kwargs={api_key: swordfish}", "model.kwargs.api_key"),
        ("model.kwargs={aws_secret_access_key: swordfish}", "model.kwargs.aws_secret_access_key"),
        (f"source.path={SECRET}", "source.path"),
        ("source.path=https://user:swordfish@host/data", "source.path"),
        ("source.path=https://host/data?X-Amz-Signature=swordfish", "source.path"),
        ("output.path=s3://key:swordfish@bucket/x", "output.path"),
        ("model.weights=swordfish-of-the-environment", "model.weights"),
        ("source.kwargs={connection_string: swordfish}", "source.kwargs.connection_string"),
        ("source.kwargs={a: 'AccountName=a;AccountKey=swordfish/+==;EndpointSuffix=b'}", "source.kwargs.a"),
        ("source.kwargs={a: 'Authorization: Basic swordfish'}", "source.kwargs.a"),
        (f"nonsense={SECRET}", "nonsense"),
    ],
)
def test_a_config_with_a_credential_is_refused_without_showing_it(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-of-the-environment")
    for debug in ((), ("--debug",)):
        result = fgsm("generate", write_config(), "--set", override, *debug)
        assert result.exit_code == 2
        assert re.search(f"Error: {key} .*credential", result.stderr)
        assert "swordfish" not in result.output
        assert SECRET not in result.output


@pytest.mark.parametrize(
    "path",
    [
        "simplecache::https://host/a.tar?auth=1",
        "zip://a.parquet::https://host/a.zip#auth=1",
        "HTTPS://host/a.tar?auth=1",
    ],
)
def test_no_part_of_a_chain_of_addresses_has_a_query(write_config: WriteConfig, path: str) -> None:
    source = {"path": path, "streaming": True}
    with pytest.raises(ConfigError, match=r"^source\.path .*query"):
        load_config(str(write_config(source=source)))
    with pytest.raises(ConfigError, match=r"^output\.path: .*s3://bucket/prefix"):
        load_config(str(write_config(output={"path": path})))


def test_classes_may_be_named_as_credentials_are() -> None:
    classes = {"password": "token", "api_key": 3}
    model = {"label_map": classes}
    assert find_secret({"model": model, "models": {"other": model}}) is None
    assert find_secret({"model": {"label_map": {**classes, "cat": SECRET}}}) == "model.label_map.cat"
    assert find_secret({"model": {"label_map": {SECRET: 3}}}) == "model.label_map"
    assert find_secret({"model": {"kwargs": model}}) == "model.kwargs.label_map.password"


def test_secrets_may_begin_as_paths_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for secret in ("/swordfish/of+the", "/" + "s" * 300):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        assert redact(f"with {secret}.") == "with ***."
        assert find_secret({"model": {"name": secret}}) == "model.name"
    (tmp_path / "token").touch()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{tmp_path}/token")
    assert redact(f"in {tmp_path}/token") == f"in {tmp_path}/token"


@pytest.mark.parametrize(
    "name", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "DB_PASS"]
)
def test_credentials_of_other_stores_are_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "swordfish+of/the/sea==")
    assert redact("with swordfish+of/the/sea==.") == "with ***."
    assert find_secret({"source": {"path": "swordfish+of/the/sea=="}}) == "source.path"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("AccountName=me;AccountKey=abc/def+ghi==;Endpoint=x", "AccountName=me;AccountKey=***;Endpoint=x"),
        ("Endpoint=x;SharedAccessKey=abc/def+ghi==", "Endpoint=x;SharedAccessKey=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("sent Bearer abc4defgh", "sent Bearer ***"),
    ],
)
def test_what_signs_a_request_is_no_text(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text", ["a cup bearer standing", "the standard bearer 8", "AccountKey=None", "monkey=business"]
)
def test_words_stay_words(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEYBOARD", "standing")
    monkeypatch.setenv("BY_PASSING", "business")
    monkeypatch.setenv("SORT_KEY", "cup")
    assert redact(text) == text


@pytest.mark.parametrize("key", ["source.path", "source.kwargs.root", "model.weights"])
def test_a_password_in_an_address_is_found_where_a_path_belongs(write_config: WriteConfig, key: str) -> None:
    """Made a path, https:// would have one slash, and the password would be quoted as a folder that is not there."""
    result = fgsm(
        "generate", write_config(), "--set", "source.kind=imagefolder", "--set", f"{key}=https://me:hush@host/x.pt"
    )
    assert result.exit_code == 2
    assert re.search(f"Error: {key} .*credential", result.stderr)
    assert "hush" not in result.output


@pytest.mark.parametrize("text", ["glass-bottles-and-other-containers", "glove-compartments-of-cars-v2"])
def test_names_that_begin_like_tokens_are_no_secrets(text: str) -> None:
    assert find_secret({"source": {"path": f"data/{text}", "classes": [text]}}) is None
    assert redact(text) == text


# Put together here, so that no scanner takes this file for a leak.
ISSUED = [
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 20,
    "glpat-" + "a1B2" * 5,
    "sk-" + "a1B2" * 12,
    "sk-proj-" + "a1-B_" * 8,
    "sk-ant-api03-" + "a1-B_" * 8,
    "sk_live_" + "a1B2" * 6,
    "AKIA" + "A1B2" * 4,
    "ASIA" + "A1B2" * 4,
    "AIza" + "a1B2c" * 7,
    "xoxb-" + "123456789012-" * 2 + "abcdef",
    "hf_" + "aB" * 17,
    "npm_" + "a1B2" * 9,
    "eyJ" + "hbGciOiJ9." + "eyJ" + "zdWIiOiJ9.dozjgNryP4",
    "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE\nabcd\n-----END RSA PRIVATE " + "KEY-----",
    "-----BEGIN PRIVATE " + "KEY-----\nMIIE",
    "-----BEGIN OPENSSH PRIVATE " + "KEY-----\nb3Bl",
]


@pytest.mark.parametrize("token", ISSUED)
def test_tokens_are_known_by_how_their_issuers_write_them(token: str) -> None:
    assert find_secret({"model": {"kwargs": {"a": [token]}}}) == "model.kwargs.a"
    assert find_secret({"source": {"path": f"https://host/{token}/x"}}) == "source.path"
    assert redact(f"read with {token}") == "read with ***"


@pytest.mark.parametrize(
    "key",
    [
        "pwd",
        "pass",
        "passwd",
        "PASSWORD",
        "db_pass",
        "cookie",
        "Set-Cookie",
        "X-Api-Token",
        "X-Api-Key",
        "auth_token",
        "Authorization",
        "Proxy-Authorization",
        "sas_token",
        "client_secret",
        "private-key",
        "auth",
    ],
)
def test_keys_that_name_credentials(key: str) -> None:
    assert find_secret({"source": {"kwargs": {"headers": {key: "swordfish"}}}}) == f"source.kwargs.headers.{key}"
    assert find_secret({"source": {"kwargs": {key: True}}}) is None, "a switch"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to=https%3A%2F%2Fme%3Apw%40host%2Fx", "to=https%3A%2F%2F***%40host%2Fx"),
        (
            "u=https%3A%2F%2Fhost%2Fx%3FX-Amz-Signature%3Dabc%26b%3D2",
            "u=https%3A%2F%2Fhost%2Fx%3FX-Amz-Signature%3D***%26b%3D2",
        ),
        ("https%3A%2F%2Fhost%2Fx%3Fa%3D1%26sig%3Dab%252Fc", "https%3A%2F%2Fhost%2Fx%3Fa%3D1%26sig%3D***"),
        ("https://host/x?sv=1&sig=abc%2Fd&se=2", "https://host/x?sv=1&sig=***&se=2"),
        ("https://host/x?a=1&amp;access_token=abc", "https://host/x?a=1&amp;access_token=***"),
        ("got sword%2Ffish%2Bof%2Fthe%20sea", "got ***"),
        ("got sword/fish%2Bof/the%20sea", "got ***"),
        ("Cookie: session=abcdefgh", "Cookie: ***"),
        ("{'X-Api-Token': 'abcdefgh'}", "{'X-Api-Token': '***'}"),
        ("Server=h;Uid=me;Pwd=swordfish;", "Server=h;Uid=me;Pwd=***;"),
    ],
)
def test_credentials_are_known_within_addresses_and_headers(
    monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    monkeypatch.setenv("MY_SECRET", "sword/fish+of/the sea")
    assert redact(text) == shown


@pytest.mark.parametrize(
    "value",
    [
        "resnet50-0676ba61.pth",
        "weights/sk-resnet-50-imagenet-224-epoch-100.safetensors",
        "0123456789abcdef0123456789abcdef01234567",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "550e8400-e29b-41d4-a716-446655440000",
        "vit_base_patch16_clip_quickgelu_224.dfn2b_s39b_in12k",
        "hf-hub:timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
        "models.my_very_long_package_name:build_a_model_with_a_long_name_2",
        "/data/AsiaFaces2020Collection/asia1234567890123456/train",
        "data/mask-0123456789abcdef0123456789abcdef.png",
        "s3://bucket/a@b/pass/token=1",
        "abfs://container@account.dfs.core.windows.net/x",
        "https://host/a/b%40c?page=2",
        "https%3A%2F%2Fhost%2Fa%40b",
        "n02124075, Egyptian cat; the pass of the cookie",
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_ordinary_values_are_no_credentials(value: str) -> None:
    assert find_secret({"model": {"weights": value, "kwargs": {"a": [value]}}, "source": {"classes": [value]}}) is None
    assert redact(value) == value


@pytest.mark.parametrize("key", ["passes", "bypass", "num_pass", "compass", "author", "token_size", "keypass_dim"])
def test_keys_that_only_look_like_those_of_credentials(key: str) -> None:
    assert find_secret({"model": {"kwargs": {key: "x"}}}) is None


@pytest.mark.parametrize(
    "kwargs", [{"class_token": True}, {"reg_tokens": 4}, {"global_pool": "token"}, {"token": None}, {"num_tokens": 1}]
)
def test_parameters_of_models_are_no_credentials(kwargs: dict[str, Any]) -> None:
    assert find_secret({"model": {"kwargs": kwargs}}) is None


def test_messages_lose_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish/of+the/environment")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = f"{SECRET} https://me:pw@host/x?a=1&sig=abc&b=2 swordfish/of+the/environment short"
    assert redact(text) == "*** https://***@host/x?a=1&sig=***&b=2 *** short"
    assert presentable(f"\x1b{SECRET}") == "\\x1b***"


def test_a_bug_s_traceback_shows_no_credential() -> None:
    code = (
        "import pipeline.cli, pipeline.output.summary, sys\n"
        "address, secret = 'https://me:pw@host/x?X-Amz-Signature=abc', sys.argv[1]\n"
        "def broken(*_): raise RuntimeError(f'GET {address} {secret}')\n"
        "pipeline.output.summary.inspect, sys.argv[1:] = broken, ['inspect', 'out']\n"
        "pipeline.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, SECRET], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: GET https://***@host/x?X-Amz-Signature=*** ***" in done.stderr
    assert SECRET not in done.stderr


def test_a_token_of_the_environment_is_in_no_file(
    write_config: WriteConfig, tmp_path: Path, factory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a factory logs it and quotes it, and a decoder quotes it about an image."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    careless = """
import logging, os
logging.getLogger("pipeline.factory").warning("logged %s", os.environ["HF_TOKEN"])

def fail(**kwargs):
    raise RuntimeError("quoted " + os.environ["HF_TOKEN"])
"""
    factory_file.write_text(factory_file.read_text() + careless)
    config = write_config(runtime={"max_skipped": 0.5})
    broken = fgsm("generate", config, "--set", f"model.name={factory_file}:fail", "--debug")
    assert broken.exit_code == 2
    assert "logged ***" in broken.stderr
    assert "quoted ***" in broken.stderr

    whole, seen = pipeline.engine.decode._upright, []

    def quoting(image: Image.Image) -> Image.Image:
        seen.append(image)
        if len(seen) % 7 == 0:
            raise ValueError(f"read with {SECRET}")
        return whole(image)

    monkeypatch.setattr("pipeline.engine.decode._upright", quoting)
    done = fgsm("generate", config, "--debug")
    assert done.exit_code == 0
    inspected = fgsm("inspect", tmp_path / "out")
    assert "read with ***" in inspected.stdout
    files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    reasons = [name for name, path in files.items() if b"read with ***" in path.read_bytes()]
    assert {"manifest.json", "report.html"} <= {*reasons}
    assert any(name.startswith(".run/receipts/") for name in reasons)
    assert "README.md" in files
    for said in (broken.output, done.output, inspected.output):
        assert SECRET not in said
    for path in files.values():
        assert SECRET.encode() not in path.read_bytes()
