"""What users call who have a config in Python: the commands `fgsm generate` and `fgsm plan` as functions.

`verify`, `inspect`, `report`, `load` and `training_dataset` are the functions of their own modules: see `pipeline`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.check import check_paths
from pipeline.config.load import as_config
from pipeline.config.schema import Config
from pipeline.core.loading import say_loading
from pipeline.core.logs import logging_to_stderr
from pipeline.output.summary import Summary

if TYPE_CHECKING:
    from pipeline.engine.estimate import PlannedRun


def generate(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    executor: str = "local",
    part: tuple[int, int] | None = None,
    unlocked: bool = False,
) -> Summary:
    """Write the dataset that a config describes, or what is missing of it; the report is made by `pipeline.report`.

        result = pipeline.generate("digits", output="out/digits", limit=100)
        print(result)  # the table of `fgsm inspect`; a notebook shows it as HTML

    What happens is logged, by the logger `pipeline`. Where no logging is set up, it is shown on stderr.

    Args:
        config: a YAML file, the name of a shipped config, the config itself as a mapping of the same keys, or checked.
            Relative paths in a mapping are relative to the working directory.
        output: in place of `output.path`.
        limit: in place of `source.limit`: only the first so many of each split's order.
        overwrite: remove the run that is in the output folder first: the files whose names end in its id. All else
            stays.
        executor: `local` works on this machine, `ray` on a cluster; the bytes are the same.
        part: (i, n), to write only part i of n, counted from 0, while other processes write the others.
        unlocked: do without a lock, where the file system or the object store has none: the caller sees to it that no
            second run writes there.

    Returns:
        What the dataset holds; of a part, as far as it is there. `path` is where it is, `manifest` holds the values.

    Raises:
        ConfigError: the config, or what it names, cannot be used; nothing was written.
        ShardsFailedError: some shards failed on a cluster; the others were committed.
        PipelineError: the run failed, or shards were removed while it went on; what was committed is kept.
    """
    with logging_to_stderr():
        checked = as_config(config, output=output, limit=limit)
        from pipeline.flow import generate as run

        manifest = run(checked, overwrite=overwrite, executor=executor, part=part, unlocked=unlocked)
    return Summary(manifest, checked.output.path)


def plan(
    config: Config | Mapping[str, Any] | str | Path, *, output: str | Path | None = None, limit: int | None = None
) -> "PlannedRun":
    """Say what `generate` would take: rows, bytes, files, time and memory, measured on some batches. Nothing is kept.

        planned = pipeline.plan("digits")
        print(planned)  # as `fgsm plan` prints it; a notebook shows it as HTML
        planned.seconds, planned.bytes, planned.warnings

    Args:
        config, output, limit: as `generate`.

    Raises:
        ConfigError: the config, or what it names, cannot be used.
        PipelineError: what would stop the run.
    """
    with logging_to_stderr():
        checked = as_config(config, output=output, limit=limit)
        check_paths(checked)
        say_loading("torch", "datasets")
        from pipeline.engine.estimate import plan_run

        return plan_run(checked)
