"""Load: one way from the section of a config to a `Model`, whatever its kind, whether it is attacked or looks on."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pkgutil import resolve_name

import torch
from torch import nn

from pipeline.config.kinds import MODELS
from pipeline.config.schema import ModelConfig, check_normalisation
from pipeline.core.errors import ConfigError, explained
from pipeline.models.base import Model
from pipeline.models.checkpoints import load_checkpoint
from pipeline.models.loaded import Loaded


def load_model(
    config: ModelConfig, *, seed: int, device: torch.device, bf16: bool = False, key: str = "model"
) -> Model:
    """Load the model that a section of a config names. The weights of an untrained one follow from the seed.

    Args:
        bf16: whether PyTorch's autocast takes it to bfloat16.
        key: of the section, for messages of a run.

    Raises:
        ConfigError: the model, its weights, or the extra it needs is not there, or they do not fit.
    """
    # Libraries have their own types of error for names, kwargs and downloads.
    failed = f"model: {config.kind} cannot make {config.call[0] or 'its model'}"
    with torch.random.fork_rng(devices=[]), _weights_only(config), explained(failed, kind=ConfigError):
        torch.manual_seed(seed)
        loaded: Loaded = resolve_name(MODELS[config.kind].make)(config)
    if not isinstance(loaded.module, nn.Module):
        kind = type(loaded.module).__name__
        raise ConfigError(f"model.name: {config.call[0]} returned {kind}, not a torch.nn.Module.")
    if config.checkpoint is not None:
        load_checkpoint(loaded.module, config.checkpoint)
    mean, std = config.mean or loaded.mean or (0.0,), config.std or loaded.std or (1.0,)
    published = {key: "weights" for key in ("mean", "std") if getattr(loaded, key)}
    stated = published | {key: "config" for key in ("mean", "std") if getattr(config, key)}
    with explained(f"model.weights: what {config.weights} was published with cannot be used", kind=ConfigError):
        check_normalisation(mean, std)
    return Model(
        loaded.module,
        mean=mean,
        std=std,
        classes=loaded.classes,
        digest=_digest(loaded),
        stated=stated,
        preprocess=loaded.preprocess,
        bf16=bf16,
        key=key,
        files=[str(file) for file in loaded.code],
    ).to(device)


@contextlib.contextmanager
def _weights_only(config: ModelConfig) -> Iterator[None]:
    """Whatever a library loads by itself is weights and nothing else: some ask PyTorch for a whole pickle still."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if config.own_code or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _digest(loaded: Loaded) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(loaded.module.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for file in loaded.code:
        total.update(file.read_bytes())
    return total.hexdigest()
