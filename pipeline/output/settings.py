"""Settings: a config against the run that is in its output already, as far as no source or model needs to be opened."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, shortened
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, identity_with


def take_over(config: Config, recorded: Manifest) -> Config:
    """A config with what the run that is resumed decided in place of each `auto` and of a halved batch size."""
    then, runtime, output = recorded.resolved, config.runtime, config.output
    decided = {key: getattr(then.runtime, key) for key in ("device", "compile") if getattr(runtime, key) == "auto"}
    if runtime.batch_size == recorded.asked_batch_size:
        decided["batch_size"] = then.runtime.batch_size
    if output.image_format == "auto":
        output = output.model_copy(update={"image_format": then.output.image_format})
    return config.model_copy(update={"runtime": runtime.model_copy(update=decided), "output": output})


def check_settings(config: Config, recorded: Manifest, folder: OutputFolder) -> None:
    """Refuse a config whose settings alone make it another run than the one that is there.

    Mean and std, and sizes that the config leaves to the weights, are not compared: they are known once the models are
    loaded, and then the whole identity is.

    Raises:
        ConfigError: they do.
    """
    asked, then = take_over(config, recorded), recorded.resolved
    models = {
        name: section.model_copy(update={key: getattr(then.all_models[name], key) for key in ("mean", "std")})
        for name, section in asked.all_models.items()
        if name in then.all_models
    }
    preprocess = asked.preprocess
    if not preprocess.model_fields_set & {"resize", "crop", "interpolation"}:
        preprocess = then.preprocess.model_copy(update={"mode": preprocess.mode})
    whole = asked.with_models({**asked.all_models, **models}).model_copy(update={"preprocess": preprocess})
    here = identity_with(recorded, whole)
    there = {key: recorded.identity.get(key) for key in here}
    if here != there:
        raise another_run(folder, recorded, here, there)


def another_run(
    folder: OutputFolder, recorded: Manifest, here: Mapping[str, Any], there: Mapping[str, Any]
) -> ConfigError:
    """The error for an output that holds another run: how the identity of this one differs from what is recorded."""
    return ConfigError(
        f"output.path: {folder.root} holds another run ({recorded.run_id}), which differs in "
        f"{differences(there, here)}; choose another folder, or start over with --overwrite."
    )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How two identities differ, for a person: `key (value there, value here)`."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "; ".join(f"{key} ({_short(there.get(key))} there, {_short(here.get(key))} here)" for key in keys)


def version_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Each version that differs between a run and another session, as text."""
    names = {**then, **now}
    return [f"{key} {then.get(key)} then, {now.get(key)} now" for key in names if then.get(key) != now.get(key)]


def _short(value: Any) -> str:
    return shortened(json.dumps(value), 40)
