"""Checkpoints: weights from a file into a module, without running anything that the file contains."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError, explained, listing, require_file

# Keys that may lead to a state dict, one within another.
DEEPEST = 4


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights into a module: safetensors, or .pt/.pth that holds nothing but weights.

    The state dict may lie under any keys, beside an optimizer's or an epoch; of several, one must fit the module. A
    prefix that all of its keys have in common (`module.` of DataParallel, `_orig_mod.` of torch.compile, an attribute's
    name) is taken off where the rest then fits.

    Raises:
        ConfigError: there is no such file, it is not plain weights, or its keys or shapes do not fit.
    """
    require_file(path, "model.weights")
    expected = module.state_dict()
    weights = _state_dict(_read_checkpoint(path), expected, path)
    problems = [f"{what} {listing(keys)}" for what, keys in _misfits(weights, expected).items() if keys]
    if problems:
        raise ConfigError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}.")
    module.load_state_dict(weights, strict=False)


def _read_checkpoint(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with explained(f"model.weights: {path} is not a safetensors file", kind=ConfigError):
            return load_file(path)
    fix = "write it with torch.save(model.state_dict(), path) or as safetensors"
    with explained(
        f"model.weights: {path} is not plain weights, and nothing in it was executed", fix, kind=ConfigError
    ):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: Any, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict that a checkpoint holds for a module of the expected keys; of several, one must fit."""
    found = {name: _without_prefix(weights, expected) for name, weights in _state_dicts(content)}
    if not found:
        keys = f"; its keys are {listing([*map(repr, content)])}" if isinstance(content, dict) and content else ""
        raise ConfigError(f"model.weights: {path} holds no state dict{keys}.")
    fitting = {name: weights for name, weights in found.items() if not _misfit_count(weights, expected)}
    chosen = fitting or found
    if len(chosen) > 1:
        which = "fit the model" if fitting else "none of which fits the model"
        raise ConfigError(
            f"model.weights: {path} holds several state dicts, {which}: {listing([*chosen])}; save the one that is "
            "meant to a file of its own."
        )
    (weights,) = chosen.values()
    return weights


def _state_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of tensors in a checkpoint, and the keys that lead to it, joined by dots."""
    # A mapping may hold itself.
    if len(keys) > DEEPEST or not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield ".".join(keys), content
        return
    for key, value in content.items():
        yield from _state_dicts(value, (*keys, key))


def _without_prefix(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the parts of a name that all keys begin with, as many of them as make the rest fit best."""
    # Beside the weights PyTorch's AveragedModel keeps how many it has averaged.
    weights = {key: value for key, value in weights.items() if key in expected or key != "n_averaged"} or weights
    parts = next(iter(weights)).split(".")[:-1]
    prefixes = ["", *itertools.accumulate(f"{part}." for part in parts)]
    stripped = (
        {key.removeprefix(prefix): value for key, value in weights.items()}
        for prefix in prefixes
        if all(key.startswith(prefix) for key in weights)
    )
    return min(stripped, key=lambda rest: _misfit_count(rest, expected))


def _misfits(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The keys that do not fit a module, by what is wrong with them."""
    return {
        # Files without PyTorch's metadata may lack these counters; nothing in eval mode reads them.
        "missing": [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [key for key in expected if key in weights and weights[key].shape != expected[key].shape],
    }


def _misfit_count(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    return sum(map(len, _misfits(weights, expected).values()))
