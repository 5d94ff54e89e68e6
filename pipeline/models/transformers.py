"""Image classifiers of transformers, from the Hub or a folder; published weights bring classes and preprocessing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import model_validator

from pipeline.config.schema import Interpolation, NamedModelConfig, PreprocessConfig
from pipeline.config.section import anchored, is_there
from pipeline.core.errors import ConfigError, is_temporary
from pipeline.models.loaded import Loaded, import_extra, published_weights

# Without it transformers asks on a terminal whether to run the code of a repository.
NO_CODE = {"trust_remote_code": False}
# What makes it run code that the config does not name. (Weights are weights, whatever it says.)
REFUSED_KWARGS = ("trust_remote_code", "code_revision", "use_kernels", "kernel_config", "weights_only")


class TransformersConfig(NamedModelConfig):
    """An image classifier of transformers; `name` is an id of the Hub or a folder, and so is `weights`."""

    kind: Literal["transformers"]
    """An image classifier of transformers. It needs the extra `transformers`."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        super().anchor(values, folder)
        for key in ("name", "weights"):
            if isinstance(value := values.get(key), str) and is_there(folder / value):
                values[key] = anchored(value, folder)

    def check_paths(self) -> None:
        super().check_paths()
        for key, name in (("name", self.name), ("weights", published_weights(self) or "")):
            if name.startswith((".", "~", "/")) and not Path(name).is_dir():
                raise ConfigError(f"model.{key}: there is no folder {name}.")

    @property
    def reads(self) -> tuple[Path, ...] | None:
        folder = Path(published_weights(self) or self.name)
        if not folder.is_dir() or self.kwargs:
            return None
        return (folder,) if self.checkpoint is None else (folder, self.checkpoint)

    @model_validator(mode="after")
    def _check_kwargs(self) -> "TransformersConfig":
        for key in REFUSED_KWARGS:
            if key in self.kwargs:
                raise ValueError(
                    f"kwargs.{key} could run code that the config does not name; code of your own has kind factory"
                )
        if "/" in str(self.kwargs.get("attn_implementation")):
            raise ValueError("kwargs.attn_implementation names code on the Hub; choose eager or sdpa")
        return self


def load(config: TransformersConfig) -> Loaded:
    import torch

    transformers = import_extra("transformers")
    auto, name, wanted = transformers.AutoModelForImageClassification, config.name, published_weights(config)

    if wanted is None:
        made = transformers.AutoConfig.from_pretrained(name, **config.kwargs, **NO_CODE)
        return Loaded(auto.from_config(made, **NO_CODE))
    # Weights are often published in half precision, and transformers would keep it.
    options = {"dtype": torch.float32, **config.kwargs, **NO_CODE, "use_safetensors": True}
    transformers.utils.logging.disable_progress_bar()
    module, report = auto.from_pretrained(wanted, **options, output_loading_info=True)
    if report["missing_keys"]:
        raise ConfigError(
            f"model.weights: {wanted} has no weights for {', '.join(sorted(report['missing_keys']))}; "
            "it was not published as a classifier."
        )
    names: Mapping[int, str] = module.config.id2label
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(wanted, **NO_CODE).to_dict()
    except (OSError, ValueError) as error:
        if is_temporary(error):
            raise
        processor = {}  # weights without a processor say nothing of their input
    mean, std = _processor_statistics(processor) if processor else (None, None)
    return Loaded(
        module,
        classes=[names[index] for index in range(len(names))],
        mean=mean,
        std=std,
        preprocess=_processor_sizes(processor),
    )


def _processor_statistics(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """What a transformers image processor subtracts from images in [0, 1], and what it divides them by then."""
    # It does so to what its own rescaling gives, which may be grey levels.
    white = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1)
    mean = _channels(processor["image_mean"]) if processor.get("do_normalize") else [0.0]
    # EfficientNet divides images for a classifier once more.
    times = bool(processor.get("do_normalize")) + bool(processor.get("include_top"))
    std = [value**times for value in _channels(processor["image_std"])] if times else [1.0]
    return [value / white for value in mean], [value / white for value in std]


def _channels(values: float | Sequence[float]) -> list[float]:
    return [values] if isinstance(values, int | float) else [*values]


def _processor_sizes(processor: Mapping[str, Any]) -> PreprocessConfig | None:
    """A transformers image processor in torchvision's terms, None where it states no size."""
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
