"""Victims: the models that are attacked, loaded from where people keep them.

A `Victim` takes images in [0, 1] and owns everything else: normalisation, eval mode, frozen parameters,
memory format. timm and transformers are imported only when a config names them.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from pipeline.config.schema import (
    Interpolation,
    ModelConfig,
    PreprocessConfig,
    check_normalisation,
    is_checkpoint,
    is_factory_file,
)
from pipeline.core.errors import ConfigError, first_line, listing
from pipeline.models.checkpoints import load_checkpoint

# The compiler gives up on code that it has met in so many forms, 8 by default; this code it meets with every model
# of a process, in two batch sizes.
COMPILED_FORMS = 256
# Without it transformers asks on a terminal whether to run the code of a repository.
NO_CODE = {"trust_remote_code": False}
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Victim(nn.Module):
    """A frozen classifier of images in [0, 1], which it is given in the type of its first floating-point parameter.

    `classes` are the model's own class names, None where unknown; `digest` changes with the weights and
    with a factory's code. Activations lie channels last, which every convolution measured liked better: on a CPU
    ResNet-20 at 32 px and ResNet-18 at 224 px gained 8 to 18%, and tensor cores want it.
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
        digest: str = "",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.module = module.eval().to(memory_format=torch.channels_last)
        for parameter in module.parameters():  # the module's own requires_grad_ is refused by TorchScript
            parameter.requires_grad_(False)
        dtype = _input_dtype(module)
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, -1, 1, 1))
        self.classes = tuple(classes) if classes else None
        self.digest = digest
        self.bf16 = bf16
        self.compiled = False
        self._differentiable: Callable[[Tensor], Tensor] = self._logits
        self._inferred: Callable[[Tensor], Tensor] = self._logits_of_pixels

    def unit(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to the victim's floating type in [0, 1]."""
        return (images_u8.to(self.mean.dtype) / 255).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to logits (N, classes), in float32 or float64."""
        return self._differentiable(images)

    @torch.inference_mode()
    def predict(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to logits (N, classes), where no gradient is wanted."""
        return self._inferred(images_u8)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = _logits_of(self.module((images - self.mean) / self.std))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits_of_pixels(self, images_u8: Tensor) -> Tensor:
        return self._logits(self.unit(images_u8))

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile both ways through the model; the first calls, within this context, do the work.

        Where no gradient is wanted the weights are frozen into the code (batch norm into convolutions, casts
        done ahead): ResNet-20 in bf16 took 46 ms a chunk as it is, 40 compiled, 30 compiled and frozen. If
        the context fails the victim runs as it is.
        """
        import torch._dynamo.config as dynamo  # the compiler takes a second to import
        import torch._inductor.config as inductor

        # On a CPU: code that is called from C++ lets go of the GIL; called from Python, one lane holds up the others.
        options: dict[str, Any] = {"cpp_wrapper": True} if self.mean.device.type == "cpu" else {}
        differentiable = torch.compile(self._logits, dynamic=False, options=options)
        inferred = torch.compile(self._logits_of_pixels, dynamic=False, options=options)

        # Settings of the compiler do not reach other threads, so they are made for each call.
        def patient(images: Tensor) -> Tensor:
            with dynamo.patch(recompile_limit=COMPILED_FORMS):
                return differentiable(images)

        def frozen(images_u8: Tensor) -> Tensor:
            # As an option of torch.compile `freezing` does not reach the tracer.
            with dynamo.patch(recompile_limit=COMPILED_FORMS), inductor.patch(freezing=True):
                return inferred(images_u8)

        self._differentiable, self._inferred = patient, frozen
        try:
            yield
            self.compiled = True
        except BaseException:
            self._differentiable, self._inferred = self._logits, self._logits_of_pixels
            raise

    def count_classes(self, shape: tuple[int, int, int], *, attacked: bool = True) -> int:
        """The number of classes, found by running one black image of that (C, H, W) forward and back.

        A model that is not attacked need not let a gradient through.

        Raises:
            ConfigError: the model does not take such images, does not return logits, or lets no gradient through.
        """
        device = self.mean.device
        try:
            image = self.unit(torch.zeros((1, *shape), dtype=torch.uint8, device=device)).requires_grad_()
            logits = self(image)
        except ConfigError:
            raise
        except Exception as error:  # the model is the user's code
            raise ConfigError(
                f"model: it does not take images of shape {shape} (channels, height, width): {first_line(error)}"
            ) from error
        if logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
            raise ConfigError(
                f"model: it returned a tensor of shape {tuple(logits.shape)}; logits (images, classes) "
                "of two classes or more are needed."
            )
        if not attacked:
            return int(logits.shape[1])
        reached = torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] if logits.requires_grad else None
        if reached is None:
            raise ConfigError("model: no gradient reaches its input; does it run under torch.no_grad or detach?")
        return int(logits.shape[1])


def _input_dtype(module: nn.Module) -> torch.dtype:
    """The type that a module's images must have: whole numbers and 8-bit floats store weights, and compute nothing."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.dtype in INPUT_DTYPES), torch.float32)


def _logits_of(output: Any) -> Tensor:
    """The logits of what a module returned: a tensor, or `logits` of a mapping or an object, as transformers wrap them.

    Raises:
        ConfigError: it is neither, or holds no floating-point numbers.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"model: it returned {_described(output)}; return the logits alone, a tensor (images, classes), or as "
            '"logits" of a dict or .logits of an object.'
        )
    if not logits.is_floating_point():
        raise ConfigError(f"model: it returned {logits.dtype} values; logits are floating-point numbers.")
    return logits


def _described(output: Any) -> str:
    """What a module returned in place of a tensor."""
    if output is None:
        return "None"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with the keys {listing([*map(repr, output)])}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {listing([type(part).__name__ for part in output])}"
    return f"an object of type {type(output).__name__}"


@dataclass(frozen=True)
class Loaded:
    """A module, and what its published weights say of their input and classes."""

    module: nn.Module
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    preprocess: PreprocessConfig | None = None


def load_victim(config: ModelConfig, *, seed: int, device: torch.device, bf16: bool = False) -> tuple[Victim, Loaded]:
    """Load the model that the config names.

    Args:
        config: the `model` section.
        seed: of the weights of an untrained model.
        device: where it runs.
        bf16: whether PyTorch's autocast takes it to bfloat16.

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
    with torch.random.fork_rng(devices=[]), _weights_only(config):
        torch.manual_seed(seed)
        loaded = loaders[config.kind](config)
    if config.weights is not None and is_checkpoint(config.weights):
        load_checkpoint(loaded.module, Path(config.weights).expanduser())
    mean, std = config.mean or loaded.mean or (0.0,), config.std or loaded.std or (1.0,)
    try:
        check_normalisation(mean, std)
    except ValueError as error:
        raise ConfigError(f"model.weights: as {config.weights} was published, {error}.") from None
    victim = Victim(
        loaded.module,
        mean=mean,
        std=std,
        classes=loaded.classes,
        digest=_digest(loaded.module, config),
        bf16=bf16,
    )
    return victim.to(device), loaded


@contextlib.contextmanager
def _weights_only(config: ModelConfig) -> Iterator[None]:
    """Whatever a library loads by itself is weights and nothing else: some ask PyTorch for a whole pickle still."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if config.kind == "factory" or name in os.environ:  # a factory is the user's own code
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _digest(module: nn.Module, config: ModelConfig) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if config.kind == "factory":
        for file in sorted(_factory_files(config), key=lambda file: file.name):
            total.update(file.read_bytes())
    return total.hexdigest()


def _factory_files(config: ModelConfig) -> set[Path]:
    """The code of a factory: the file that `model.name` names, and where the callable itself is written."""
    factory = _factory(config)
    where = str(config.name).rpartition(":")[0]
    named = where if is_factory_file(str(config.name)) else sys.modules[where].__file__
    try:
        written = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:  # a partial or an instance is written nowhere
        written = None
    return {Path(file).expanduser().resolve() for file in (named, written) if file}


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
        made: nn.Module = auto.from_config(
            transformers.AutoConfig.from_pretrained(name, **config.kwargs, **NO_CODE), **NO_CODE
        )
        return made

    if wanted is None:
        return Loaded(_built(untrained, config))
    # Weights are often published in half precision, and transformers would keep it.
    options = {"dtype": torch.float32, **config.kwargs, **NO_CODE, "use_safetensors": True, "output_loading_info": True}
    report: dict[str, Any] = {}

    def pretrained() -> nn.Module:
        module, info = auto.from_pretrained(wanted, **options)
        report.update(info)
        return module  # type: ignore[no-any-return]

    transformers.utils.logging.disable_progress_bar()
    module: Any = _built(pretrained, config)
    if report["missing_keys"]:
        raise ConfigError(
            f"model.weights: {wanted} has no weights for {', '.join(sorted(report['missing_keys']))}; "
            "it was not published as a classifier."
        )
    names: Mapping[int, str] = module.config.id2label
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(wanted, **NO_CODE).to_dict()
    except (OSError, ValueError):  # weights without a processor say nothing of their input
        processor = {}
    mean, std = _processor_statistics(processor)
    return Loaded(
        module,
        classes=[names[index] for index in range(len(names))],
        mean=mean,
        std=std,
        preprocess=_processor_sizes(processor),
    )


def _processor_statistics(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """What a transformers image processor subtracts from images in [0, 1], and what it divides them by then.

    It does so to what its own rescaling gives, which may be grey levels.
    """
    white = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1)
    mean = _channels(processor["image_mean"]) if processor.get("do_normalize") else [0.0]
    # EfficientNet divides images for a classifier once more.
    times = bool(processor.get("do_normalize")) + bool(processor.get("include_top"))
    std = [value**times for value in _channels(processor["image_std"])] if times else [1.0]
    return [value / white for value in mean], [value / white for value in std]


def _channels(values: float | Sequence[float]) -> list[float]:
    return [values] if isinstance(values, int | float) else [*values]


def _processor_sizes(processor: Mapping[str, Any]) -> PreprocessConfig | None:
    """A transformers image processor in torchvision's terms, None where it states no size.

    Raises:
        ConfigError: it does to images what `preprocess` cannot express.
    """
    from PIL import Image

    filter_name = Image.Resampling(processor.get("resample", Image.Resampling.BILINEAR)).name.lower()
    # An offset is subtracted after rescaling; without rescaling there is none.
    shifts = processor.get("do_rescale", True) and processor.get("rescale_offset")
    if processor.get("do_flip_channel_order") or shifts or filter_name not in get_args(Interpolation):
        raise ConfigError(
            "model.weights: its image processor flips channels, shifts or resizes in a way that preprocess cannot "
            "express; wrap the model with kind factory."
        )
    size = processor.get("size") if processor.get("do_resize") else None
    if not size:
        return None
    edge = size.get("shortest_edge")
    resize = edge or (size["height"], size["width"])
    cropped = processor.get("crop_size") if processor.get("do_center_crop") else None
    crop = (cropped["height"], cropped["width"]) if cropped else None
    if edge and processor.get("crop_pct"):
        # ConvNeXT: below 384 the image is resized to edge / crop_pct and cropped, from 384 on it is stretched.
        resize, crop = (int(edge / processor["crop_pct"]), (edge, edge)) if edge < 384 else ((edge, edge), None)
    return PreprocessConfig(resize=resize, crop=crop, interpolation=cast(Interpolation, filter_name))


def _load_digits(config: ModelConfig) -> Loaded:
    from pipeline.models.digits import CLASSES, WEIGHTS, DigitsNet

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
        if module is None:
            # As with `python -m`: a module in the working folder counts, which a console script's path lacks.
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(where)
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
