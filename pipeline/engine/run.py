"""A run: everything the config leaves open decided once, and the identity that decides the bytes.

`open_run` opens the source and the victim, fits them together and resolves every `auto`. The manifest keeps
the outcome, so that a resumed run decides nothing anew.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch

from pipeline import __version__
from pipeline.attacks.base import Attack, Goal
from pipeline.attacks.load import LoadedAttack, load_attack
from pipeline.config.schema import Config, ModelConfig, PreprocessConfig
from pipeline.core.addresses import is_address
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import WEBP_MAX_SIDE, ImageFormat, choose_format
from pipeline.core.lanes import chunk_images
from pipeline.core.plan import Plan
from pipeline.core.variants import Variant
from pipeline.engine.compute import (
    Attacker,
    check_attack,
    check_model,
    compile_victim,
    fit_batch_size,
    rehearse,
    repays,
)
from pipeline.engine.loader import Reader, Shape, find_shape
from pipeline.engine.scores import contents_of
from pipeline.layouts.base import Layout, make_features, subsets_of
from pipeline.layouts.registry import LAYOUTS
from pipeline.models.base import Model
from pipeline.models.label_space import LabelSpace
from pipeline.models.load import load_model
from pipeline.output.folder import name_edition
from pipeline.output.manifest import ON_RAY, Manifest, Space, StreamedFile, identity_of, plan_of, run_id_of
from pipeline.sources.base import Source
from pipeline.sources.registry import open_source

ModelSection = TypeVar("ModelSection", bound=ModelConfig)

logger = logging.getLogger(__name__)

# Images of the source that a model is looked at with: so many, or as many as have so many values.
SAMPLE_IMAGES, SAMPLE_VALUES = 64, 64 * 3 * 224 * 224

PACKAGES = ("torch", "torchvision", "datasets", "pyarrow", "pillow", "numpy")
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
    """An opened run: its resolved config and everything made from it."""

    config: Config
    source: Source
    plan: Plan
    reader: Reader
    attack: Attack
    victim: Model
    goal: Goal
    features: datasets.Features
    device: torch.device
    image_format: ImageFormat
    identity: dict[str, Any]
    asked_batch_size: int
    evaluators: Mapping[str, Model]
    generation: int

    @property
    def attacker(self) -> Attacker:
        """The attack on chunks of rows."""
        return make_attacker(self.config, self.attack, self.victim, self.goal, self.evaluators)

    @property
    def spaces(self) -> dict[str, LabelSpace]:
        """How the evaluators' classes translate, by their ids."""
        return {name: evaluator.space for name, evaluator in self.evaluators.items()}

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
        return LAYOUTS[self.config.output.layout]

    @property
    def stored(self) -> tuple[str, ...]:
        """The subsets that are stored, each a folder."""
        return subsets_of(self.layout, self.variants)

    @property
    def pictures(self) -> int:
        """How many pictures are stored of a source image."""
        return len(self.layout.pictures(self.variants))

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
            dataset_classes=self.victim.space.dataset_classes,
            **Space.of(self.victim.space).model_dump(),
            evaluators={name: Space.of(space) for name, space in self.spaces.items()},
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
    _check_apart(config)
    asked_batch_size = config.runtime.batch_size
    if recorded is not None:
        config = _take_over(config, recorded)
    device = choose_device(config.runtime.device, config.runtime.precision)
    loaded = load_attack(config.attack)
    if not loaded.attack.on_ray and LAYOUTS[config.output.layout].stores_sign:
        raise ConfigError(
            f"output.layout: {config.output.layout} stores one direction for all epsilons, and the images of "
            f"{config.attack.kind} do not lie along one; use layout images."
        )
    source = open_run_source(config)
    for left_out in source.left_out:
        logger.warning("Left out of the source: %s.", left_out)
    victim = load_run_model(config.model, config, device)
    preprocess = _preprocess(config.preprocess, victim.preprocess)
    plan = plan_of(config, source.splits, _streamed(source, config))
    shape: Shape
    if recorded is not None and config.source.streams:
        shape = recorded.shape  # no row is read of files that may be done
    else:
        shape = find_shape(source, plan, preprocess, config.runtime.max_pixels)
    victim.join(source, shape, config.model.label_map)
    goal = Goal(config.attack.label, attack_target(config, victim.space))
    evaluators = _open_evaluators(config, source, shape, device)
    attacker = make_attacker(config, loaded.attack, victim, goal, evaluators)
    reader = Reader(source, preprocess, config.runtime.max_pixels, shape, len(victim.space.dataset_classes))
    # A run that is resumed has decided; it compiles when it has something to write.
    compiled, batch_size = config.runtime.compile, plan.batch_size
    if recorded is None:
        _check_models(attacker, reader, plan)
        compiled, batch_size = _settle(attacker, device, shape, plan, config)
    plan = replace(plan, batch_size=batch_size)
    image_format = _image_format(config, shape)
    decided = {"device": device.type, "compile": compiled, "batch_size": batch_size}
    resolved = config.model_copy(
        update={
            "preprocess": preprocess,
            "model": _normalised(config.model, victim),
            "evaluators": tuple(_normalised(other, evaluators[other.id]) for other in config.evaluators),
            "output": config.output.model_copy(update={"image_format": image_format}),
            "runtime": config.runtime.model_copy(update=decided),
        }
    )
    return Run(
        config=resolved,
        source=source,
        plan=plan,
        reader=reader,
        attack=loaded.attack,
        victim=victim,
        goal=goal,
        features=make_features(
            LAYOUTS[config.output.layout],
            contents_of(resolved, victim.space, {name: other.space for name, other in evaluators.items()}, source.kept),
        ),
        device=device,
        image_format=image_format,
        identity=_identity(
            resolved, source, shape, loaded, victim, evaluators, chunk_images(device, plan.batch_size, shape)
        ),
        asked_batch_size=asked_batch_size,
        evaluators=evaluators,
        generation=generation if recorded is None else recorded.generation,
    )


def open_run_source(config: Config) -> Source:
    """The source of a run."""
    need_labels = config.attack.label == "dataset"
    return open_source(config.source, need_labels=need_labels, max_pixels=config.runtime.max_pixels)


def _preprocess(asked: PreprocessConfig, published: PreprocessConfig | None) -> PreprocessConfig:
    """What the weights were published with, where the config says nothing of sizes."""
    if published is None or asked.model_fields_set & {"resize", "crop", "interpolation"}:
        return asked
    return published.model_copy(update={"mode": asked.mode})


def make_attacker(
    config: Config, attack: Attack, victim: Model, goal: Goal, evaluators: Mapping[str, Model]
) -> Attacker:
    """The attack that a config describes, on chunks of rows."""
    return Attacker(attack, victim, goal, config.attack.levels, LAYOUTS[config.output.layout].stored, evaluators)


def _open_evaluators(config: Config, source: Source, shape: Shape, device: torch.device) -> dict[str, Model]:
    """Load the evaluators. They see the victim's images, so what their weights say of preprocessing is left aside."""
    evaluators = {}
    for other in config.evaluators:
        with naming_evaluator(other.id):
            evaluators[other.id] = load_run_model(other, config, device)
            evaluators[other.id].join(source, shape, other.label_map, attacked=False)
    return evaluators


def _check_models(attacker: Attacker, reader: Reader, plan: Plan) -> None:
    """Look once at what the models make of images of the source, and say what should be known.

    Raises:
        ConfigError: as `check_model`.
    """
    size = chunk_images(torch.device("cpu"), plan.batch_size, reader.shape)
    count = max(size, min(SAMPLE_IMAGES, SAMPLE_VALUES // math.prod(reader.shape)))
    images, labels = reader.sample(plan, count)
    if not len(images):
        return  # the run says which cannot be decoded
    images = images.to(attacker.victim.mean.device)

    def look(model: Model, goal: Goal | None, name: str) -> None:
        found: list[str] = []

        def attempt(size: int) -> None:
            found[:] = check_model(model, images, model.space.model_labels(labels).to(images.device), goal, size)

        fit_batch_size(attempt, size, quiet=True)
        for sentence in found:
            logger.warning("%s%s.", name, sentence)

    look(attacker.victim, attacker.goal, "")
    labels_of_victim = attacker.victim.space.model_labels(labels).to(images.device)
    fit_batch_size(lambda size: check_attack(attacker, images[:size], labels_of_victim[:size]), size, quiet=True)
    for name, other in attacker.evaluators.items():
        with naming_evaluator(name):
            look(other, None, f"evaluators, {name}: ")


@contextlib.contextmanager
def naming_evaluator(name: str) -> Iterator[None]:
    """Whatever cannot be used within is an evaluator's, not the victim's.

    Raises:
        ConfigError: as raised within, with the evaluator's id.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"evaluators, {name}: {error}") from error


def load_run_model(model: ModelConfig, config: Config, device: torch.device) -> Model:
    """A model of a run, in the run's precision.

    Raises:
        ConfigError: as `load_model`.
    """
    return load_model(model, seed=config.runtime.seed, device=device, bf16=config.runtime.precision == "bf16")


def _normalised(model: ModelSection, victim: Model) -> ModelSection:
    """A model's section with the mean and std that it came to have."""
    mean, std = (tuple(values.flatten().tolist()) for values in (victim.mean, victim.std))
    return model.model_copy(update={"mean": mean, "std": std})


def _streamed(source: Source, config: Config) -> dict[str, tuple[StreamedFile, ...]]:
    """The files that are the shards of a source, as a manifest records them; none where shards are cut otherwise."""
    files = source.files(config.output.images_per_shard)
    return {
        split: tuple(StreamedFile(path=name, cuts=None if cuts is None else tuple(cuts)) for name, cuts in own)
        for split, own in files.items()
    }


def _check_apart(config: Config) -> None:
    """The output must not become part of the source, which the next run would then read."""
    if is_address(config.output.path):
        return
    if config.source.folder is None:
        return
    source, output = config.source.folder.expanduser().resolve(), Path(config.output.path).expanduser().resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ConfigError(f"output.path: {output} lies in the source's own folder {source}; choose another place.")


def _take_over(config: Config, recorded: Manifest) -> Config:
    """Replace each `auto`, and a batch size that was halved, by what the run that is resumed decided."""
    then, runtime, output = recorded.resolved, config.runtime, config.output
    decided = {key: getattr(then.runtime, key) for key in ("device", "compile") if getattr(runtime, key) == "auto"}
    if runtime.batch_size == recorded.asked_batch_size:
        decided["batch_size"] = then.runtime.batch_size
    if output.image_format == "auto":
        output = output.model_copy(update={"image_format": then.output.image_format})
    return config.model_copy(update={"runtime": runtime.model_copy(update=decided), "output": output})


def _settle(attacker: Attacker, device: torch.device, shape: Shape, plan: Plan, config: Config) -> tuple[bool, int]:
    """Resolve `runtime.compile` and the batch size of a new run, by trying out what it will do.

    On a CPU chunks are small, and memory is not tried.

    Returns:
        Whether the victim is compiled, and the batch size that fits.

    Raises:
        ConfigError: compilation was asked for, and fails; or not even one image fits.
    """
    wanted = config.runtime.compile
    compiles = repays(device, plan.total or 0) if wanted == "auto" else wanted

    def attempt(size: int) -> None:
        nonlocal compiles
        if compiles:
            try:
                compile_victim(attacker, device, shape, size)
            except PipelineError as error:
                if wanted != "auto":
                    raise ConfigError(f"runtime.compile: {error}; leave the key out, or set it to false.") from error
                logger.warning("%s; the run goes on without.", error)
                compiles = False
        if device.type != "cpu":
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
    if wanted == "auto":
        return choose_format(*shape)
    if wanted == "webp" and max(shape[1:]) > WEBP_MAX_SIDE:
        raise ConfigError(
            f"output.image_format: webp holds at most {WEBP_MAX_SIDE} pixels a side, and these images are "
            f"{shape[2]}x{shape[1]}; use png."
        )
    return wanted


def attack_target(config: Config, space: LabelSpace) -> Any:
    """The attack's target as `Goal` wants it: a class becomes the model's index."""
    target = config.attack.target
    if target is None or target in ("least_likely", "random"):
        return target
    return int(np.flatnonzero(space.to_recorded == space.recorded_index(target))[0])


def _identity(
    config: Config,
    source: Source,
    shape: Shape,
    attack: LoadedAttack,
    victim: Model,
    evaluators: Mapping[str, Model],
    chunk: int,
) -> dict[str, Any]:
    """What decides the bytes: what the manifest says elsewhere too, and what only the source and the models tell."""
    models = {"model": victim} | {f"evaluators.{name}": other for name, other in evaluators.items()}
    return {
        **identity_of(
            config,
            split_rows=source.splits,
            streamed=_streamed(source, config),
            shape=shape,
            dataset_classes=victim.space.dataset_classes,
            label_maps={name: model.space.to_model.tolist() for name, model in models.items()},
        ),
        "source.content": source.digest,
        **({"attack.content": attack.digest} if attack.digest else {}),
        **({} if attack.attack.on_ray else {ON_RAY: False}),
        "runtime.chunk": chunk,
        **{f"{name}.content": model.digest for name, model in models.items()},
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How two identities differ, for a person: `key (value there, value here)`."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "; ".join(f"{key} ({_short(there.get(key))} there, {_short(here.get(key))} here)" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def versions(device: torch.device) -> dict[str, str]:
    """What besides the config can change last digits: packages, processors and settings of the math libraries.

    Not the number of cores: a lane has one. The keys depend on the type of the device alone, so that those of two
    sessions can be compared.
    """
    name = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {
        "python": platform.python_version(),
        "fgsm-pipeline": __version__,
        **{package: importlib.metadata.version(package) for package in PACKAGES},
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
