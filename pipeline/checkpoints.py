"""Checkpoints: weights from a file into a module, without running anything that the file contains."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, first_line, listing


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights into a module: safetensors, or .pt/.pth that holds nothing but weights.

    A nesting under `state_dict` or `model`, and DataParallel's `module.` prefix, are taken off.

    Raises:
        ConfigError: there is no such file, it is not plain weights, or its keys or shapes do not fit.
    """
    if not path.is_file():
        raise ConfigError(f"model.weights: there is no file {path}.")
    weights = _plain_weights(_read_checkpoint(path), path)
    expected = module.state_dict()
    # Files without PyTorch's metadata may lack these counters; nothing in eval mode reads them.
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected]
    reshaped = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    problems = [
        f"{what} {listing(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise ConfigError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}.")
    module.load_state_dict(weights, strict=False)


def _read_checkpoint(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"model.weights: {path} is not a safetensors file: {first_line(error)}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken zips, foreign pickles and empty files differ in type only
        raise ConfigError(
            f"model.weights: {path} is not plain weights, and nothing in it was executed; write it with "
            "torch.save(model.state_dict(), path) or as safetensors."
        ) from error


def _plain_weights(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and content and all(map(_is_weight, content.items()))):
        raise ConfigError(f"model.weights: {path} holds no state dict.")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _is_weight(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and isinstance(value, Tensor)
