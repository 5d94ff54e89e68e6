"""Publish: the dataset to the Hugging Face Hub, and the proof that it arrived.

The Parquet files go first, by the client's path for large folders: in several commits, resumed where they stopped.
What says what they are (card, manifest, report and its pictures) follows in one commit: until then nobody can load a
part of the dataset and take it for the whole. Then the repository is listed, and published is what it holds with the
sizes and digests that were verified here.

A repository is ours if its manifest is of this run, or if it holds nothing but files of this dataset, byte for byte:
that is a first upload that was cut off.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it names them only by importing them
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_backoff,
)

from pipeline import __version__
from pipeline.check.verify import verify
from pipeline.core.errors import ConfigError, PipelineError, TemporaryError, causes, first_line, is_temporary, listing
from pipeline.core.redaction import redact_answer
from pipeline.hub.account import check_repository_id, read_token
from pipeline.output.card import moved_card
from pipeline.output.folder import SUBSETS, OutputFolder, report_files
from pipeline.output.manifest import Manifest, has_report, published, require_manifest
from pipeline.output.summary import human_bytes

# Seconds between our attempts at an upload that fails for a passing reason. The client repeats most requests itself,
# but not those that create a repository, check the card, or commit without Xet.
PAUSES = (2.0, 20.0, 120.0)
# Seconds without a byte after which a connection counts as lost; the client itself would wait for ever.
STALL_SECONDS = 300.0
# What private repositories of a free account may hold together (https://huggingface.co/docs/hub/storage-limits).
PRIVATE_BYTES = 100 * 10**9
# Made by Git's host for every repository.
ATTRIBUTES = ".gitattributes"
# Files of the report by their names, and those that it no longer has.
REPORT = r"report\.html|assets/(accuracy|confidence|confusion|defence|examples|transfer)\.png"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnFile:
    """A file of the dataset, with the digest that verification found. All but shards hold their content."""

    size: int
    sha256: str
    content: bytes | None = None


def publish(path: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload a dataset, or what of it the repository does not hold yet, and check that all of it is there.

    Args:
        path: the output folder of a complete dataset.
        repo_id: `user/name`.
        private: of a repository that is created, private by default; one that is there keeps its visibility.

    Returns:
        The address of the dataset.

    Raises:
        ConfigError: the id is none, the folder holds no dataset, there is no token, or the repository is not ours.
        PipelineError: the dataset is damaged or incomplete, or the Hub or the connection to it failed.
    """
    check_repository_id(repo_id)
    token = read_token()
    folder, manifest = _verified(path, private)
    api = HfApi(token=token, library_name="fgsm-pipeline", library_version=__version__)
    with _client_log(token), _client_that_gives_up():
        _patiently(repo_id, token, lambda: _open_repository(api, repo_id, folder, manifest, private))
        folder.store.watch()
        text = folder.store.read(folder.card).decode()
        moved = moved_card(text, manifest, repo_id)  # whose examples load from the Hub
        if moved != text:
            folder.store.write(folder.card, moved.encode())
        if not has_report(folder, manifest):
            from pipeline.reporting.page import write_report  # and with it matplotlib, which is seldom needed here

            logger.info("Making the report.")
            write_report(folder, manifest)
        files = list_files(folder, manifest)
        if others := _left_out(folder, files):
            logger.info("Not published, as they are not part of this dataset: %s.", listing(others))
        _patiently(repo_id, token, lambda: _upload(api, repo_id, folder, manifest, files))
    return f"{api.endpoint}/datasets/{repo_id}"


def dry_run(path: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """What `publish` would upload, as a table of sizes and names. Asks nobody, and writes nothing.

    Raises:
        ConfigError, PipelineError: as `publish`, as far as that can be known without the Hub.
    """
    check_repository_id(repo_id)
    folder, manifest = _verified(path, private)
    files = list_files(folder, manifest)
    lines = [f"{human_bytes(file.size):>8}  {name}" for name, file in files.items()]
    others = _left_out(folder, files)
    if not has_report(folder, manifest):
        lines.append(f"{'?':>8}  report.html and assets/, which publish makes again")
        others = [name for name in others if name != folder.report and not name.startswith(f"{folder.assets}/")]
    lines += [f"{'not':>8}  {name}, which is not of this dataset" for name in others]
    total = f"{len(files):,} files, {human_bytes(sum(file.size for file in files.values()))}, for {repo_id}"
    return "\n".join([*lines, "", total])


def _verified(path: str | Path, private: bool | None) -> tuple[OutputFolder, Manifest]:
    """The dataset in a folder, all of it checked but for what the models would say again."""
    folder = OutputFolder(path)
    manifest = require_manifest(folder)
    folder.store.refuse_links()
    size = sum(entry.bytes for entry in manifest.files)
    # Before the files are read: of so large a dataset that takes hours.
    if private is not False and size > PRIVATE_BYTES:
        logger.warning(
            "The dataset has %s. Private repositories of a free account on the Hub hold %s together, so the upload may "
            "fail. Use a paid account, or --public for a new repository that everyone may see.",
            human_bytes(size),
            human_bytes(PRIVATE_BYTES),
        )
    logger.info("Verifying %s.", folder.root)
    findings = verify(path)
    if findings.problems:
        fix = "then publish again"
        if findings.missing:
            fix = "run the generate command that made it"
        if findings.damaged:
            fix = f"run fgsm verify {path} --repair and then the generate command that made it"
        # That manifest and card do not agree follows from what is damaged or missing.
        causes = [problem for problem in findings.problems if "generate writes it again" not in problem]
        first, *others = causes or findings.problems
        more = f" (and {len(others)} problems more)" if others else ""
        raise PipelineError(f"{path} cannot be published: {first.rstrip('.')}{more}; {fix}.")
    return folder, manifest


def list_files(folder: OutputFolder, manifest: Manifest) -> dict[str, OwnFile]:
    """The files that are published, by their names in the repository: never `.run/`, nor what else lies about.

    The manifest goes without the folders of this machine.
    """
    files = {
        entry.path: OwnFile(entry.bytes, entry.sha256) for entry in sorted(manifest.files, key=lambda entry: entry.path)
    }
    stored = folder.store.sizes()
    small = {folder.manifest: published(manifest).model_dump_json(indent=1).encode()}
    small |= {name: folder.store.read(name) for name in (folder.card, *report_files(folder)) if name in stored}
    return files | {
        name: OwnFile(len(content), hashlib.sha256(content).hexdigest(), content) for name, content in small.items()
    }


def _left_out(folder: OutputFolder, files: Mapping[str, OwnFile]) -> list[str]:
    """Files beside the dataset that are not published, but for those of the run itself."""
    return sorted(name for name in folder.store.sizes() if name not in files and not name.startswith(".run/"))


def _open_repository(api: HfApi, repo_id: str, folder: OutputFolder, manifest: Manifest, private: bool | None) -> None:
    """Create the repository where there is none; refuse one that holds anything else than this run."""
    there = _listed(api, repo_id)
    if there is None:
        api.create_repo(repo_id, repo_type="dataset", private=private is not False, exist_ok=True)
        logger.info("Created %s, %s.", repo_id, "public" if private is False else "private")
        return
    if private is not None and bool(api.repo_info(repo_id, repo_type="dataset").private) != private:
        # Changing that is its owner's business.
        now = "public" if private else "private"
        logger.warning(
            "%s already exists and is %s, which publish does not change; its settings on the Hub do.", repo_id, now
        )
    advice = "choose another repository; nothing was uploaded"
    if folder.manifest in there:
        run_id = _published_run(api, repo_id, folder.manifest)
        if run_id != manifest.run_id:
            what = f"another run ({run_id}, this one is {manifest.run_id})" if run_id else "a manifest that is not ours"
            raise ConfigError(f"{repo_id} holds {what}; {advice}.")
        return
    files = list_files(folder, manifest)
    same = files.keys() - _differing(folder, files, there)
    if strange := [path for path in there if path not in (*same, ATTRIBUTES)]:
        raise ConfigError(f"{repo_id} holds other files already ({listing(strange, 3)}); {advice}.")


def _listed(api: HfApi, repo_id: str) -> dict[str, RepoFile] | None:
    """What a repository holds, by path; None where there is none, or none that this token may see."""
    try:
        tree = api.list_repo_tree(repo_id, recursive=True, repo_type="dataset")
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        return None


def _published_run(api: HfApi, repo_id: str, manifest: str) -> str | None:
    """The run of the manifest that a repository holds; None where that is not one of ours."""
    address = f"{api.endpoint}/datasets/{repo_id}/resolve/main/{manifest}"
    answer = http_backoff("GET", address, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(answer)
    try:
        content = json.loads(answer.content)
    except ValueError:
        return None
    run_id = content.get("run_id") if isinstance(content, dict) else None
    return run_id if isinstance(run_id, str) else None


def _left_by_an_earlier_upload(manifest: Manifest, files: Mapping[str, OwnFile], there: Iterable[str]) -> list[str]:
    """Files of this run by their names that the Hub has and the dataset does not have any more."""
    shards = rf"{SUBSETS}/[^/]+-of-\d{{5,}}-{manifest.run_id}(-\d+)?\.parquet"
    return [path for path in there if path not in files and re.fullmatch(f"{shards}|{REPORT}", path)]


def _upload(api: HfApi, repo_id: str, folder: OutputFolder, manifest: Manifest, files: Mapping[str, OwnFile]) -> None:
    """Send what is not there, the data first; remove what an earlier upload left; then see that all of it arrived."""
    there = _listed(api, repo_id) or {}
    missing = _differing(folder, files, there)
    stale = _left_by_an_earlier_upload(manifest, files, there)
    if others := [path for path in there if path not in files and path not in (*stale, ATTRIBUTES)]:
        logger.info("Not changed, as they are not part of this dataset: %s.", listing(others))
    if not missing and not stale:
        logger.info("All %d files are already there.", len(files))
        return
    size = human_bytes(sum(files[path].size for path in missing))
    logger.info("Uploading %d of %d files, %s, to %s.", len(missing), len(files), size, repo_id)
    shards = {path: files[path].size for path in missing if files[path].content is None}
    # By folders: the client compares every name with every pattern. What is there already it finds out itself.
    folders = sorted({path.rpartition("/")[0] for path in shards})
    for root in folder.store.staged(shards) if shards else ():
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=root,
            allow_patterns=[f"{name}/*-{manifest.edition}.parquet" for name in folders],
            ignore_patterns=[f"{name}/*/*" for name in folders],  # its * takes in what lies deeper
            commit_message="Upload shards with fgsm-pipeline",
        )
    added = {path: content for path in missing if (content := files[path].content) is not None}
    if stale:
        logger.info("Removing what an earlier upload left: %s.", listing(stale))
    if added or stale:
        with disable_progress_bars():  # a bar for each small file
            api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in added.items()),
                    *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in stale),
                ],
                commit_message="Upload card, manifest and report with fgsm-pipeline",
                repo_type="dataset",
            )
    there = _listed(api, repo_id) or {}
    wrong = _differing(folder, files, there) + _left_by_an_earlier_upload(manifest, files, there)
    if wrong:
        raise PipelineError(
            f"{repo_id} does not hold what was verified here: {listing(wrong)}; run the same command again."
        )


def _differing(folder: OutputFolder, files: Mapping[str, OwnFile], there: Mapping[str, RepoFile]) -> list[str]:
    """The files of the dataset that the repository does not hold, or holds otherwise."""
    return [path for path, file in files.items() if not (path in there and _is_same(folder, path, file, there[path]))]


def _is_same(folder: OutputFolder, path: str, local: OwnFile, remote: RepoFile) -> bool:
    """Whether the Hub's file has the same size and content: LFS and Xet say its sha256, Git the sha1 of its blob."""
    if local.size != remote.size:
        return False
    if remote.lfs is not None:
        return bool(local.sha256 == remote.lfs.sha256)
    content = folder.store.read(path) if local.content is None else local.content
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(blob.hexdigest() == remote.blob_id)


def _patiently(repo_id: str, token: str, call: Callable[[], None]) -> None:
    """Call what goes on where it stopped: again if it failed for a passing reason. What fails is one sentence."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except PipelineError:
            raise
        except Exception as error:  # a dozen exception types of three libraries; all mean the same here
            sentence = redact(_sentence(error, repo_id), token)
            if pause is None or not _is_passing(error):
                shown = "".join(str(cause) for cause in causes(error))
                # It may quote the token, or the signature of an address, and --debug would show them.
                kind = TemporaryError if _is_passing(error) else PipelineError
                raise kind(sentence) from (error if redact(shown, token) == shown else None)
            logger.warning("%s Trying again in %g s.", sentence, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _sentence(error: Exception, repo_id: str) -> str:
    """What went wrong, for a person."""
    again = "run the same command again: what has arrived is not sent twice"
    refused = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if refused is not None:
        status, said = refused.response.status_code, first_line(Exception(refused.server_message or ""))
        quoted = f" ({said})" if refused.server_message else ""
        known = {
            400: f"The Hub refuses what it was sent ({' '.join(str(error).split())[:300]})",
            401: "The Hub does not accept the token; log in again with `hf auth login`, or correct HF_TOKEN",
            403: f"The token may not write to {repo_id}{quoted}; use one that has the right to, of that account",
            429: f"The Hub answers too many requests at the moment; wait, and {again}",
        }
        return known.get(status, f"The Hub answered {status}{quoted} about {repo_id}; {again}") + "."
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
        return "HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it."
    if _is_passing(error):
        return f"{repo_id}: the connection to the Hub was lost; {again}."
    reasons = dict.fromkeys(first_line(cause).rstrip(".") for cause in causes(error))
    return f"{repo_id}: the upload failed ({': '.join(reasons)}); {again}."


def _is_passing(error: BaseException) -> bool:
    """Whether it is worth another attempt: what `is_temporary` says, and what only uploads meet."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            # Files are put into a storage, at addresses that expire; another attempt gets new ones.
            if cause.response.status_code in (409, 412) or cause.response.request.method == "PUT":
                return True
        # A page of HTML instead of an answer comes from a proxy before a Hub that is down.
        elif isinstance(cause, json.JSONDecodeError):
            return True
    return is_temporary(error)


def redact(text: str, token: str) -> str:
    """A message without the token, and without the signatures in the addresses that uploads go to."""
    return redact_answer(text.replace(token, "***"))


@contextlib.contextmanager
def _client_that_gives_up() -> Iterator[None]:
    """Let no connection of the client be silent for ever, nor those of a session that it makes after a failure."""
    usual = get_session()
    session = functools.partial(type(usual), event_hooks=usual.event_hooks, follow_redirects=True)
    set_client_factory(functools.partial(session, timeout=STALL_SECONDS))
    try:
        yield
    finally:
        set_client_factory(functools.partial(session, timeout=usual.timeout))


@contextlib.contextmanager
def _client_log(token: str) -> Iterator[None]:
    """Let the client's log go where ours goes, without secrets; where there is no terminal, with its progress."""

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), token), ()
        return True

    client, ours = logging.getLogger("huggingface_hub"), logging.getLogger("pipeline")
    former, level = client.handlers[:], client.level
    client.handlers[:] = ours.handlers
    for handler in ours.handlers:
        handler.addFilter(clean)
    if not sys.stderr.isatty():
        # A line every 30 seconds: on a terminal it draws a bar instead.
        client.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        client.handlers[:] = former
        client.setLevel(level)
        for handler in ours.handlers:
            handler.removeFilter(clean)
