"""A run: everything the config leaves open decided once, and the identity that decides the bytes.

`open_run` opens the source and the victim, fits them together and resolves every `auto`. The manifest keeps
the outcome, so that a resumed run decides nothing anew.
"""

import functools
import importlib.metadata
import logging
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from pipeline import __version__
from pipeline.attacks.base import Attack, Goal
from pipeline.attacks.load import LoadedAttack, load_attack
from pipeline.config.check import check_paths, named, naming, with_key
from pipeline.config.schema import Config, PreprocessConfig
from pipeline.core.errors import CodeError, ConfigError, PipelineError
from pipeline.core.images import MAX_SIDE, ImageFormat, choose_format
from pipeline.core.lanes import chunk_images
from pipeline.core.plan import Plan
from pipeline.core.variants import Variant
from pipeline.engine.compute import Attacker, ModelAttack, compile_models, fit_batch_size, rehearse, worth_compiling
from pipeline.engine.loader import Reader, Shape, find_shape
from pipeline.engine.model_check import check_attack, check_model
from pipeline.engine.scores import contents_of
from pipeline.layouts.base import Layout, make_features, subsets_of
from pipeline.layouts.registry import LAYOUTS
from pipeline.models.base import Model
from pipeline.models.label_space import LabelSpace, join_labels
from pipeline.models.load import load_model
from pipeline.output.folder import RunWarning, name_edition
from pipeline.output.manifest import ON_RAY, Manifest, Space, StreamedFile, identity_of, plan_of, run_id_of
from pipeline.output.settings import take_over
from pipeline.sources.base import Source
from pipeline.sources.registry import open_source

logger = logging.getLogger(__name__)

# Images of the source that a model is looked at with: so many, or as many as have so many values.
SAMPLE_IMAGES, SAMPLE_VALUES = 64, 64 * 3 * 224 * 224

PACKAGES = ("torch", "torchvision", "datasets", "pyarrow", "pillow", "numpy", "imagecodecs")
# Environment variables by which the math libraries choose other kernels, whose sums run in another order.
MATH_SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    *(f"{library}_{name}" for library in ("ONEDNN", "DNNL") for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS")),
    *(f"{library}_DEFAULT_FPMATH_MODE" for library in ("ONEDNN", "DNNL")),
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# How the names of a CPU's vector and matrix instructions begin, as PyTorch calls them.
VECTOR_UNITS = ("amx", "avx", "bf16", "dot", "fma", "i8mm", "neon", "sme", "sve")


@dataclass(frozen=True)
class Run:
    """An opened run: its resolved config and everything made from it.

    models: by id, the first of which looks at what is of no model. attacks: in the order of the variants. warnings:
    what was said of its models when it began; None of a run that is resumed.
    """

    config: Config
    source: Source
    plan: Plan
    reader: Reader
    models: Mapping[str, Model]
    attacks: tuple[ModelAttack, ...]
    features: datasets.Features
    device: torch.device
    image_format: ImageFormat
    identity: dict[str, Any]
    asked_batch_size: int
    generation: int
    warnings: tuple[RunWarning, ...] | None

    @property
    def attacker(self) -> Attacker:
        """The attacks on chunks of rows."""
        return Attacker(self.models, self.attacks, self.layout.stored)

    @property
    def spaces(self) -> dict[str, LabelSpace]:
        """How the classes of the models translate, by their ids."""
        return {name: model.space for name, model in self.models.items()}

    @property
    def chunk(self) -> int:
        """Rows of a batch that are computed at once."""
        return chunk_images(self.device, self.plan.batch_size, self.reader.shape)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is stored of every image, clean first."""
        return self.config.variants

    @property
    def layout(self) -> Layout:
        """How its rows are stored."""
        return LAYOUTS[self.config.output.kind]

    @property
    def stored(self) -> tuple[str, ...]:
        """The subsets that are stored, each a folder."""
        return subsets_of(self.layout, self.variants)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The columns of the pictures that are stored of a source image, one for each."""
        return tuple(picture.column for picture in self.layout.pictures(self.variants))

    @property
    def run_id(self) -> str:
        """A digest of what decides the bytes, 16 hex digits."""
        return run_id_of(self.identity)

    @property
    def edition(self) -> str:
        """What ends the names of its files."""
        return name_edition(self.run_id, self.generation)

    def manifest(self) -> Manifest:
        """The manifest before anything is written."""
        return Manifest(
            run_id=self.run_id,
            generation=self.generation,
            config=self.config.model_dump(mode="json"),
            identity=self.identity,
            versions=versions(self.device),
            origin=self.source.origin,
            left_out=self.source.left_out,
            features=self.features.to_dict(),
            dataset_classes=next(iter(self.spaces.values())).dataset_classes,
            spaces={name: Space.of(space) for name, space in self.spaces.items()},
            shape=self.reader.shape,
            split_rows=dict(self.source.splits),
            streamed=_streamed(self.source, self.config),
            asked_batch_size=self.asked_batch_size,
        )


def open_run(config: Config, recorded: Manifest | None = None, generation: int = 0) -> Run:
    """Open the source and the victim, check that they fit, and resolve every `auto`.

    Args:
        config: as the user wrote it.
        recorded: the manifest of the run that is resumed; its resolved values are taken over.
        generation: of a run that begins; see `Manifest.generation`.

    Raises:
        ConfigError: anything the config names is missing or does not fit.
    """
    check_paths(config)
    asked_batch_size = config.runtime.batch_size
    if recorded is not None:
        config = take_over(config, recorded)
    device = choose_device(config.runtime.device, config.runtime.precision)
    loaded = load_attacks(config)
    logger.info("Opening the source %s.", getattr(config.source, "path", config.source.kind))
    source = open_run_source(config)
    for left_out in source.left_out:
        logger.warning("Left out of the source: %s.", left_out)
    models = {}
    for name, section in config.all_models.items():
        logger.info("Loading the model %s.", section.call[0] or section.kind)
        models[name] = load_run_model(name, config, device)
    preprocess = _preprocess(config.preprocess, models)
    plan = plan_of(config, source.splits, _streamed(source, config))
    shape: Shape
    if recorded is not None and config.source.streams:
        shape = recorded.shape  # no row is read of files that may be done
    else:
        shape = find_shape(source, plan, preprocess, config.runtime.max_pixels)
    attacked = {variant.model for variant in config.variants}
    for name, model in models.items():
        with naming(config, "model", name):
            count, label_map = model.count_classes(shape, attacked=name in attacked), config.all_models[name].label_map
            model.space = join_labels(source.classes, source.labels, model.classes, count, label_map)
    spaces = {name: model.space for name, model in models.items()}
    attacks = make_attacks(config, {name: each.attack for name, each in loaded.items()}, spaces)
    layout = LAYOUTS[config.output.kind]
    attacker = Attacker(models, attacks, layout.stored)
    classes = next(iter(spaces.values())).dataset_classes
    reader = Reader(source, preprocess, config.runtime.max_pixels, shape, len(classes))
    # A run that is resumed has decided; it compiles when it has something to write.
    compiled, batch_size = config.runtime.compile, plan.batch_size
    warnings = None
    if recorded is None:
        warnings = (*_warn_unstated(config, models), *_check_models(config, attacker, reader, plan))
        compiled, batch_size = _resolve_compile(attacker, device, shape, plan, config)
    plan = replace(plan, batch_size=batch_size)
    image_format = _image_format(config, shape)
    decided = {"device": device.type, "compile": compiled, "batch_size": batch_size}
    resolved = _resolved(config, models, preprocess, image_format, decided)
    return Run(
        config=resolved,
        source=source,
        plan=plan,
        reader=reader,
        models=models,
        attacks=attacks,
        features=make_features(layout, contents_of(resolved, spaces, source.kept)),
        device=device,
        image_format=image_format,
        identity=_identity(resolved, source, shape, loaded, models, chunk_images(device, plan.batch_size, shape)),
        asked_batch_size=asked_batch_size,
        generation=generation if recorded is None else recorded.generation,
        warnings=warnings,
    )


def load_attacks(config: Config) -> dict[str, LoadedAttack]:
    """Load the attacks of a config, by their ids.

    Raises:
        ConfigError: as `load_attack`, or the layout cannot hold the images of one.
    """
    loaded, variants = {}, config.variants
    for name, section in config.all_attacks.items():
        with naming(config, "attack", name):
            loaded[name] = load_attack(section)
        own = [variant for variant in variants if variant.attack == name]
        fits = [one for one, layout in LAYOUTS.items() if all(len(layout.source(v, variants)) == 1 for v in own)]
        if not loaded[name].attack.on_ray and config.output.layout not in fits:
            raise ConfigError(
                f"output.layout: {config.output.layout} does not store each image, and those of {section.kind} "
                f"({config.key('attack', name)}) cannot be made from others, as they do not lie along one direction; "
                f"use layout {' or '.join(fits)}."
            )
    return loaded


def open_run_source(config: Config) -> Source:
    """The source of a run.

    Raises:
        ConfigError, PipelineError: as `open_source`.
    """
    try:
        return open_source(config.source, need_labels=config.needs_labels, max_pixels=config.runtime.max_pixels)
    except ConfigError as error:
        # What needs labels has another key where there are several attacks.
        raise ConfigError(with_key(str(error), config, "attack", next(iter(config.all_attacks)))) from error


def _preprocess(asked: PreprocessConfig, models: Mapping[str, Model]) -> PreprocessConfig:
    """Where the config has no sizes, those that come with the weights of the first model that has some."""
    published = next((model.preprocess for model in models.values() if model.preprocess), None)
    if published is None or asked.model_fields_set & {"resize", "crop", "interpolation"}:
        return asked
    return published.model_copy(update={"mode": asked.mode})


def make_attacks(
    config: Config, loaded: Mapping[str, Attack], spaces: Mapping[str, LabelSpace]
) -> tuple[ModelAttack, ...]:
    """The loaded attacks, each on one model, in the order of the variants; `spaces` are those of all models by id.

    Raises:
        ConfigError: a target is no class of the dataset or of a model.
    """
    made, classes = [], next(iter(spaces.values())).dataset_classes
    for name, section in config.all_attacks.items():
        for follows in section.attacked(tuple(spaces)):
            model = next(iter(spaces)) if follows is None else follows
            called = f"the model {model}" if len(spaces) > 1 else "the model"
            with naming(config, "attack", name):
                target: Any = section.target
                if target not in (None, "least_likely", "random"):
                    target = spaces[model].target_index(target, classes, called)
            key = config.key("attack", name)
            goal = Goal(section.label, target)
            made.append(ModelAttack(loaded[name], key, model, follows is not None, section.levels, goal))
    return tuple(made)


def _warn_unstated(config: Config, models: Mapping[str, Model]) -> list[RunWarning]:
    """Warn of trained models of which nobody says how their input is normalised, and return the warnings."""
    said = []
    for name, model in models.items():
        section = config.all_models[name]
        missing = [f"model.{key}" for key in ("mean", "std") if key not in model.stated]
        if missing and (section.weights is not None or section.own_code is not None):
            sentence = (
                f"{' and '.join(missing)}: neither the config nor what was published with the weights says how its "
                "input is normalised, so it is given images in [0, 1] as they are; set model.mean and model.std to "
                "what it was trained with (to [0.0] and [1.0] if it wants them so)"
            )
            said.append(RunWarning(text=with_key(sentence, config, "model", name), unstated=name))
            logger.warning("%s.", said[-1].text)
    return said


def _check_models(config: Config, attacker: Attacker, reader: Reader, plan: Plan) -> list[RunWarning]:
    """Look once at what the models make of images of the source, say what should be known, and return the warnings."""
    size = chunk_images(torch.device("cpu"), plan.batch_size, reader.shape)
    count = max(size, min(SAMPLE_IMAGES, SAMPLE_VALUES // math.prod(reader.shape)))
    images, labels = reader.sample(plan, count)
    said: list[RunWarning] = []
    if not len(images):
        return said  # the run says which cannot be decoded
    for name, model in attacker.models.items():
        attacks = [each for each in attacker.attacks if each.model == name]
        pixels = images.to(model.mean.device)
        own_labels = model.space.model_labels(labels).to(pixels.device)
        check = functools.partial(_look_at_attacks, model, attacks, pixels, own_labels)
        try:
            with naming(config, "model", name):
                found = _look(model, attacks, pixels, own_labels, size)
            for sentence in found:
                said.append(RunWarning(text=named(sentence, config, "model", name)))
                logger.warning("%s.", said[-1].text)
            fit_batch_size(check, size, quiet=True)
        except CodeError as error:
            raise ConfigError(f"{error} (images of the source, before the run)") from error
    return said


def _look(model: Model, attacks: Sequence[ModelAttack], images: Tensor, labels: Tensor, size: int) -> list[str]:
    """As `check_model`, of so many images at once as fit."""
    found: list[str] = []

    def look(size: int) -> None:
        goals = dict.fromkeys(each.goal for each in attacks if each.asks_model) or [None]
        found[:] = dict.fromkeys(said for goal in goals for said in check_model(model, images, labels, goal, size))

    fit_batch_size(look, size, quiet=True)
    return found


def _look_at_attacks(model: Model, attacks: Sequence[ModelAttack], images: Tensor, labels: Tensor, size: int) -> None:
    for each in attacks:
        check_attack(each, model, images[:size], labels[:size])


def load_run_model(name: str, config: Config, device: torch.device) -> Model:
    """A model of a run by its id, on a device, in the run's precision.

    Raises:
        ConfigError: as `load_model`.
    """
    with naming(config, "model", name):
        return load_model(
            config.all_models[name],
            seed=config.runtime.seed,
            device=device,
            bf16=config.runtime.precision == "bf16",
            key=config.key("model", name),
        )


def _resolved(
    config: Config,
    models: Mapping[str, Model],
    preprocess: PreprocessConfig,
    image_format: ImageFormat,
    runtime: Mapping[str, Any],
) -> Config:
    """A config with what was decided in place of each `auto`; `runtime` holds those of that section."""
    sections = {}
    for name, model in models.items():
        mean, std = (tuple(values.flatten().tolist()) for values in (model.mean, model.std))
        sections[name] = config.all_models[name].model_copy(update={"mean": mean, "std": std})
    return config.with_models(sections).model_copy(
        update={
            "preprocess": preprocess,
            "output": config.output.model_copy(update={"image_format": image_format}),
            "runtime": config.runtime.model_copy(update=runtime),
        }
    )


def _streamed(source: Source, config: Config) -> dict[str, tuple[StreamedFile, ...]]:
    """The files that are the shards of a source, as a manifest records them; none where shards are cut otherwise."""
    files = source.files(config.output.images_per_shard)
    return {
        split: tuple(StreamedFile(path=name, cuts=None if cuts is None else tuple(cuts)) for name, cuts in own)
        for split, own in files.items()
    }


def _resolve_compile(
    attacker: Attacker, device: torch.device, shape: Shape, plan: Plan, config: Config
) -> tuple[bool, int]:
    """Whether the models of a new run are compiled, and the batch size that fits, by trying out what it will do."""
    wanted = config.runtime.compile
    compiles = worth_compiling(device, plan.total or 0) if wanted == "auto" else wanted

    def attempt(size: int) -> None:
        nonlocal compiles
        if compiles:
            try:
                compile_models(attacker, device, shape, size)
            except PipelineError as error:
                if wanted != "auto":
                    raise ConfigError(f"runtime.compile: {error}; leave the key out, or set it to false.") from error
                logger.warning("%s; the run goes on without.", error)
                compiles = False
        if device.type != "cpu":  # there chunks are small, and fit
            rehearse(attacker, device, shape, size)

    size = fit_batch_size(attempt, plan.batch_size)
    return compiles, size


def choose_device(wanted: str, precision: str = "fp32") -> torch.device:
    """The device to compute on, set up so that equal inputs give equal bits.

    Args:
        wanted: `auto`, or the type of a device.
        precision: tf32 lets CUDA's matrix units round float32 to 10 bits of mantissa.

    Raises:
        ConfigError: the machine does not have it, or it does not have the precision.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, available in there.items() if available)
    if not there[wanted]:
        raise ConfigError(
            f"runtime.device: this machine has no {wanted} device; it has {', '.join(n for n in there if there[n])}."
        )
    if precision == "tf32" and (wanted != "cuda" or torch.cuda.get_device_capability()[0] < 8):
        raise ConfigError(f"runtime.precision: tf32 is a mode of CUDA devices from Ampere on; this is {wanted}.")
    if wanted == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size, which it reads when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Memory that the rehearsal gave back in small pieces is joined for the run, where PyTorch has not begun yet.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # The compiler times candidates and keeps the fastest, whose sums may run in another order the next time.
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        # fp32 means fp32: cuDNN would use tf32 by default.
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written, and filling every new tensor costs bandwidth.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device(wanted)


def _image_format(config: Config, shape: tuple[int, int, int]) -> ImageFormat:
    wanted = config.output.image_format
    chosen = choose_format(*shape) if wanted == "auto" else wanted
    side = max(shape[1:])
    if side > MAX_SIDE[chosen]:
        instead = "use png" if side <= MAX_SIDE["png"] else "set preprocess.resize and preprocess.crop"
        raise ConfigError(
            f"output.image_format: {chosen} holds at most {MAX_SIDE[chosen]} pixels a side, and these images are "
            f"{shape[2]}x{shape[1]}; {instead}."
        )
    return chosen


def _identity(
    config: Config,
    source: Source,
    shape: Shape,
    attacks: Mapping[str, LoadedAttack],
    models: Mapping[str, Model],
    chunk: int,
) -> dict[str, Any]:
    """What decides the bytes: what the manifest says elsewhere too, and what only the source and the models tell."""
    found: dict[str, Any] = identity_of(
        config,
        split_rows=source.splits,
        streamed=_streamed(source, config),
        shape=shape,
        dataset_classes=next(iter(models.values())).space.dataset_classes,
        label_maps={name: model.space.to_model.tolist() for name, model in models.items()},
    )
    found |= {"source.content": source.digest, "runtime.chunk": chunk}
    found |= {f"models.{name}.content": model.digest for name, model in models.items()}
    for name, loaded in attacks.items():
        found |= {f"attacks.{name}.content": loaded.digest} if loaded.digest else {}
        found |= {} if loaded.attack.on_ray else {f"attacks.{name}.{ON_RAY}": False}
    return found


def versions(device: torch.device) -> dict[str, str]:
    """What besides the config can change last digits: packages, processors and settings of the math libraries.

    Not the number of cores: a lane has one. The keys depend on the type of the device alone, so that those of two
    sessions can be compared.
    """
    name = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {
        "python": platform.python_version(),
        "fgsm-pipeline": __version__,
        **_package_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        # Probabilities are computed here also where a GPU computes the logits.
        "cpu": _cpu(),
        "settings": " ".join(f"{name}={os.environ[name]}" for name in MATH_SETTINGS if name in os.environ) or "default",
    }
    if device.type == "cuda":
        found |= {
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": _driver(),
        }
    return found


@functools.cache
def _package_versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def _cpu() -> str:
    """The CPU's name, and what it can do of that by which PyTorch, oneDNN and MKL choose their kernels."""
    # PyTorch has this since some version after the lowest that we take.
    there: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    vectors = sorted(name for name, can in there.items() if can is True and name.startswith(VECTOR_UNITS))
    name = there.get("cpu_name") or platform.processor() or platform.machine()
    return " ".join([name, torch.backends.cpu.get_cpu_capability(), *vectors])


def _driver() -> str:
    """The version of NVIDIA's driver, which compiles kernels that a library brings for no such GPU."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    found = re.search(r"\d+(\.\d+)+", first)
    return found[0] if found else "unknown"
