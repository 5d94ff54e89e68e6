"""Victims: the models that are attacked, loaded from where people keep them.

A `Victim` takes images in [0, 1] and owns everything else: normalisation, eval mode, frozen parameters,
memory format. timm and transformers are imported only when a config names them.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, PreprocessConfig, is_checkpoint, is_factory_file
from pipeline.errors import ConfigError, first_line

# Keys listed of a checkpoint that does not fit.
LISTED = 4


class Victim(nn.Module):
    """A frozen classifier of images in [0, 1].

    `classes` are the model's own class names, None where unknown; `digest` changes with the weights and
    with a factory's code; `channels_last` says how activations lie in memory.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        classes: Sequence[str] | None = None,
        channels_last: bool = False,
        digest: str = "",
    ) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, -1, 1, 1))
        self.classes = tuple(classes) if classes else None
        self.channels_last = channels_last
        self.digest = digest
        if channels_last:
            self.module.to(memory_format=torch.channels_last)

    def unit(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to the victim's floating type in [0, 1]."""
        images = images_u8.to(self.mean.dtype) / 255
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to logits (N, classes), in float32 or float64."""
        output = self.module((images - self.mean) / self.std)
        logits: Tensor = getattr(output, "logits", output)  # transformers wrap their logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def count_classes(self, shape: tuple[int, int, int]) -> int:
        """The number of classes, found by running one black image of that (C, H, W).

        Raises:
            ConfigError: the model does not take such images, or does not return logits.
        """
        device = self.mean.device
        try:
            with torch.inference_mode():
                logits = self(self.unit(torch.zeros((1, *shape), dtype=torch.uint8, device=device)))
        except Exception as error:  # the model is the user's code
            raise ConfigError(
                f"model: it does not take images of shape {shape} (channels, height, width): {first_line(error)}"
            ) from error
        if logits.ndim != 2 or len(logits) != 1:
            raise ConfigError(
                f"model: it returned a tensor of shape {tuple(logits.shape)}; logits (images, classes) are needed."
            )
        return int(logits.shape[1])


@dataclass(frozen=True)
class Loaded:
    """A module, and what its published weights say of their input and classes."""

    module: nn.Module
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    preprocess: PreprocessConfig | None = None


def load_victim(config: ModelConfig, *, seed: int, device: torch.device) -> tuple[Victim, Loaded]:
    """Load the model that the config names.

    Args:
        config: the `model` section.
        seed: of the weights of an untrained model.
        device: where it runs.

    Returns:
        The victim on the device, and what its weights say of their preprocessing.

    Raises:
        ConfigError: the model, its weights, or the extra it needs is not there, or they do not fit.
    """
    loaders: dict[str, Callable[[ModelConfig], Loaded]] = {
        "torchvision": _load_torchvision,
        "timm": _load_timm,
        "transformers": _load_transformers,
        "factory": _load_factory,
        "digits": _load_digits,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = loaders[config.kind](config)
    if config.weights is not None and is_checkpoint(config.weights):
        load_checkpoint(loaded.module, Path(config.weights).expanduser())
    victim = Victim(
        loaded.module,
        mean=config.mean or loaded.mean or (0.0,),
        std=config.std or loaded.std or (1.0,),
        classes=loaded.classes,
        # Tensor cores read channels last. On CPUs it was no faster: ResNet-18 at 224 px 1.6 s plain, 2.2 s so.
        channels_last=device.type == "cuda",
        digest=_digest(loaded.module, config),
    )
    return victim.to(device), loaded


def _digest(module: nn.Module, config: ModelConfig) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if config.kind == "factory":
        source = inspect.getsourcefile(_factory(config))
        total.update(Path(source).read_bytes() if source else b"")
    return total.hexdigest()


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"model.kind: {name} is not installed; it comes with pip install 'fgsm-pipeline[{name}]'."
        ) from None


def _built(build: Callable[[], nn.Module], config: ModelConfig) -> nn.Module:
    """Call a library's constructor; what it refuses is the config's fault."""
    try:
        module = build()
    except ConfigError:
        raise
    except Exception as error:  # names, kwargs and downloads each fail with the library's own types
        raise ConfigError(f"model: {config.kind} cannot make {config.name}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.name: {config.name} returned {type(module).__name__}, not a torch.nn.Module.")
    return module


def _published(config: ModelConfig) -> str | None:
    """The id of published weights, None for a checkpoint file or an untrained model."""
    return None if config.weights is None or is_checkpoint(config.weights) else config.weights


# ------------------------------------------------------------------------------------------- libraries


def _load_torchvision(config: ModelConfig) -> Loaded:
    from torchvision import models

    name, wanted = str(config.name), _published(config)
    if wanted is None:
        return Loaded(_built(lambda: models.get_model(name, weights=None, **config.kwargs), config))
    try:
        available = models.get_model_weights(name)
    except ValueError as error:
        raise ConfigError(f"model.name: torchvision has no model {name}: {first_line(error)}") from None
    if wanted not in available.__members__:
        raise ConfigError(
            f"model.weights: {name} has no weights {wanted}; torchvision knows {', '.join(available.__members__)}, "
            "and a checkpoint ends in .safetensors, .pt or .pth."
        )
    weights = available[wanted]
    transform = weights.transforms()
    return Loaded(
        _built(lambda: models.get_model(name, weights=weights, **config.kwargs), config),
        classes=weights.meta.get("categories"),
        mean=transform.mean,
        std=transform.std,
        preprocess=PreprocessConfig(
            resize=_side(transform.resize_size),
            crop=_side(transform.crop_size),
            interpolation=transform.interpolation.value,
        ),
    )


def _side(sizes: Sequence[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _load_timm(config: ModelConfig) -> Loaded:
    timm = _extra("timm")
    name, wanted = str(config.name), _published(config)
    if wanted is None:
        return Loaded(_built(lambda: timm.create_model(name, pretrained=False, **config.kwargs), config))
    # `weights` is a pretrained tag (a1_in1k), or a whole id that carries one.
    full = wanted if wanted.startswith(name) or ":" in wanted else f"{name}.{wanted}"
    module = _built(lambda: timm.create_model(full, pretrained=True, **config.kwargs), config)
    data = timm.data.resolve_model_data_config(module)
    _, height, width = data["input_size"]
    crop = height if height == width else (height, width)
    return Loaded(
        module,
        mean=data["mean"],
        std=data["std"],
        preprocess=PreprocessConfig(
            resize=math.floor(min(height, width) / data["crop_pct"]), crop=crop, interpolation=data["interpolation"]
        ),
    )


def _load_transformers(config: ModelConfig) -> Loaded:
    transformers = _extra("transformers")
    auto, name, wanted = transformers.AutoModelForImageClassification, str(config.name), _published(config)

    def untrained() -> nn.Module:
        made: nn.Module = auto.from_config(transformers.AutoConfig.from_pretrained(name, **config.kwargs))
        return made

    if wanted is None:
        return Loaded(_built(untrained, config))
    module: Any = _built(lambda: auto.from_pretrained(wanted, use_safetensors=True, **config.kwargs), config)
    names: Mapping[int, str] = module.config.id2label
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(wanted).to_dict()
    except (OSError, ValueError):  # weights without a processor say nothing of their input
        processor = {}
    return Loaded(
        module,
        classes=[names[index] for index in range(len(names))],
        mean=processor.get("image_mean") if processor.get("do_normalize") else None,
        std=processor.get("image_std") if processor.get("do_normalize") else None,
        preprocess=_processor_sizes(processor),
    )


def _processor_sizes(processor: Mapping[str, Any]) -> PreprocessConfig | None:
    """A transformers image processor's sizes in torchvision's terms, None where it states none."""
    size = processor.get("size") if processor.get("do_resize") else None
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    if not size:
        return None
    resize = size.get("shortest_edge") or (size["height"], size["width"])
    from PIL import Image

    return PreprocessConfig(
        resize=resize,
        crop=(crop["height"], crop["width"]) if crop else None,
        interpolation=Image.Resampling(processor.get("resample", 2)).name.lower(),
    )


def _load_digits(config: ModelConfig) -> Loaded:
    from pipeline.digits import CLASSES, WEIGHTS, DigitsNet

    module = DigitsNet()
    if config.weights == "digits":
        load_checkpoint(module, WEIGHTS)
    elif _published(config):
        raise ConfigError(f"model.weights: kind digits has no weights {config.weights}; leave the key out for its own.")
    return Loaded(module, classes=CLASSES)


# --------------------------------------------------------------------------------------------- factory


def _load_factory(config: ModelConfig) -> Loaded:
    if _published(config):
        raise ConfigError(
            f"model.weights: {config.weights} is no checkpoint; kind factory takes a .safetensors, .pt or .pth file."
        )
    factory = _factory(config)
    return Loaded(_built(lambda: factory(**config.kwargs), config))


def _factory(config: ModelConfig) -> Callable[..., nn.Module]:
    """The callable that `package.module:callable` or `path/to/file.py:callable` names."""
    where, _, attribute = str(config.name).rpartition(":")
    try:
        module = _module_from_file(Path(where).expanduser()) if is_factory_file(str(config.name)) else None
        module = module or importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:  # the user's module runs on import
        raise ConfigError(
            f"model.name: {where} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    factory: Callable[..., nn.Module] | None = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(f"model.name: {where} has no callable {attribute}.")
    return factory


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"model.name: there is no file {path}.")
    name = f"_fgsm_factory_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# ----------------------------------------------------------------------------------------- checkpoints


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
        f"{what} {_listing(keys)}"
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
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise ConfigError(f"model.weights: {path} holds no state dict.")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _listing(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:LISTED])
    return f"{shown} and {len(keys) - LISTED} more" if len(keys) > LISTED else shown
