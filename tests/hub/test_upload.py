"""Publish: the real client against a Hub on the loopback, which breaks, refuses and forgets to answer."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import close_session, constants, get_session
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from pipeline.hub import upload
from pipeline.hub.upload import _client_that_gives_up, list_files, redact
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import require_manifest
from pipeline.output.summary import human_bytes
from tests.conftest import CLASSES, WriteConfig, fgsm, generate, pixels, rows, shard_path, without_run
from tests.support.hub import (
    LFS_SUFFIXES,
    Hub,
    Repository,
    User,
    environment,
    git_blob,
    lfs_blob,
    read_back,
    running_hub,
)
from tests.support.processes import wait_for
from tests.support.several import ATTACKS, write_several

# The client's own way to send a file through LFS, which its HTTP library would have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ID = "user/images"
TOKEN = "hf_writer"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a complete dataset that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that the client in this process talks to, with no other token or home than the test's."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("pipeline.hub.upload.PAUSES", (0.01, 0.01, 0.01))
        # The client's own waits between its attempts.
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
        disable_progress_bars()
        yield hub
        close_session()
        enable_progress_bars()


def refused(*arguments: str | Path, code: int) -> str:
    """The sentence of a `fgsm publish` that was refused."""
    result = fgsm("publish", *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert TOKEN not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def published(*arguments: str | Path) -> str:
    """What `fgsm publish` says on stderr when it goes well."""
    result = fgsm("publish", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Published: http://127.0.0.1:")
    return result.stderr


def there(hub: Hub) -> set[str]:
    return set(hub.repositories[ID].files) - {".gitattributes"}


def local(out: Path) -> set[str]:
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(".run/")}


OWN = """
from pipeline.attacks.base import Perturbed


class Mine:
    on_ray = True
    needs_draws = False

    def perturb(self, model, images, classes, levels, draws):
        return Perturbed.along(images, model.gradient(images, classes).roll(1, -1), levels)
"""

# ------------------------------------------------------------------------------------------- from end to end

READ_BACK = """
import json, sys
import datasets, numpy
import pipeline
from pipeline.config.schema import SourceConfig
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source

datasets.config.USE_PARQUET_EXPORT = False  # it would ask a second host
columns = json.loads(sys.argv[1])

def read(rows):
    return [[*(row[name] for name in columns), numpy.asarray(row["image"]).tolist()] for row in rows]

origin = open_source(
    HuggingFaceConfig(kind="huggingface", path="user/images", name="clean", split="test", label_column="label"),
    need_labels=True,
).origin
found = {
    "streamed": read(datasets.load_dataset("user/images", "eps-8", split="test", streaming=True)),
    "loaded": read(datasets.load_dataset("user/images", "eps-8", split="test")),
    "ours": read(pipeline.load("user/images", ["8/255"], split="test")),
    "made": read(pipeline.load("user/images", ["3/255"], split="test")),
    "rows": len(datasets.load_dataset("user/images", split="test")),
    "origin": origin.model_dump(),
}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_killed_half_way_then_published_then_read_from_the_hub(out: Path, tmp_path: Path, hub: Hub) -> None:
    """A process dies in the middle, this one meets every fault and finishes, another reads rows and pixels back."""
    card = out / "README.md"
    card.write_text(card.read_text().replace("configs:", "license: cc0-1.0\nconfigs:", 1) + "\nThanks to Ian.\n")
    command = [sys.executable, "-m", "pipeline", "publish", str(out), ID, "--debug"]
    known = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    hub.fail("PUT", "/lfs/", "hang", times=99, after=2)
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(command, env=known, stdout=log, stderr=log)
        assert hub.hanging.wait(60), (tmp_path / "log").read_text()
        wait_for(lambda: len(hub.objects) == 2)  # they are sent side by side
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    assert there(hub) == set(), "nothing may be loaded before all is there"
    before = set(hub.objects)
    hub.faults.clear()
    hub.released.set()
    hub.requests.clear()

    hub.fail("PUT", "/lfs/", 503)
    hub.fail("PUT", "/lfs/", "drop")
    hub.fail("POST", "/commit/", "lose", after=1)
    second = fgsm("publish", out, ID)
    assert second.exit_code == 0, second.output
    assert all(not fault.times for fault in hub.faults), "every fault must have been met"
    assert second.stdout == f"Published: {hub.endpoint}/datasets/{ID}\n"
    assert there(hub) == local(out)
    assert hub.repositories[ID].private
    sent = {re.sub(r"/lfs/(\w+).*", r"\1", path) for path in hub.asked("PUT")}
    assert not sent & before, "what had arrived is not sent again"
    assert len(sent) == sum(name.endswith(LFS_SUFFIXES) for name in local(out)) - 2
    for secret in (TOKEN, "signed"):
        assert secret not in second.output + (tmp_path / "log").read_text()
    assert_token_is_nowhere(out)

    names = ["label", "epsilon", "prediction", "confidence", "clean_prediction", "fooled", "source_index"]
    tokens = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    found = json.loads(read_back(READ_BACK, json.dumps(names), hub=hub, folder=tmp_path, **tokens)[-1])
    frame = rows(out, "eps-8")
    images = pixels(frame).transpose(0, 2, 3, 1)
    expected = [
        [*(value.item() if hasattr(value, "item") else value for value in row), image.tolist()]
        for row, image in zip(frame[names].itertuples(index=False), images, strict=True)
    ]
    assert found["streamed"] == found["loaded"] == found["ours"] == expected
    # An epsilon that is not recorded: the manifest is fetched, which says that its images follow.
    clean = pixels(rows(out, "clean")).astype(int)
    ray = np.sign(pixels(frame).astype(int) - clean)
    followed = np.clip(clean + 3 * ray, 0, 255).transpose(0, 2, 3, 1)
    assert [row[-1] for row in found["made"]] == followed.tolist()
    assert found["rows"] == 2 * 11
    assert found["origin"] == {
        "name": "images",
        "repository": ID,
        "revision": hub.repositories[ID].sha(),
        "license": "cc0-1.0",
        "credit": None,
    }
    assert 'datasets.load_dataset("user/images"' in card.read_text()
    assert "Thanks to Ian." in card.read_text()
    assert fgsm("verify", out).exit_code == 0


def assert_token_is_nowhere(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.drill
def test_through_xet_with_progress_in_a_log(out: Path, tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    with running_hub() as hub:
        hub.xet_folder = tmp_path / "storage"
        hub.fail("POST", "/commit/", "wait")
        result = subprocess.run(
            [sys.executable, "-m", "pipeline", "publish", str(out), ID, "--public"],
            env=environment(hub, tmp_path / "home", HF_TOKEN=TOKEN),
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert there(hub) == local(out)
        assert not hub.repositories[ID].private
        assert hub.asked("GET", "xet-write-token")
        assert not hub.asked("PUT")
    stamped = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert re.search(stamped + "Found 4 files to upload", result.stderr)
    assert re.search(stamped + r"Uploading\.\.\. 4/4 files checked", result.stderr)
    assert "xet_secret" not in result.stderr
    assert TOKEN not in result.stderr


def test_the_second_run_uploads_nothing(out: Path, hub: Hub) -> None:
    published(out, ID)
    hub.requests.clear()
    said = published(out, ID)
    assert hub.writes == []
    assert re.search(r"\bAll \d+ files\b", said)
    assert len(hub.repositories[ID].commits) == 3


def test_what_arrives_names_no_folder_of_this_machine(out: Path, finished: Path, hub: Hub) -> None:
    assert fgsm("publish", out, ID).exit_code == 0
    here = str(finished.parent).encode()
    assert here in (out / "manifest.json").read_bytes()
    arrived = hub.repositories[ID].files
    assert not [name for name, blob in arrived.items() if here in (blob.content or b"")]
    assert json.loads(arrived["manifest.json"].content or b"")["config"]["model"]["name"] == "victim.py:make"


def test_a_run_of_several_models_and_attacks(write_config: WriteConfig, tmp_path: Path, hub: Hub) -> None:
    """Every subset arrives; nothing that arrives names a folder, of whichever model or attack."""
    (tmp_path / "mine.py").write_text(OWN)
    attacks = {**ATTACKS, "mine": {"kind": f"{tmp_path}/mine.py:Mine", "epsilons": ["8/255"], "models": ["net"]}}
    generate(write_several(write_config, tmp_path, attacks, source={"limit": 6}))
    several = tmp_path / "out"
    published(several, ID)
    assert there(hub) == local(several)
    arrived = {name: blob.content or b"" for name, blob in hub.repositories[ID].files.items()}
    assert str(tmp_path).encode() in (several / "manifest.json").read_bytes()
    assert not [name for name, content in arrived.items() if str(tmp_path).encode() in content]
    config = json.loads(arrived["manifest.json"])["config"]
    assert {name: model["name"] for name, model in config["models"].items()} == {
        "net": "victim.py:make",
        "sums": "sums.py:make",
        "turned": "sums.py:make",
    }
    assert config["attacks"]["mine"]["kind"] == "mine.py:Mine"
    # What was published is a dataset of ours as it is.
    copy = tmp_path / "copy"
    for name, content in arrived.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    shown = json.loads(fgsm("inspect", copy, "--json").stdout)
    assert shown == json.loads(fgsm("inspect", several, "--json").stdout)
    assert len(shown["transfer"]) == 7 * 3


def test_only_what_changed_goes(out: Path, hub: Hub) -> None:
    published(out, ID)
    hub.requests.clear()
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMore.\n")
    assert f"Uploading 1 of {len(local(out))} files" in published(out, ID)
    assert hub.asked("PUT") == []
    assert hub.repositories[ID].files["README.md"].content == (out / "README.md").read_bytes()


@pytest.mark.parametrize("report", [None, '<meta name="fgsm-receipts" content="0123">'])
def test_a_report_that_is_missing_or_of_another_state_is_made(out: Path, hub: Hub, report: str | None) -> None:
    whole = (out / "report.html").read_text()
    (out / "report.html").unlink()
    if report is not None:
        (out / "report.html").write_text(report)
    published(out, ID)
    assert (out / "report.html").read_text() == whole
    assert hub.repositories[ID].files["report.html"].content == whole.encode()
    assert {"assets/accuracy.png", "assets/confidence.png", "assets/examples.png"} <= there(hub)


@pytest.mark.parametrize("name", ["assets/notes.png", "assets/transfer.png", "notes.txt", "defence.json"])
def test_a_file_that_the_report_does_not_list_is_left_out_and_named(out: Path, hub: Hub, name: str) -> None:
    ours = local(out)
    (out / name).write_bytes(b"mine")
    assert f"not  {name}, " in fgsm("publish", out, ID, "--dry-run").stdout
    assert f": {name}." in published(out, ID)
    assert there(hub) == ours


@pytest.mark.parametrize("name", ["assets/accuracy.png", "report.html"])
def test_a_file_of_others_in_the_place_of_one_of_the_report_is_not_published(out: Path, hub: Hub, name: str) -> None:
    (out / name).write_bytes(b"mine")
    assert fgsm("publish", out, ID).exit_code == (1 if name == "report.html" else 0)
    assert name not in (there(hub) if ID in hub.repositories else ())
    assert (out / name).read_bytes() == b"mine"


def test_shards_are_there_before_the_card_that_lists_them(out: Path, hub: Hub) -> None:
    published(out, ID)
    _, shards, all_of_it = (set(commit) - {".gitattributes"} for commit in hub.repositories[ID].commits)
    assert shards == {name for name in local(out) if name.endswith(".parquet")}
    assert all_of_it == local(out)


# ------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize(("options", "warned"), [((), True), (("--private",), True), (("--public",), False)])
def test_more_than_private_repositories_hold_is_said_before_the_files_are_read(
    out: Path, options: tuple[str, ...], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size_named() -> bool:
        said = fgsm("publish", out, ID, "--dry-run", *options).stderr
        return f"{human_bytes(upload.PRIVATE_BYTES)} together" in said.partition("Verifying")[0]

    size = sum(path.stat().st_size for path in out.glob("*/*.parquet"))
    monkeypatch.setattr(upload, "PRIVATE_BYTES", size - 1)
    assert size_named() is warned
    monkeypatch.setattr(upload, "PRIVATE_BYTES", size)
    assert not size_named()


def test_a_dry_run_lists_every_file_and_touches_nothing(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    result = fgsm("publish", out, ID, "--dry-run")
    assert result.exit_code == 0, result.output
    assert hub.requests == []
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before
    *listed, empty, total = result.stdout.splitlines()
    assert empty == ""
    assert {line.split()[-1] for line in listed} == local(out)
    folder = OutputFolder(out)
    size = sum(file.size for file in list_files(folder, require_manifest(folder)).values())
    assert total == f"{len(listed)} files, {size / 1000:.1f} KB, for {ID}"
    (out / "report.html").unlink()
    assert "?  report.html and assets/" in fgsm("publish", out, ID, "--dry-run").stdout
    assert not (out / "report.html").exists()


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "repo_id", ["images", "a/b/c", "user/", "user/im ages", "user/im--ages", "https://hf.co/user/x"]
)
def test_an_id_that_is_none(out: Path, hub: Hub, repo_id: str) -> None:
    assert refused(out, repo_id, code=2).startswith(f"{repo_id!r} ")
    assert refused(out, repo_id, "--dry-run", code=2)
    assert hub.requests == []


def test_a_folder_that_is_no_output(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path / "photos", tmp_path / "nowhere"):
        assert re.match(rf"{folder} .*manifest\.json", refused(folder, ID, code=2))
    assert hub.requests == []


def test_a_damaged_or_incomplete_dataset(out: Path, hub: Hub) -> None:
    shard = shard_path(out, "eps-8/test-00001-of-00002.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    sentence = refused(out, ID, code=1)
    assert sentence.startswith(f"{out} ")
    assert "eps-8/test-00001-of-00002.parquet has" in without_run(sentence)
    assert f"fgsm verify {out} --repair" in sentence
    assert refused(out, ID, "--dry-run", code=1) == sentence
    fgsm("verify", out, "--repair")
    sentence = refused(out, ID, code=1)
    assert re.match(rf"{out} .*\b1 of 2 .*\bgenerate\b", sentence)
    assert hub.requests == []


def test_without_a_token(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert re.search("`hf auth login`.*HF_TOKEN", refused(out, ID, code=2))
    assert hub.requests == []


def test_a_token_that_no_header_can_carry_is_not_shown(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x01word")
    result = fgsm("publish", out, ID, "--debug")
    assert result.exit_code == 2
    assert re.search("Error: .*token.*HF_TOKEN", result.stderr)
    assert "secret" not in result.output
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "named"),
    [
        ("hf_unknown", "`hf auth login`.*HF_TOKEN"),
        ("hf_other", rf" {ID} \(.* namespace user\)"),
        ("hf_reader", rf" {ID} \(.*rights"),
    ],
)
def test_without_permission(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, named: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert re.search(named, refused(out, ID, code=1))
    assert hub.repositories == {}
    # Where the repository is there and may be read, too.
    hub.repositories[ID] = Repository(private=False)
    assert re.search(named, refused(out, ID, code=1))
    assert there(hub) == set()


def test_a_repository_of_another_run(out: Path, hub: Hub) -> None:
    content = json.loads((out / "manifest.json").read_text())
    other = json.dumps({**content, "run_id": "ff" * 8}).encode()
    hub.repositories[ID] = Repository(private=True, commits=[{"manifest.json": git_blob(other)}])
    sentence = refused(out, ID, code=2)
    assert re.match(rf"{ID} .*{'ff' * 8}.*{content['run_id']}", sentence)
    assert hub.writes == []
    for strange in (b"[]", b"{", b'{"run_id": 3}'):
        hub.repositories[ID].commits[-1] = {"manifest.json": git_blob(strange)}
        assert re.match(f"{ID} .*manifest", refused(out, ID, code=2))


def test_a_repository_that_holds_something_else(out: Path, hub: Hub) -> None:
    hub.repositories[ID] = Repository(private=True, commits=[{"model.bin": git_blob(b"x"), "a.md": git_blob(b"")}])
    assert re.match(rf"{ID} .*\(a\.md, model\.bin\)", refused(out, ID, code=2))
    altered = shard_path(out, "clean/test-00000-of-00002.parquet").read_bytes()[:-1] + b"x"
    name = shard_path(out, "clean/test-00000-of-00002.parquet").relative_to(out).as_posix()
    hub.repositories[ID].commits[-1] = {name: git_blob(altered)}
    assert re.match(rf"{ID} .*\({name}\)", refused(out, ID, code=2))
    assert hub.writes == []


def test_a_first_upload_that_was_cut_off_between_two_commits_is_ours(out: Path, hub: Hub) -> None:
    """Through Xet a large folder takes several commits: files of ours are there, and no manifest."""
    published(out, ID)
    whole = hub.repositories[ID].files
    part = {path: blob for path, blob in whole.items() if path.startswith("clean/")}
    hub.repositories[ID].commits.append(part)
    hub.requests.clear()
    published(out, ID)
    assert there(hub) == local(out)
    assert hub.asked("PUT") == []


def test_a_repository_keeps_its_visibility(out: Path, hub: Hub) -> None:
    hub.repositories[ID] = Repository(private=False)
    assert re.search(rf"{ID} .*\bpublic\b", published(out, ID, "--private"))
    assert not hub.repositories[ID].private
    hub.repositories[ID] = Repository(private=True)
    assert re.search(rf"{ID} .*\bprivate\b", published(out, ID, "--public"))
    assert hub.repositories[ID].private
    assert "stays so" not in published(out, ID, "--private")
    hub.repositories[ID] = Repository(private=False)
    assert "stays so" not in published(out, ID), "nothing was asked"


def test_what_an_earlier_upload_left_is_removed_and_the_owner_s_files_stay(out: Path, hub: Hub) -> None:
    published(out, ID)
    files = hub.repositories[ID].files
    stale = shard_path(out, "clean/test-00009-of-00010.parquet").relative_to(out).as_posix()
    old = {
        stale: lfs_blob("0" * 64, 3, b"old"),
        **dict.fromkeys(("assets/defence.png", "assets/transfer.png"), git_blob(b"old")),
    }
    copy = stale.replace("clean/", "backup/")
    own = dict.fromkeys(("LICENSE", "assets/mine.png", copy, "clean/mine.parquet"), git_blob(b"mine"))
    hub.repositories[ID].commits.append({**files, **old, **own})
    hub.fail("POST", "/commit/", "lose")  # and what is gone is not deleted a second time
    said = published(out, ID)
    assert f": assets/defence.png, assets/transfer.png, {stale}." in said
    assert ": LICENSE, assets/mine.png, " in said
    assert hub.repositories[ID].files == {**files, **own}
    hub.requests.clear()
    published(out, ID)
    assert hub.writes == []


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("kind", [500, "drop", "lose"])
def test_what_fails_once_at_any_step_is_tried_again(out: Path, hub: Hub, kind: int | str) -> None:
    """Whether or not the client itself tries it again."""
    steps = [
        *(("GET", "/tree/"), ("POST", "/repos/create"), ("POST", "/preupload/"), ("POST", "/objects/batch")),
        *(("PUT", "/lfs/"), ("POST", "/verify"), ("POST", "/validate-yaml"), ("POST", "/commit/")),
    ]
    for method, path in steps:
        hub.fail(method, path, kind, times=2 if path == "/commit/" else 1)
    published(out, ID)
    assert all(not fault.times for fault in hub.faults)
    assert there(hub) == local(out)
    hub.fail("GET", "/resolve/main/manifest.json", kind)
    hub.fail("GET", f"/api/datasets/{ID}$", kind)
    hub.requests.clear()
    published(out, ID, "--private")
    assert all(not fault.times for fault in hub.faults)
    assert hub.writes == []


def test_a_connection_that_stays_lost(out: Path, hub: Hub) -> None:
    hub.fail("GET", "/api/", "drop", times=9999)
    hub.fail("POST", "/api/", "drop", times=9999)
    hub.repositories[ID] = Repository(private=True)
    assert_lost(out)


def assert_lost(out: Path) -> None:
    sentence = refused(out, ID, code=75)
    assert re.match(f"{ID}: .*connection", sentence)


def test_nobody_listens(out: Path, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    assert_lost(out)


def test_a_connection_that_says_nothing_more(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.hub.upload.STALL_SECONDS", 0.2)
    hub.fail("POST", "/repos/create", "hang", times=9)
    assert_lost(out)


def test_a_connection_that_is_silent_after_another_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client makes itself a new session after a failure, whose connections must give up as well."""
    monkeypatch.setattr("pipeline.hub.upload.STALL_SECONDS", 0.2)
    with _client_that_gives_up():
        close_session()
        assert get_session().timeout.read == 0.2
    assert get_session().timeout.read is None


def test_signatures_of_addresses_are_not_shown(out: Path, hub: Hub) -> None:
    hub.fail("PUT", "/", 403, times=999)
    result = fgsm("publish", out, ID, "--debug")
    assert result.exit_code == 75
    assert hub.asked("PUT")
    assert "signed" not in result.output


def test_a_hub_that_stays_broken(out: Path, hub: Hub) -> None:
    hub.fail("POST", "/repos/create", 500, times=9, body="<html>out of order</html>")
    sentence = refused(out, ID, code=75)
    assert re.search(rf"\b500\b.* {ID};", sentence)
    assert len(hub.asked("POST", "/repos/create")) == 4
    hub.faults.clear()
    hub.fail("POST", "/validate-yaml", 502, times=9, body="<html>out of order</html>")
    assert_lost(out)


def test_a_card_whose_yaml_the_hub_refuses(out: Path, hub: Hub) -> None:
    hub.fail("POST", "/validate-yaml", 400, times=9, body='{"errors": [{"message": "license must be one of"}]}')
    assert "license must be one of" in refused(out, ID, code=1)
    assert len(hub.asked("POST", "/validate-yaml")) == 1


def test_an_upload_address_that_expired_gets_a_new_one(out: Path, hub: Hub) -> None:
    hub.fail("PUT", "/lfs/", 403)
    published(out, ID)


def test_offline_mode_is_named(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(out, ID, code=1)
    assert hub.requests == []


def test_what_arrived_is_compared_and_not_believed(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(handler: Any, name: str) -> None:
        url = f"{handler.server.endpoint}/datasets/{name}/commit/main"
        handler._json({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    monkeypatch.setattr("tests.support.hub._Handler._commit", forget)
    sentence = refused(out, ID, code=1)
    assert re.match(rf"{ID} .*: clean/test-00000-of-00002\.parquet", without_run(sentence))
    assert there(hub) == set()


def test_a_file_that_changes_on_the_way_is_found(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.hub.upload

    upload = pipeline.hub.upload._upload

    def change(api: Any, repo_id: str, folder: OutputFolder, *rest: Any) -> None:
        shard = shard_path(Path(folder.root), "eps-8/test-00001-of-00002.parquet")
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        upload(api, repo_id, folder, *rest)

    monkeypatch.setattr("pipeline.hub.upload._upload", change)
    sentence = refused(out, ID, code=1)
    assert re.match(rf"{ID} .*: eps-8/test-00001-of-00002\.parquet", without_run(sentence))
    assert there(hub) == local(out)


def test_files_that_are_not_of_the_dataset_stay_at_home(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep they lie, and whether they are there when the dataset is verified or come later."""
    import pipeline.hub.upload

    ours, upload = local(out), pipeline.hub.upload._upload
    shard = shard_path(out, "clean/test-00000-of-00002.parquet").read_bytes()

    def place(*folders: str) -> None:
        for folder in folders:
            (out / folder).mkdir(parents=True)
            (out / folder / "patients.parquet").write_bytes(shard)

    def late(*arguments: Any) -> None:
        place("clean/private", "eps-8/a/b")
        upload(*arguments)

    place("notes", "assets/private")
    monkeypatch.setattr("pipeline.hub.upload._upload", late)
    published(out, ID)
    assert there(hub) == ours
    hub.requests.clear()
    shutil.rmtree(out / "clean/private")
    monkeypatch.setattr("pipeline.hub.upload._upload", upload)
    said = published(out, ID)
    assert ": assets/private/patients.parquet, eps-8/a/b/patients.parquet" in said
    assert there(hub) == ours
    # By its name the card would take this one for a shard.
    extra = shard_path(out, "clean/test-00000-of-00002.parquet")
    extra.with_name(extra.name.replace("00000", "00009")).write_bytes(shard)
    hub.requests.clear()
    assert re.search(r"/test-00009-of-00002\S* belongs", refused(out, ID, code=1))
    assert hub.requests == []


def test_a_hub_that_quotes_the_token_does_not_get_it_into_the_log(out: Path, hub: Hub) -> None:
    hub.fail("POST", "/repos/create", 403, body=f"{TOKEN} may not do that")
    result = fgsm("publish", out, ID, "--debug")
    assert result.exit_code == 1
    assert "*** may not do that" in result.stderr
    assert TOKEN not in result.output
    assert_token_is_nowhere(out)


def test_debug_shows_where_it_came_from(out: Path, hub: Hub) -> None:
    hub.users["hf_poor"] = User("other")
    hub.fail("POST", "/repos/create", 403, body="no")
    result = fgsm("publish", out, ID, "--debug")
    assert "HfHubHTTPError" in result.stderr
    assert TOKEN not in result.output


def test_messages_lose_tokens_and_signatures() -> None:
    text = "'lost' thrown while requesting PUT https://s3.aws.com/a/b?X-Amz-Signature=abc&x=1 (hf_secret)"
    assert redact(text, "hf_secret") == "'lost' thrown while requesting PUT https://s3.aws.com/a/b?... (***)"


def test_class_names_come_back(out: Path, hub: Hub) -> None:
    published(out, ID)
    content = json.loads(hub.repositories[ID].files["manifest.json"].content or b"")
    assert content["dataset_classes"] == list(CLASSES)
