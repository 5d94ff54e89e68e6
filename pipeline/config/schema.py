"""The config: frozen models, every key checked before anything is opened.

Sources, models and attacks have kinds, and each kind its own section (`kinds.py` lists them): what is here is what all
kinds have, and the sections without kinds. Settings travel as arguments from here on; nothing reads the environment.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.config.kinds import BITS, LAYOUTS
from pipeline.config.section import Count, Section, anchored, home
from pipeline.core.addresses import check_address, is_address
from pipeline.core.epsilon import epsilon_level
from pipeline.core.errors import require_file
from pipeline.core.variants import ID, Variant, make_variants, plain_id

# Pixels of an image: of a source unless runtime.max_pixels says otherwise, and of a dataset in any case, as a manifest
# that others wrote is believed in what shape its images have.
MOST_PIXELS = 100_000_000
# Images in [0, 1] have a std of 0.5 at most. Four grey levels, the least that photographs could have, are above it too.
MOST_STD = 4


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _check_split(name: str) -> str:
    # Split names become file names and Hub split names, so slices such as `train[:10%]` cannot pass.
    if not re.fullmatch(r"\w+([.-]\w+)*", name):
        raise ValueError(f"{name!r} is not a split name; to take a part of a split use source.limit")
    return name


Splits = tuple[Annotated[str, AfterValidator(_check_split)], ...]


class SourceConfig(Section):
    """Where images come from: what every kind has."""

    kind: str
    """Where the images come from."""
    split: Annotated[Splits | None, BeforeValidator(_as_tuple, json_schema_input_type=str | Splits | None)] = None
    """The splits to read: a name or a list of names. Left out: the only split; of `digits` both; of
    `torchvision` train.

    An image folder without split folders is one split. `split` names it; left out, it is called `train`."""
    shuffle: bool = True
    """Whether images are stored in a random order that follows from `runtime.seed`. False, and always with
    `streaming`: in the source's own order."""
    limit: Count | None = None
    """How many images to take of each split: the first of its order. Left out: all."""

    @model_validator(mode="after")
    def _check_splits(self) -> "SourceConfig":
        if self.split is not None and (not self.split or len(set(self.split)) < len(self.split)):
            raise ValueError("split needs at least one name, each once")
        return self

    @property
    def streams(self) -> bool:
        """Whether its rows are read in the source's own order, and nothing is downloaded ahead."""
        return False

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns that are carried through unchanged."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of its classes, where the source has none."""
        return None

    @property
    def folder(self) -> Path | None:
        """Its path, if that may be a folder of this machine."""
        return None


def _check_size(value: Any) -> Any:
    if value is None:
        return None
    sides = value if isinstance(value, list | tuple) else [value]
    if (sides is value and len(sides) != 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"got {value!r}; allowed: a positive whole number, or [height, width]")
    return int(value) if isinstance(value, int) else tuple(sides)


Size = Annotated[int | tuple[int, ...] | None, BeforeValidator(_check_size)]


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class PreprocessConfig(Section):
    """Resize, then centre crop, with torchvision's meaning; `resize: 256` is the shorter side."""

    resize: Size = None
    """The size that images are resized to: one number for the shorter side, or [height, width]. Left out: no resizing,
    or what the model's published weights say."""
    crop: Size = None
    """The size that is cut out of the centre: one number for a square, or [height, width]. Left out: no crop, or what
    the model's published weights say."""
    interpolation: Interpolation = "bilinear"
    """How pixels are interpolated when images are resized."""
    mode: Literal["RGB", "L"] = "RGB"
    """RGB for 3 channels, L for grayscale with 1 channel. All images are converted to it."""

    @property
    def fixes_size(self) -> bool:
        """Whether every image comes out at one size, whatever size it had."""
        return self.crop is not None or isinstance(self.resize, tuple)


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a mean and a std that cannot be those of images in [0, 1], by a ValueError that begins with the key."""
    for key, values, sensible, allowed in (
        ("mean", mean, lambda value: 0 <= value <= 1, "lie in [0, 1]"),
        # 1/255 gives the model grey levels, and 1 leaves images as they are.
        ("std", std, lambda value: 0 < value <= MOST_STD, f"be above 0 and at most {MOST_STD}"),
    ):
        if values == () or not all(map(sensible, values or ())):
            raise ValueError(
                f"{key} is {list(values or ())}, and its values must {allowed}, as images are given to the model in "
                "[0, 1]; divide by 255 what is in grey levels"
            )


class ModelConfig(Section):
    """A model: what every kind has."""

    kind: str
    """Who makes the model."""
    weights: str | None = None
    """The trained weights: a .safetensors, .pt or .pth file, or for `torchvision`, `timm` and `transformers` the name
    of published ones. Left out: untrained weights that follow from `runtime.seed`, or for `digits` its own."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from images in [0, 1] before the model sees them: one value, or one for each channel. Left
    out: what the published weights say, else 0."""
    std: tuple[float, ...] | None = None
    """What images are divided by after `mean` is subtracted. Left out: what the published weights say, else 1."""
    label_map: dict[str | int, str | int] | Literal["identity"] | None = None
    """The model's class for each class of the dataset, by name or index: {cat: 281, dog: 207}. `identity`: class i of
    the dataset is class i of the model. Needed where the two differ in number or order."""
    title: str | None = None
    """The model's name for people, in the report and the card. It changes no image. You can change it later and run
    `generate` again. Left out: its id."""

    @classmethod
    def anchor(cls, values: dict[str, Any], folder: Path) -> None:
        if isinstance(weights := values.get("weights"), str) and is_checkpoint(weights):
            values["weights"] = anchored(weights, folder)

    @property
    def checkpoint(self) -> Path | None:
        """The file that its weights are in; None of published weights, and of an untrained model."""
        return home(self.weights) if self.weights is not None and is_checkpoint(self.weights) else None

    def check_paths(self) -> None:
        if self.checkpoint is not None:
            require_file(self.checkpoint, "model.weights")

    @property
    def call(self) -> tuple[str | None, Mapping[str, Any]]:
        """The name of what makes the module, and its keyword arguments; None where the kind is one model."""
        return None, {}

    @property
    def own_code(self) -> str | None:
        """The callable of the user's own that a run of this config calls; None without one."""
        return None

    @field_validator("label_map", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for part in (*value, *value.values()):
                if isinstance(part, bool):
                    raise ValueError(f"YAML reads an unquoted yes or no as {part}; put class names in quotes")
        return value

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        check_normalisation(self.mean, self.std)
        if self.label_map == {}:
            raise ValueError("label_map is empty; name each class of the dataset, or leave the key out")
        return self


class NamedModelConfig(ModelConfig):
    """A model that a library, or the user's own code, makes by its name."""

    name: str
    """The model's name in its library: `resnet50`; for `transformers` a Hub id or a folder; for `factory` a callable of
    your own, `package.module:callable` or `path/to/file.py:callable`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for what makes the model."""

    @property
    def call(self) -> tuple[str | None, Mapping[str, Any]]:
        return self.name, self.kwargs


class AttackConfig(Section):
    """How the images at each epsilon are made: what every kind has."""

    kind: str = "fgsm"
    """The attack."""
    epsilons: tuple[str | Annotated[float, Field(strict=True)], ...] = Field(min_length=1)
    """The epsilons, a list: the most that any pixel value may move. Whole grey levels such as 8/255, or decimals in
    [1/255, 1]. Each makes one set of attacked images."""
    label: Literal["dataset", "prediction"] = "dataset"
    """The class whose loss is raised: the dataset's label, or what the model predicts for the clean image. With
    `prediction` the images do not give the label away, and none is needed."""
    target: str | Annotated[int, Field(strict=True)] | None = None
    """A class whose loss is lowered instead: `least_likely`, `random`, or a class by name or index. Left out: no
    target."""
    rounding: Literal["down", "nearest"] = "down"
    """How a decimal epsilon becomes a whole number of grey levels. `down` never exceeds what was asked for."""
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Ids of the models that are attacked. Left out: all. The others only predict."""

    # Whether it follows a model's gradient, or answers.
    asks_model: ClassVar[bool] = True

    def attacked(self, models: Sequence[str]) -> tuple[str | None, ...]:
        """The models that it attacks: its own, or all `models` of the run, by their ids; (None,) where it asks none."""
        if not self.asks_model:
            return (None,)
        return tuple(models) if self.models is None else self.models

    @property
    def own_code(self) -> str | None:
        """The class of the user's own that a run of this config calls; None without one."""
        return None

    @property
    def reads(self) -> tuple[Path, ...] | None:
        return () if self.own_code is None else None

    @property
    def identity(self) -> dict[str, Any]:
        """What of the kind and its settings decides the bytes of a run."""
        return {"kind": self.kind}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the attack's class is made with."""
        return {}

    @property
    def title(self) -> str:
        """The attack's name for people."""
        return self.kind.upper()

    @property
    def how(self) -> str:
        """What it does, for the card, after "The attack": by one step along the sign of the gradient."""
        return ""

    # The paper, as BibTeX.
    paper: ClassVar[str] = ""

    @model_validator(mode="after")
    def _check_levels(self) -> "AttackConfig":
        requested: dict[int, str | float] = {}
        for epsilon in self.epsilons:
            level = epsilon_level(epsilon, self.rounding)
            if level in requested:
                raise ValueError(
                    f"epsilons: {requested[level]} and {epsilon} are both stored as {level}/255; keep one of them"
                )
            requested[level] = epsilon
        return self

    @property
    def requested(self) -> dict[int, str | float]:
        """Stored grey level -> the epsilon as it was asked for, by rising level."""
        return dict(sorted((epsilon_level(epsilon, self.rounding), epsilon) for epsilon in self.epsilons))

    @property
    def levels(self) -> tuple[int, ...]:
        """The stored epsilons in grey levels, rising, each in 1..255."""
        return tuple(self.requested)


def _refuse_jpeg(value: Any) -> Any:
    if str(value).lower() in ("jpeg", "jpg"):
        raise ValueError(
            "JPEG is lossy: the stored pixels would differ from the attacked ones and leave the epsilon ball; "
            "use auto, webp or png, which are lossless"
        )
    return value


# A type checker cannot know what a registry holds.
if TYPE_CHECKING:
    LayoutName = str
else:
    LayoutName = Literal[tuple(LAYOUTS)]


class OutputConfig(Section):
    """Where the dataset goes, and in what form."""

    path: str
    """The folder of the dataset, relative to the working directory, or an address such as s3://bucket/name."""
    layout: LayoutName = "images"
    """What a row is: an image at one epsilon (`images`), a source image with a column for each epsilon (`wide`), or a
    source image and its signs (`signs`). From signs every epsilon follows, and they take the least space; only `fgsm`
    and `noise` can be stored so."""
    sign_format: Literal["picture", "bits"] = "picture"
    """How layout `signs` stores signs: as lossless pictures, or as packed bits, which need no image codec."""
    image_format: Annotated[Literal["auto", "webp", "png"], BeforeValidator(_refuse_jpeg)] = "auto"
    """The lossless format of stored images. `auto`: WebP, or PNG for grayscale and for very large images."""
    images_per_shard: Count = 4096
    """Source images in a shard, the unit that is written, resumed and given to a worker."""
    title: str | None = None
    """The dataset's name for people, in the report and the card. It changes no image. You can change it later and run
    `generate` again. Left out: the source's name and the attacks."""

    @field_validator("path")
    @classmethod
    def _usable(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("an output needs a name: the working directory itself is not overwritten")
        if is_address(path):
            check_address(path)
        elif path.startswith("~") and home(path) == Path(path):
            raise ValueError(f"{path!r} names no user of this machine")
        return path

    @model_validator(mode="after")
    def _check_sign_format(self) -> "OutputConfig":
        if "sign_format" in self.model_fields_set and f"{self.layout}-bits" not in BITS:
            raise ValueError(f"sign_format: layout {self.layout} stores no sign maps; leave the key out")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default of a key that there was not always, so that run ids from before it still hold."""
        return {key: value for key, value in serialize(self).items() if (key, value) != ("sign_format", "picture")}

    @property
    def kind(self) -> str:
        """What the registry calls the layout as the rest of the section has it."""
        return self.layout if self.sign_format == "picture" else f"{self.layout}-{self.sign_format}"


def _check_gpus(value: Any) -> Any:
    if value == "auto":
        return value
    number = not isinstance(value, bool) and isinstance(value, int | float)
    # Of infinity and of what is no number the remainder is no number either.
    if not number or value < 0 or not (value <= 1 or value % 1 == 0):
        raise ValueError(f"got {value!r}; allowed: auto, a share of a GPU from 0 to 1, or a whole number")
    return float(value)


class RayConfig(Section):
    """What the Ray executor asks of a cluster; nothing of it enters the run id."""

    workers: Count | Literal["auto"] = "auto"
    """Workers at once. `auto`: as many as the cluster has room for."""
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_check_gpus)] = "auto"
    """GPUs of each worker: a whole number, or a share such as 0.5 to put two workers on one. `auto`: 1, or 0 without
    GPUs."""
    cpus_per_worker: Count | Literal["auto"] = "auto"
    """CPUs of each worker. `auto`: an even share of the node's."""


class RuntimeConfig(Section):
    """How the run uses the machine."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the models run. `auto`: the first of cuda, mps and cpu that the machine has."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """The arithmetic of the models. tf32 needs an NVIDIA GPU from Ampere on."""
    batch_size: Count = 256
    """Images that are read and computed together. Halved before the run until it fits into the GPU's memory."""
    workers: Annotated[int, Field(ge=0, strict=True)] | Literal["auto"] = "auto"
    """Threads of each process that read and decode images. `auto`: follows from the number of cores."""
    processes: Count | Literal["auto"] = "auto"
    """Processes of this machine that share the work. `auto`: in a long run on a CPU as many as cores and memory allow,
    else one. It changes no image."""
    compile: Literal["auto"] | Annotated[bool, Field(strict=True)] = "auto"
    """Whether models are compiled with torch.compile. `auto`: where the run is long enough to gain from it."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Decides all that is random: the order of images, random attacks, untrained weights."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do with an image that cannot be decoded: skip it and list it, or end the run."""
    max_skipped: float = Field(default=0.01, ge=0, le=1)
    """The share of skipped images, 0 to 1, above which the run fails."""
    max_pixels: Count = MOST_PIXELS
    """Images with more pixels than this are not decoded."""
    ray: RayConfig = RayConfig()
    """What each worker of `--executor ray` is given. It changes no image."""


class Config(Section):
    """One run.

    There is `model`, or `models` by id; `attack`, or `attacks` by id. `all_models` and `all_attacks` are both forms.
    `load.parse_config` makes one: it checks each section that has kinds as that of its kind, which has more keys.
    """

    source: SerializeAsAny[SourceConfig]
    """Where the images come from."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """The size and mode that images are given before the attack. What is stored has this size."""
    model: SerializeAsAny[ModelConfig] | None = None
    """The model that is attacked. For several, use `models`."""
    models: dict[str, SerializeAsAny[ModelConfig]] = Field(default_factory=dict)
    """Several models in place of `model`, each under an id of yours. Each predicts every image."""
    attack: SerializeAsAny[AttackConfig] | None = None
    """How images are attacked. For several attacks, use `attacks`."""
    attacks: dict[str, SerializeAsAny[AttackConfig]] = Field(default_factory=dict)
    """Several attacks in place of `attack`, each under an id of yours."""
    output: OutputConfig
    """Where the dataset goes, and in what form."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How the run uses the machine."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        self._check_ids()
        if self.output.image_format == "webp" and self.preprocess.mode == "L":
            raise ValueError("output.image_format: webp has no grayscale mode; use png or auto with preprocess.mode: L")
        device, gpus = self.runtime.device, self.runtime.ray.gpus_per_worker
        if (device == "cuda" and gpus == 0) or (device in ("cpu", "mps") and gpus not in ("auto", 0)):
            raise ValueError(f"runtime.ray: gpus_per_worker {gpus:g} does not go with runtime.device {device}")
        if self.preprocess.mode == "RGB":
            self._check_channels()
        for key, size in (("resize", self.preprocess.resize), ("crop", self.preprocess.crop)):
            height, width = size if isinstance(size, tuple) else (size or 0, size or 0)
            if height * width > self.runtime.max_pixels:
                raise ValueError(f"preprocess.{key}: {width}x{height} is more than runtime.max_pixels allows")
        return self

    def _check_ids(self) -> None:
        for one, several, values in (("model", self.model, self.models), ("attack", self.attack, self.attacks)):
            if (several is None) == (not values):
                raise ValueError(
                    f"{one} and {one}s: a config has one of them" if values else f"{one} is missing from the config"
                )
            for index, name in enumerate(values):
                if not re.fullmatch(ID, name):
                    raise ValueError(
                        f"{one}s: got the id {name!r}; allowed: up to 64 letters, digits and underscores, a letter "
                        "first"
                    )
                # Folders and columns are called by them, and some file systems and databases do not tell case.
                if twice := [other for other in [*values][:index] if other.lower() == name.lower()]:
                    raise ValueError(f"{one}s: the ids {twice[0]} and {name} differ in case alone; rename one")
        titles = [model.title or name for name, model in self.all_models.items()]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"models: two of them are called {twice[0]!r}; give each a title of its own")
        for name, attack in self.all_attacks.items():
            key, models = f"{self.key('attack', name)}.models", attack.models or ()
            if unknown := [model for model in models if model not in self.all_models]:
                raise ValueError(f"{key}: there is no model {unknown[0]!r}; there are {', '.join(self.all_models)}")
            if twice := [model for model in models if models.count(model) > 1]:
                raise ValueError(f"{key} names {twice[0]} twice")
        self._check_names()

    def _check_names(self) -> None:
        """Refuse ids that make one name of two."""
        pairs: dict[str, str] = {}
        unasked: dict[tuple[str, int], str] = {}
        for variant in self.variants[1:]:
            made = f"attack {variant.attack} on model {variant.model}"
            # Databases do not tell case in names of columns.
            other = pairs.setdefault(variant.pair.lower(), made)
            if other != made:
                raise ValueError(
                    f"attacks: {other} and {made} would both be called {variant.pair} in names of columns; rename one"
                )
            if variant.attack is not None and variant.model is None:
                kind = self.all_attacks[variant.attack].kind
                twin = unasked.setdefault((kind, variant.level), variant.attack)
                if twin != variant.attack:
                    raise ValueError(
                        f"attacks: {twin} and {variant.attack} are both {kind} at {variant.level}/255, and would be "
                        "the same images; keep one"
                    )

    def key(self, section: str, name: str) -> str:
        """The key of a model or an attack by its id, for messages; `section` is `model` or `attack`."""
        return section if getattr(self, section) is not None else f"{section}s.{name}"

    @property
    def all_models(self) -> dict[str, ModelConfig]:
        """The models by id, in order; the first also looks at what is of no model."""
        return self.models or (
            {} if self.model is None else {plain_id(self.model.call[0] or self.model.kind): self.model}
        )

    @property
    def all_attacks(self) -> dict[str, AttackConfig]:
        """The attacks by id, in order."""
        return self.attacks or ({} if self.attack is None else {plain_id(self.attack.kind): self.attack})

    def with_models(self, models: Mapping[str, ModelConfig]) -> "Config":
        """The same with other models under the same ids."""
        changed = {"models": dict(models)} if self.model is None else {"model": next(iter(models.values()))}
        return self.model_copy(update=changed)

    @property
    def needs_labels(self) -> bool:
        """Whether a row without a label is an error."""
        following = [attack for attack in self.all_attacks.values() if attack.asks_model]
        return not following or any(attack.label == "dataset" for attack in following)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is stored of every image, clean first."""
        models = tuple(self.all_models)
        return make_variants(
            {name: (attack.attacked(models), attack.levels) for name, attack in self.all_attacks.items()}
        )

    def _check_channels(self) -> None:
        for name, model in self.all_models.items():
            for key, values in (("mean", model.mean), ("std", model.std)):
                if values is not None and len(values) not in (1, 3):
                    raise ValueError(
                        f"{self.key('model', name)}.{key}: {len(values)} values, and RGB images have 3 channels; "
                        "give 3 or 1"
                    )


def is_checkpoint(weights: str) -> bool:
    """Whether `model.weights` names a checkpoint file rather than published weights."""
    return weights.endswith((".safetensors", ".pt", ".pth"))
