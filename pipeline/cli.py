"""The command line: parse, call, print. Results go to stdout, talk to stderr."""

import contextlib
import errno
import functools
import gc
import io
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import __version__
from pipeline.core.console import link, show
from pipeline.core.errors import (
    ConfigError,
    Interrupted,
    PipelineError,
    TemporaryError,
    explained,
    first_line,
    system_refusal,
)
from pipeline.core.loading import say_loading
from pipeline.core.logs import StderrHandler
from pipeline.core.redaction import presentable
from pipeline.executors import EXECUTORS
from pipeline.night import Night

if TYPE_CHECKING:
    from pipeline.config.schema import Config as LoadedConfig
    from pipeline.output.manifest import Manifest

app = typer.Typer(
    name="fgsm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped config such as digits.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The folder of a dataset, or its s3:// address.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated.")
]
OutputOption = Annotated[str | None, typer.Option("--output", help="Where the dataset goes: output.path.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N of each split's order: source.limit.")]
ExecutorOption = Annotated[
    str,
    typer.Option(
        "--executor", metavar="|".join(EXECUTORS), help="Where the shards are written; local is this machine."
    ),
]
Unlocked = Annotated[
    bool, typer.Option("--unlocked", help="Write to a store without locks; make sure that no other run does.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _say_version(asked: bool) -> None:
    if asked:
        _say(f"fgsm-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn an image dataset into Parquet shards of FGSM adversarial images, exact to the stored pixel."""


@app.command()
def generate(
    config: Config,
    overrides: Overrides = None,
    output: OutputOption = None,
    limit: Limit = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is there first.")] = False,
    executor: ExecutorOption = "local",
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Write one of N parts, counted from 0 to N-1, beside the processes that write the others: the share "
            "of a Slurm array task or a Kubernetes indexed job.",
        ),
    ] = None,
    unlocked: Unlocked = False,
    debug: Debug = False,
) -> None:
    """Write the dataset. Run the same command again to resume."""
    again = shlex.join(["fgsm", *(argument for argument in sys.argv[1:] if argument != "--overwrite")])
    with _boundary(debug, f"Interrupted. Finished shards are kept. To resume: {again}"):
        loaded = _load(config, overrides, output, limit)
        from pipeline.core.addresses import is_address
        from pipeline.executors.part import parse_part
        from pipeline.flow import generate as run
        from pipeline.output.summary import Summary

        share = None if part is None else parse_part(part)
        manifest = run(loaded, overwrite=overwrite, executor=executor, part=share, unlocked=unlocked)
        _say(Summary(manifest, loaded.output.path))
        if not manifest.complete:  # whoever writes the last part makes the report
            return
        _report_on(manifest, loaded.output.path, debug)
        path = loaded.output.path
        # JSON's double quotes: Python's single ones become unreadable inside the shell's.
        if is_address(path):
            one_line = f"import pipeline; print(pipeline.load({json.dumps(path)}))"
        else:
            path = str(Path(path).expanduser())
            arguments = f"{json.dumps(path)}, {json.dumps(manifest.stored[-1])}"
            one_line = f"import datasets; print(datasets.load_dataset({arguments}))"
        _say(
            f"\nNext: fgsm verify {shlex.quote(path)} --recompute\n"
            f"      fgsm inspect {shlex.quote(path)}\n"
            f"      python -c {shlex.quote(one_line)}",
            err=True,
        )


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    output: OutputOption = None,
    limit: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Estimate rows, bytes, files, time and memory of a run from some of its batches. Nothing is kept."""
    with _boundary(debug):
        loaded = _load(config, overrides, output, limit)
        from pipeline.api import plan as make

        planned = make(loaded)
        _say(json.dumps(asdict(planned), indent=1) if as_json else planned)
        for warning in planned.warnings:
            _say(f"Warning: {warning}", err=True)


@app.command()
def verify(
    output: Output,
    recompute: Annotated[bool, typer.Option("--recompute", help="Ask the models again about every image.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Compare labels and clean images with the source.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Drop damaged shards; generate rewrites them.")] = False,
    unlocked: Unlocked = False,
    as_json: Annotated[bool, typer.Option("--json", help="All that was found as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Check files, schema, counts, and that attacked images are the clean ones plus epsilon times one sign; with
    --recompute also predictions and signs."""
    with _boundary(debug):
        _check_dataset(output)
        say_loading("torch", "datasets")
        from pipeline.check.findings import as_values, damage_report, describe
        from pipeline.check.verify import verify as check
        from pipeline.core.addresses import is_address

        findings = check(output, recompute=recompute, source=source, repair=repair, unlocked=unlocked)
        _say(json.dumps(as_values(findings), indent=1) if as_json else describe(findings, recompute, source))
        for problem in damage_report(findings):
            _say(problem, err=True, keep="")
        if findings.problems:
            again = "; run the generate command that made it" if findings.damaged or findings.missing else ""
            first = " after fgsm verify --repair" if findings.damaged and not repair else ""
            dropped = f", {len(findings.damaged)} damaged shards dropped" if repair else ""
            # A disk that cannot be read stays so; a store may answer the next time.
            passing = findings.unread and is_address(output) and not again
            kind = TemporaryError if passing else PipelineError
            count = "1 problem" if len(findings.problems) == 1 else f"{len(findings.problems)} problems"
            raise kind(f"{output}: {count}{dropped}{again}{first}.")


@app.command()
def inspect(
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="The counts and the transfer matrix as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show rows, accuracy, confidence, fooled and bytes of each subset, and which model is fooled by whose images."""
    with _boundary(debug):
        from pipeline.output import summary

        _say(json.dumps(summary.inspect_json(output), indent=1) if as_json else summary.inspect(output))


@app.command()
def report(output: Output, debug: Debug = False) -> None:
    """Write report.html and its pictures, which show what the attack did."""
    with _boundary(debug):
        _check_dataset(output)
        say_loading("datasets", "matplotlib")
        from pipeline.reporting.page import report as make

        _say(link("", make(output)))


def _report_on(manifest: "Manifest", path: str, debug: bool) -> None:
    """Make the report of a complete dataset unless it is there. Without it the dataset is as complete."""
    from pipeline.output.folder import OutputFolder
    from pipeline.output.manifest import has_report

    folder = OutputFolder(path)
    if has_report(folder, manifest):
        return
    say_loading("matplotlib")
    try:
        from pipeline.reporting.page import write_report

        _say(link("\nReport: ", write_report(folder, manifest)), err=True)
    except Exception as error:  # whatever it is, it is no failure of the run
        if debug:
            _say(traceback.format_exc(), err=True)
        reason = first_line(error).rstrip(".")
        _say(
            f"\nWarning: the dataset is complete, but its report was not made: {reason}. Try fgsm report "
            f"{shlex.quote(folder.root)}",
            err=True,
        )


@app.command()
def publish(
    output: Output,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The dataset on the Hub: user/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see a new repository; private by default."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a dataset to the Hugging Face Hub and check that it arrived. Run the same command again to resume."""
    again = shlex.join(["fgsm", *sys.argv[1:]])
    with _boundary(debug, f"Interrupted. Uploaded files are kept. To resume: {again}"):
        if not sys.stderr.isatty():
            # The client's bars for LFS, which it draws into a log too: tqdm reads this when it is imported.
            os.environ.setdefault("TQDM_MININTERVAL", "30")
        _check_dataset(output)
        say_loading("torch", "datasets")
        from pipeline.hub import upload as hub

        if dry_run:
            _say(hub.dry_run(output, repo_id, private=private))
            return
        _say(f"Published: {hub.publish(output, repo_id, private=private)}")
        _say(f"\nNext: python -c 'import datasets; print(datasets.load_dataset(\"{repo_id}\"))'", err=True)


@app.command()
def init(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="The file to write; called after the images by default."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Where the images are: a folder, a Hub name, a torchvision dataset, a URL, or digits."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="The splits to read, such as test or train,test.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A model of torchvision, timm or the Hub, a folder, path/to/file.py:callable, or digits.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="A checkpoint, or the name of published weights.")
    ] = None,
    epsilons: Annotated[
        str | None, typer.Option("--epsilons", help="In 255ths, such as 2,4,8, or 2/255,4/255.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="images, signs or wide.")] = None,
    output: OutputOption = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Write a config that runs: tries the images and the model as a run would, and asks for what no option says."""
    with _boundary(debug):
        from pipeline.init import write_config

        keys = {
            "source.split": split,
            "model.weights": weights,
            "attack.epsilons": epsilons,
            "output.layout": layout,
            "output.path": output,
        }
        asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
        written, said = write_config(
            path, data=data, model=model, keys=keys, overrides=overrides or (), ask=_ask if asks else None
        )
        quoted = shlex.quote(str(written))
        lines = [*said, f"Wrote {written}.", "", f"Next: fgsm plan {quoted}", f"      fgsm generate {quoted}"]
        _say("\n".join(lines), err=True)


def _ask(question: str, default: str | None) -> str:
    """Ask on the terminal. An empty default stands for an empty answer."""
    text = presentable(question, "")
    return str(typer.prompt(text, default=default, show_default=bool(default), err=True))


@app.command("config")
def config_reference(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A key such as attack.epsilons.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
    debug: Debug = False,
) -> None:
    """Explain a key of the config: type, default, meaning; without KEY all of them, as docs/config.md."""
    with _boundary(debug):
        from pipeline.config import reference

        if schema:
            _say(json.dumps(reference.json_schema(), indent=1))
        else:
            _say(reference.explain(key) if key else reference.markdown().rstrip("\n"))


@app.command()
def night(
    config: Config,
    repo_id: Annotated[
        str | None, typer.Argument(metavar="[REPO_ID]", help="Publish to this dataset on the Hub: user/name.")
    ] = None,
    overrides: Overrides = None,
    output: OutputOption = None,
    executor: ExecutorOption = "local",
    on_end: Annotated[
        str | None,
        typer.Option(
            "--on-end",
            metavar="COMMAND",
            help="A shell command to run once at the end, success or failure; FGSM_NIGHT_* say what came of it.",
        ),
    ] = None,
) -> None:
    """Generate, verify, report and publish while nobody watches: with retries, one log and a summary."""
    run = Night(config, repo_id, overrides or [], output, executor, on_end, functools.partial(_say, err=True))
    raise typer.Exit(run.run())


def _say(text: object, *, err: bool = False, keep: str = "\n") -> None:
    """Print for people: names out of a dataset are no commands to a terminal, and no credential is shown."""
    if hasattr(text, "__rich_console__"):  # it has seen to that itself: see `console.cell`
        show(text, sys.stderr if err else sys.stdout)
    else:
        typer.echo(presentable(str(text), keep), err=err)


def _check_dataset(output: str) -> None:
    """As `check_dataset`, of a folder that a command names."""
    from pipeline.output.folder import OutputFolder
    from pipeline.output.manifest import check_dataset

    check_dataset(OutputFolder(output))


def _load(name: str, overrides: list[str] | None, output: str | None, limit: int | None) -> "LoadedConfig":
    """The config of a command. Says which epsilons are stored as others than were asked for, and where the next level
    was probably meant."""
    from pipeline.config.load import load_config
    from pipeline.core.epsilon import LEVEL_SLACK, epsilon_value, stored_just_below

    config = load_config(name, overrides or (), output=output, limit=limit)
    attacks = config.all_attacks.values()
    asked = {(level, epsilon, one.rounding) for one in attacks for level, epsilon in one.requested.items()}
    for level, epsilon, rounding in sorted(asked, key=lambda one: (one[0], str(one[1]))):
        if abs(255 * epsilon_value(epsilon) - level) > LEVEL_SLACK:
            _say(f"epsilon {epsilon} is stored as {level}/255 = {level / 255:.6f}", err=True)
        if rounding == "down" and stored_just_below(epsilon):
            _say(f"Warning: {epsilon} lies just below {level + 1}/255; write {level + 1}/255 if you mean it.", err=True)
    return config


@contextlib.contextmanager
def _boundary(debug: bool, farewell: str = "Interrupted.") -> Iterator[None]:
    """Turn what a user can cause into one sentence and an exit code; anything else keeps its traceback."""
    from pipeline.core.interrupts import interruptible

    # A log that is read in the morning wants times; a person at a terminal does not.
    handler = StderrHandler("%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s")
    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    try:
        # Without a folder torch's libraries end the process.
        with explained("The working folder is gone", "run the command from another one", kind=ConfigError):
            Path.cwd()
        with interruptible(lambda: _say(f"\n{farewell}", err=True)):
            yield
    except Interrupted as interrupt:
        raise typer.Exit(128 + interrupt.signum) from None
    except Exception as error:
        known = error if isinstance(error, PipelineError) else system_refusal(error)
        if known is None:
            raise
        if debug:
            _say(traceback.format_exc(), err=True)
        _say(f"Error: {known}", err=True, keep="")
        raise typer.Exit(known.exit_code) from None


class _Descriptor(io.FileIO):
    """Where a standard stream of this process writes to. A write that fails ends in what `failed` does, and what
    follows goes nowhere.

    What writes there is not only ours: typer prints help, libraries print what they like.
    """

    def __init__(self, number: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(number, "wb", closefd=False)
        self._failed = failed

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            # What is left in the buffers must go somewhere, or Python complains of it at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            self._failed(error)
            return len(content)


def _stdout_failed(error: OSError) -> None:
    """End as coreutils do: without a word where the reader has gone, else with what the system says."""
    if error.errno == errno.EPIPE:
        sys.exit(128 + signal.SIGPIPE)
    _say(f"Error: Cannot write to standard output: {error.strerror}.", err=True, keep="")
    sys.exit(1)


def _watch_streams() -> None:
    """Let a command notice that its result went nowhere, and go on where only its messages do."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed: the next file to be opened, such as one of the dataset, would take its number, and get what is
            # printed. Opened for reading, so that writing still fails.
            os.open(os.devnull, os.O_RDONLY)
    # The streams as they were are kept in sys.__stdout__: one that is collected may close its descriptor.
    for name, number, failed in (("stdout", 1, _stdout_failed), ("stderr", 2, lambda _: None)):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        raw = io.BufferedWriter(_Descriptor(number, failed))
        lines = number == 2 or os.isatty(number)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=lines))


def main() -> None:
    """The console command `fgsm`. A bug keeps its traceback, without what a terminal or a log must not have."""
    _watch_streams()
    try:
        app(prog_name="fgsm")
    except Exception:
        _say(traceback.format_exc(), err=True)
        sys.exit(1)
    finally:
        # Python collects garbage before it ends. Among the objects of PyTorch that takes half a second, and finds none.
        gc.freeze()
