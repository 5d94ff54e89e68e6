"""Publish: the dataset to the Hugging Face Hub, and the proof that it arrived.

The Parquet files go first, by the client's path for large folders: in several commits, resumed where they stopped.
What says what they are (card, manifest, report and its pictures) follows in one commit: until then nobody can load a
part of the dataset and take it for the whole. Then the repository is listed, and published is what it holds with the
sizes and digests that were verified here.

A repository is ours if its manifest is of this run, or if it holds nothing but files of this dataset, byte for byte:
that is a first upload that was cut off.
"""

import contextlib
import hashlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it names them only by importing them
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_backoff,
    httpx,
    validate_repo_id,
)
from huggingface_hub.utils._http import default_client_factory  # it has no public name

from pipeline import __version__
from pipeline.check.verify import verify
from pipeline.core.errors import ConfigError, PipelineError, causes, first_line, listing
from pipeline.core.redaction import redact_answer
from pipeline.output.card import moved_card
from pipeline.output.folder import SUBSETS, OutputFolder, report_files, reported_receipts
from pipeline.output.manifest import Manifest, published, require_manifest
from pipeline.output.summary import human_bytes

# Seconds between our attempts at what fails for a passing reason. The client makes its own within each, but for none
# of creating, listing and committing through LFS.
PAUSES = (2.0, 20.0, 120.0)
# Seconds without a byte after which a connection counts as lost; the client itself would wait for ever.
STALL_SECONDS = 300.0
# Made by Git's host for every repository.
ATTRIBUTES = ".gitattributes"
# Files of the report by their names.
REPORT = r"report\.html|assets/(accuracy|confidence|examples|confusion|transfer)\.png"

Result = TypeVar("Result")
Content = bytes  # OwnFile has a field of that name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnFile:
    """A file of the dataset, with the digest that verification found; `content` is what goes in its place, if any."""

    bytes: int
    sha256: str
    content: Content | None = None


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
    _check_id(repo_id)
    folder, manifest = _verified(path)
    repository = _Repository(repo_id, _token())
    with _client_log(repository.token), _client_that_gives_up():
        there = repository.files()
        if there is None:
            repository.create(private is not False)
            there = repository.files() or {}
        elif private is not None:
            repository.check_visibility(private)
        _check_ours(repository, folder, manifest, there)
        _move_card(folder, manifest, repo_id)
        if reported_receipts(folder) != manifest.receipts:
            _report(folder, manifest)
        files = list_files(folder, manifest)
        if others := _left_out(folder, files):
            logger.info("Not published, as they are not of this dataset: %s.", listing(others))
        _upload(repository, folder, manifest, files, there)
        _check_arrived(repository, folder, manifest, files)
    return repository.url


def dry_run(path: str | Path, repo_id: str) -> str:
    """What `publish` would upload, as a table of sizes and names. Asks nobody, and writes nothing.

    Raises:
        ConfigError, PipelineError: as `publish`, as far as that can be known without the Hub.
    """
    _check_id(repo_id)
    folder, manifest = _verified(path)
    files = list_files(folder, manifest)
    sizes = [human_bytes(file.bytes) for file in files.values()]
    total = f"{len(files):,} files, {human_bytes(sum(file.bytes for file in files.values()))}, for {repo_id}"
    width = max(map(len, sizes))
    lines = [f"{size:>{width}}  {name}" for size, name in zip(sizes, files, strict=True)]
    others = _left_out(folder, files)
    if reported_receipts(folder) != manifest.receipts:
        lines.append(f"{'?':>{width}}  report.html and assets/, which publishing makes anew")
        others = [name for name in others if name != folder.report and not name.startswith(f"{folder.assets}/")]
    lines += [f"{'not':>{width}}  {name}, which is not of this dataset" for name in others]
    return "\n".join([*lines, "", total])


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        sound = repo_id.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise ConfigError(
            f"{repo_id!r} is not the id of a dataset on the Hub; write it as user/name, of letters, digits, ., _ and -."
        )


def _verified(path: str | Path) -> tuple[OutputFolder, Manifest]:
    """The dataset in a folder, all of it checked but for what the victim would say again."""
    folder = OutputFolder(path)
    manifest = require_manifest(folder)
    folder.store.refuse_links()
    logger.info("Verifying %s.", folder.root)
    findings = verify(path)
    if findings.problems:
        mend = "; then publish again"
        if findings.missing:
            mend = "; run the generate command that made it"
        if findings.damaged:
            mend = f"; run fgsm verify {path} --repair and then the generate command that made it"
        # That manifest and card do not agree follows from what is damaged or missing.
        causes = [problem for problem in findings.problems if "generate writes it again" not in problem]
        first, *others = causes or findings.problems
        more = f" (and {len(others)} problems more)" if others else ""
        raise PipelineError(f"{path} cannot be published: {first.rstrip('.')}{more}{mend}.")
    return folder, manifest


def list_files(folder: OutputFolder, manifest: Manifest) -> dict[str, OwnFile]:
    """The files that are published, by their names in the repository: never `.run/`, nor what else lies about.

    The manifest goes without the folders of this machine.
    """
    files = {
        entry.path: OwnFile(entry.bytes, entry.sha256) for entry in sorted(manifest.files, key=lambda entry: entry.path)
    }
    shown = published(manifest).model_dump_json(indent=1).encode()
    files[folder.manifest] = OwnFile(len(shown), hashlib.sha256(shown).hexdigest(), content=shown)
    there = folder.store.sizes()
    for name in (folder.card, *report_files(folder)):
        if name in there:
            content = folder.store.read(name)
            files[name] = OwnFile(len(content), hashlib.sha256(content).hexdigest())
    return files


def _left_out(folder: OutputFolder, files: Mapping[str, OwnFile]) -> list[str]:
    """Files beside the dataset that are not published, but for those of the run itself."""
    return sorted(name for name in folder.store.sizes() if name not in files and not name.startswith(".run/"))


def _token() -> str:
    """The token as the client finds it: in the environment, or where `hf auth login` put it."""
    token = get_token()
    if token is None:
        raise ConfigError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch(r"[!-~]+", token):
        # An error of the HTTP library would show it.
        raise ConfigError("The token for the Hub holds characters that no token has; log in again, or mend HF_TOKEN.")
    return token


def _check_ours(
    repository: "_Repository", folder: OutputFolder, manifest: Manifest, there: Mapping[str, RepoFile]
) -> None:
    """Refuse a repository that holds anything else than this run."""
    advice = "choose another repository; nothing was uploaded"
    if folder.manifest in there:
        run_id = repository.run_id(folder.manifest)
        if run_id != manifest.run_id:
            what = f"another run ({run_id}, this one is {manifest.run_id})" if run_id else "a manifest that is not ours"
            raise ConfigError(f"{repository.id} holds {what}; {advice}.")
        return
    files = list_files(folder, manifest)
    strange = [
        path
        for path, file in there.items()
        if path != ATTRIBUTES and not (path in files and _is_same(folder, path, files[path], file))
    ]
    if strange:
        raise ConfigError(f"{repository.id} holds other files already ({listing(strange, 3)}); {advice}.")


def _move_card(folder: OutputFolder, manifest: Manifest, repo_id: str) -> None:
    """Let the card's examples load from the Hub."""
    folder.store.watch()
    text = folder.store.read(folder.card).decode()
    moved = moved_card(text, manifest, repo_id)
    if moved != text:
        folder.store.write(folder.card, moved.encode())


def _report(folder: OutputFolder, manifest: Manifest) -> None:
    from pipeline.report.page import write_report  # and with it matplotlib, which is seldom needed here

    logger.info("Making the report.")
    write_report(folder, manifest)


def _left_by_an_earlier_upload(manifest: Manifest, files: Mapping[str, OwnFile], there: Iterable[str]) -> list[str]:
    """Files of this run by their names that the Hub has and the dataset does not have any more."""
    shards = rf"{SUBSETS}/[^/]+-of-\d{{5,}}-{manifest.run_id}(-\d+)?\.parquet"
    return [path for path in there if path not in files and re.fullmatch(f"{shards}|{REPORT}", path)]


def _upload(
    repository: "_Repository",
    folder: OutputFolder,
    manifest: Manifest,
    files: Mapping[str, OwnFile],
    there: Mapping[str, RepoFile],
) -> None:
    """Send what is not there, the data first; remove what an earlier upload left."""
    missing = _differing(folder, files, there)
    stale = _left_by_an_earlier_upload(manifest, files, there)
    if others := [path for path in there if path not in files and path not in (*stale, ATTRIBUTES)]:
        logger.info("Left as they are, not of this dataset: %s.", listing(others))
    if not missing and not stale:
        logger.info("All %d files are already there.", len(files))
        return
    size = human_bytes(sum(files[path].bytes for path in missing))
    logger.info("Uploading %d of %d files, %s, to %s.", len(missing), len(files), size, repository.id)
    data = [path for path in missing if path.endswith(".parquet")]
    if data:
        # By folders: the client compares every name with every pattern. What is there already it finds out itself.
        folders = sorted({path.rpartition("/")[0] for path in data})
        for root in folder.store.staged({path: files[path].bytes for path in data}):
            repository.upload(root, folders, manifest.edition)
    rest = [path for path in missing if path not in set(data)]
    if rest or stale:
        if stale:
            logger.info("Removing what an earlier upload left: %s.", listing(stale))
        contents = {path: files[path].content or folder.store.read(path) for path in rest}
        repository.commit(contents, stale)


def _check_arrived(
    repository: "_Repository", folder: OutputFolder, manifest: Manifest, files: Mapping[str, OwnFile]
) -> None:
    """Published is what the Hub lists with the names, sizes and digests that were verified here."""
    there = repository.files() or {}
    wrong = _differing(folder, files, there)
    wrong += _left_by_an_earlier_upload(manifest, files, there)
    if wrong:
        raise PipelineError(
            f"{repository.id} does not hold what was verified here: {listing(wrong)}; run the same command again."
        )


def _differing(folder: OutputFolder, files: Mapping[str, OwnFile], there: Mapping[str, RepoFile]) -> list[str]:
    """The files of the dataset that the repository does not hold, or holds otherwise."""
    return [path for path, file in files.items() if not (path in there and _is_same(folder, path, file, there[path]))]


def _is_same(folder: OutputFolder, path: str, local: OwnFile, remote: RepoFile) -> bool:
    """Whether the Hub's file has the same size and content: LFS and Xet say its sha256, Git the sha1 of its blob."""
    if local.bytes != remote.size:
        return False
    if remote.lfs is not None:
        return bool(local.sha256 == remote.lfs.sha256)
    blob = hashlib.sha1(b"blob %d\0" % local.bytes, usedforsecurity=False)
    with folder.store.open(path) if local.content is None else io.BytesIO(local.content) as file:
        while block := file.read(1 << 20):
            blob.update(block)
    return bool(blob.hexdigest() == remote.blob_id)


class _Repository:
    """A dataset repository of the Hub. What fails for a passing reason is tried again; what fails is one sentence."""

    def __init__(self, repo_id: str, token: str) -> None:
        self.id, self.token = repo_id, token
        self.api = HfApi(token=token, library_name="fgsm-pipeline", library_version=__version__)
        self.url = f"{self.api.endpoint}/datasets/{repo_id}"

    def files(self) -> dict[str, RepoFile] | None:
        """What it holds, by path; None where there is no such repository, or none that this token may see."""

        def ask() -> dict[str, RepoFile] | None:
            try:
                tree = self.api.list_repo_tree(self.id, recursive=True, repo_type="dataset")
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except RepositoryNotFoundError:
                return None

        return self._ask(ask)

    def create(self, private: bool) -> None:
        """Create it; where it has been created meanwhile, that is as well."""
        self._ask(lambda: self.api.create_repo(self.id, repo_type="dataset", private=private, exist_ok=True))
        logger.info("Created %s, %s.", self.id, "private" if private else "public")

    def check_visibility(self, private: bool) -> None:
        """Say so where it is seen by others than asked for; changing that is its owner's business."""
        is_private = self._ask(lambda: self.api.repo_info(self.id, repo_type="dataset")).private
        if bool(is_private) != private:
            logger.warning(
                "%s is there already, and is %s; it stays so. Its settings on the Hub change that.",
                self.id,
                "private" if is_private else "public",
            )

    def run_id(self, manifest: str) -> str | None:
        """The run of the manifest that it holds; None where that is not one of ours."""

        def ask() -> bytes:
            address = f"{self.url}/resolve/main/{manifest}"
            answer = http_backoff("GET", address, headers=build_hf_headers(token=self.token))
            hf_raise_for_status(answer)
            return bytes(answer.content)

        try:
            content = json.loads(self._ask(ask))
        except ValueError:
            return None
        run_id = content.get("run_id") if isinstance(content, dict) else None
        return run_id if isinstance(run_id, str) else None

    def upload(self, root: Path, folders: Sequence[str], edition: str) -> None:
        """Upload the files of an edition in some folders of one, but for those that are there."""
        self._ask(
            lambda: self.api.upload_folder(
                repo_id=self.id,
                repo_type="dataset",
                folder_path=root,
                allow_patterns=[f"{folder}/*-{edition}.parquet" for folder in folders],
                ignore_patterns=[f"{folder}/*/*" for folder in folders],  # its * takes in what lies deeper
                commit_message="Upload shards with fgsm-pipeline",
            )
        )

    def commit(self, files: Mapping[str, bytes], stale: Sequence[str]) -> None:
        """Upload some files and delete others in one commit."""

        def ask() -> None:
            # The first attempt may have been heard, though its answer was lost: what is gone cannot be deleted.
            left = [path for path in stale if path in (self.files() or {})] if stale else []
            added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()]
            with disable_progress_bars():  # a bar for each small file
                self.api.create_commit(
                    self.id,
                    [*added, *(CommitOperationDelete(path_in_repo=path, is_folder=False) for path in left)],
                    commit_message="Upload card, manifest and report with fgsm-pipeline",
                    repo_type="dataset",
                )

        self._ask(ask)

    def _ask(self, call: Callable[[], Result]) -> Result:
        for pause in (*PAUSES, None):
            try:
                return call()
            except PipelineError:
                raise
            except Exception as error:  # a dozen exception types of three libraries; all mean the same here
                sentence = self._sentence(error)
                if pause is None or not _is_passing(error):
                    shown = "".join(_messages(error))
                    # It may quote the token, or the signature of an address, and --debug would show them.
                    raise PipelineError(sentence) from (error if redact(shown, self.token) == shown else None)
                logger.warning("%s Trying again in %g s.", sentence, pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _sentence(self, error: BaseException) -> str:
        """What went wrong, for a person."""
        again = "run the same command again: what has arrived is not sent twice"
        refused = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
        if refused is not None:
            status, said = refused.response.status_code, first_line(Exception(refused.server_message or ""))
            quoted = f" ({said})" if refused.server_message else ""
            known = {
                400: f"The Hub refuses what it was sent ({' '.join(str(error).split())[:300]})",
                401: "The Hub does not accept the token; log in again with `hf auth login`, or mend HF_TOKEN",
                403: f"The token may not write to {self.id}{quoted}; use one that has the right to, of that account",
                429: f"The Hub answers too many requests at the moment; wait, and {again}",
            }
            unknown = f"The Hub answered {status}{quoted} about {self.id}; {again}"
            return redact(known.get(status, unknown) + ".", self.token)
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
            return "HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it."
        if _is_passing(error):
            return f"The connection to the Hub was lost; {again}."
        reasons = dict.fromkeys(first_line(cause).rstrip(".") for cause in causes(error))
        return redact(f"{self.id}: the upload failed ({': '.join(reasons)}); {again}.", self.token)


def _messages(error: BaseException) -> Iterator[str]:
    return (str(cause) for cause in causes(error))


def _is_passing(error: BaseException) -> bool:
    """Whether it is worth another attempt: the connection, or a Hub that is busy or broken."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            status: int = cause.response.status_code
            # Files are put into a storage, at addresses that expire; another attempt gets new ones.
            return status in (408, 409, 412, 429) or status >= 500 or cause.response.request.method == "PUT"
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        # A page of HTML instead of an answer comes from a proxy before a Hub that is down.
        if isinstance(cause, (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)):
            return True
    return False


def redact(text: str, token: str) -> str:
    """A message without the token, and without the signatures in the addresses that uploads go to."""
    return redact_answer(text.replace(token, "***"))


@contextlib.contextmanager
def _client_that_gives_up() -> Iterator[None]:
    """Let no connection of the client be silent for ever, nor those of a session that it makes after a failure."""

    def impatient() -> httpx.Client:
        client = default_client_factory()
        client.timeout = STALL_SECONDS
        return client

    set_client_factory(impatient)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


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
