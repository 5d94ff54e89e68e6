"""Model: a frozen classifier of uint8 images, whatever library it came from.

It takes images in [0, 1] or their pixels and owns everything else: normalisation, eval mode, frozen parameters, memory
format, and how its classes meet the dataset's. Whether it is attacked or only looks makes no difference here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError, explained
from pipeline.core.own_code import naming_failure
from pipeline.models.label_space import LabelSpace

# The compiler gives up on code that it has met in so many forms, 8 by default; this code it meets with every model
# of a process, in two batch sizes.
COMPILED_FORMS = 256
# `preprocess.mode` of images by their channels.
MODES = {1: "L", 3: "RGB"}
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Model(nn.Module):
    """A frozen classifier of images in [0, 1], which it is given in the type of its first floating-point parameter.

    `classes` are the model's own class names, None where unknown; `digest` changes with the weights and with the user's
    own code that made it; `stated` says where its `mean` and its `std` come from, config or weights, and has no entry
    for what nobody states; `preprocess` is what its weights were published with, None where they say nothing; `key`,
    of its section in the config, and `files`, of the user's own code that made it, are for messages; `space`, how its
    classes meet the dataset's, is set once the dataset is known.

    Activations lie channels last, which every convolution measured liked better: on a CPU ResNet-20 at 32 px and
    ResNet-18 at 224 px gained 8 to 18%, and tensor cores want it.
    """

    mean: Tensor
    std: Tensor
    space: LabelSpace

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        classes: Sequence[str] | None = None,
        digest: str = "",
        stated: Mapping[str, str] | None = None,
        preprocess: PreprocessConfig | None = None,
        bf16: bool = False,
        key: str = "model",
        files: Sequence[str] = (),
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
        self.stated = stated or {}
        self.preprocess = preprocess
        self.bf16 = bf16
        self.key, self.files = key, files
        self.compiled = False
        self._differentiable: Callable[[Tensor], Tensor] = self._logits
        self._inferred: Callable[[Tensor], Tensor] = self._logits_of_pixels

    def unit(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to the model's floating type in [0, 1]."""
        return images_u8.to(self.mean.dtype).div_(255).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to logits (N, classes), in float32 or float64; a CodeError if the module fails."""
        with self.naming_failure():
            return self._differentiable(images)

    @torch.inference_mode()
    def predict(self, images_u8: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to logits (N, classes), where no gradient is wanted; a CodeError if the module fails."""
        with self.naming_failure():
            return self._inferred(images_u8)

    def naming_failure(self) -> contextlib.AbstractContextManager[None]:
        """As `own_code.naming_failure`, of its module."""
        return naming_failure(self.key, self.files)

    def _logits(self, images: Tensor) -> Tensor:
        mean, std = (_of_a_row(values, images) for values in (self.mean, self.std))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = _logits_of(self.module((images - mean).div_(std)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits_of_pixels(self, images_u8: Tensor) -> Tensor:
        return self._logits(self.unit(images_u8))

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile both ways through the model; the first calls, within this context, do the work.

        Where no gradient is wanted the weights are frozen into the code (batch norm into convolutions, casts
        done ahead): ResNet-20 in bf16 took 46 ms a chunk as it is, 40 compiled, 30 compiled and frozen. If
        the context fails the model runs as it is.
        """
        import torch._dynamo.config as dynamo  # the compiler takes a second to import
        import torch._inductor.config as inductor

        # On a CPU: code that is called from C++ lets go of the GIL; called from Python, one lane holds up the others.
        options: dict[str, Any] = {"cpp_wrapper": True} if self.mean.device.type == "cpu" else {}

        def compiled(function: Callable[[Tensor], Tensor], freezing: bool) -> Callable[[Tensor], Tensor]:
            run = torch.compile(function, dynamic=False, options=options)

            def call(images: Tensor) -> Tensor:
                # Settings of the compiler do not reach other threads, so they are made for each call; as an option of
                # torch.compile `freezing` does not reach the tracer.
                with dynamo.patch(recompile_limit=COMPILED_FORMS), inductor.patch(freezing=freezing):
                    return run(images)

            return call

        self._differentiable = compiled(self._logits, freezing=False)
        self._inferred = compiled(self._logits_of_pixels, freezing=True)
        try:
            yield
            self.compiled = True
        except BaseException:
            self._differentiable, self._inferred = self._logits, self._logits_of_pixels
            raise

    def count_classes(self, shape: tuple[int, int, int], *, attacked: bool = True) -> int:
        """The number of classes, found by running one black image of that (C, H, W), C 1 or 3, forward and back.

        A model that is not attacked need not let a gradient through.

        Raises:
            ConfigError: the model or its mean or std does not take such images, or the model does not return logits or
                lets no gradient through.
        """
        failed = f"model: it does not take images of shape {shape} (channels, height, width)"
        try:
            with explained(failed, kind=ConfigError):  # the model is the user's code
                image = self.unit(self._black_image(shape)).requires_grad_()
                logits = self._differentiable(image)
        except ConfigError as error:
            channels, *size = shape
            (other,) = MODES.keys() - {channels}
            if not self._takes((other, *size)):
                self._check_normalisation(channels)
                raise
            raise ConfigError(
                f"model: it takes images in mode {MODES[other]}, and these are in mode {MODES[channels]}; set "
                f"preprocess.mode: {MODES[other]}."
            ) from error
        if logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
            raise ConfigError(
                f"model: it returned a tensor of shape {tuple(logits.shape)}; logits (images, classes) "
                "of two classes or more are needed."
            )
        if attacked and not (
            logits.requires_grad and torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
        ):
            raise ConfigError("model: no gradient reaches its input; does it run under torch.no_grad or detach?")
        return int(logits.shape[1])

    def _check_normalisation(self, channels: int) -> None:
        """Refuse, by a ConfigError, a mean or a std of neither one value nor one for each channel.

        Those that were published with the weights are right, and the images are of the wrong mode.
        """
        for key, values in (("mean", self.mean), ("std", self.std)):
            if self.stated.get(key) != "weights" and values.numel() not in (1, channels):
                raise ConfigError(
                    f"model.{key}: it has {values.numel()} values; give one, or one for each channel, of which "
                    f"images in mode {MODES[channels]} have {channels}."
                )

    def _takes(self, shape: Sequence[int]) -> bool:
        """Whether it makes logits of a black image of that (C, H, W)."""
        with contextlib.suppress(Exception), torch.no_grad():  # whatever the user's code raises
            self._logits_of_pixels(self._black_image(shape))
            return True
        return False

    def _black_image(self, shape: Sequence[int]) -> Tensor:
        """One image of that (C, H, W), (1, C, H, W) uint8."""
        return torch.zeros((1, *shape), dtype=torch.uint8, device=self.mean.device)


def _of_a_row(values: Tensor, images: Tensor) -> Tensor:
    """A value for each channel, (1, C or 1, 1, 1), as one for each value of a row of the images, (1, C, 1, W).

    Channels lie last. PyTorch would go through three values at a time beside three of them, 6 times as long.
    """
    row = values.expand(-1, images.shape[1], -1, images.shape[3])
    return row.contiguous(memory_format=torch.channels_last)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """The type that a module's images must have: whole numbers and 8-bit floats store weights, and compute nothing."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.dtype in INPUT_DTYPES), torch.float32)


def _logits_of(output: Any) -> Tensor:
    """The logits of what a module returned: a tensor, or `logits` of the mapping or object that it wraps them in."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"model: it returned an object of type {type(output).__name__}; return the logits alone, a tensor (images, "
            'classes), or as "logits" of a dict or .logits of an object.'
        )
    if not logits.is_floating_point():
        raise ConfigError(f"model: it returned {logits.dtype} values; logits are floating-point numbers.")
    return logits
