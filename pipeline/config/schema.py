"""The config: YAML into frozen models, every key checked before anything is opened.

`load_config` is the way in: a file or the name of a shipped config, then `--set` overrides. Settings
travel as arguments from here on; nothing reads the environment.
"""

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.core.errors import ConfigError, first_line
from pipeline.core.own_code import names_file
from pipeline.core.redaction import find_secret, printable
from pipeline.core.variants import ID, Variant, make_variants, plain_id

# What a config may add up to, aliases written out, and how deep it may go: far more than any needs.
MOST_NODES, MOST_DEPTH = 100_000, 50
# Pixels of an image: of a source unless runtime.max_pixels says otherwise, and of a dataset in any case, as a manifest
# that others wrote is believed in what shape its images have.
MOST_PIXELS = 100_000_000
# Characters of a value that a message quotes, and of a message that quotes.
MOST_QUOTED, MOST_SAID = 200, 500
# What makes a library run code that the config does not name, by kind. (Weights are weights, whatever it says.)
REFUSED_KWARGS = {
    "transformers": ("trust_remote_code", "code_revision", "use_kernels", "kernel_config", "weights_only"),
}
# Images in [0, 1] have a std of 0.5 at most. Four grey levels, the least that photographs could have, are above it too.
MOST_STD = 4
# 0.0313725490 is 8/255 to ten decimals, yet 255 * 0.0313725490 = 7.999999995: decimals get this much slack.
LEVEL_SLACK = 1e-6


class Section(BaseModel):
    """A part of the config: unknown keys are errors, and a key without a value stands for its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        # Where None is the default it may mean something that leaving the key out does not: weights of digits.
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in fields or fields[key].get_default() is None
        }

    def _refuse_unread(self, kind: str, read: Sequence[str]) -> None:
        """Refuse keys that a kind does not read: whoever sets one expects something of it."""
        for key, field in type(self).model_fields.items():
            if field.is_required() or key in read:
                continue
            if getattr(self, key) != field.get_default(call_default_factory=True):
                raise ValueError(f"{key} has no effect with kind {kind}")


# Numbers are numbers: pydantic would take true for 1 and "256" for 256.
Count = Annotated[int, Field(gt=0, lt=2**63, strict=True)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _check_split(name: str) -> str:
    # Split names become file names and Hub split names, so slices such as `train[:10%]` cannot pass.
    if not re.fullmatch(r"\w+([.-]\w+)*", name):
        raise ValueError(f"{name!r} is not a split name; to take a part of a split use source.limit")
    return name


_EVERY_SOURCE = ("split", "shuffle", "limit")
SOURCE_KEYS = {
    "huggingface": (
        *("path", "name", "revision", "image_column", "label_column", "classes", "keep_columns", "streaming"),
        *_EVERY_SOURCE,
    ),
    "imagefolder": ("path", *_EVERY_SOURCE),
    "torchvision": ("path", "kwargs", "classes", *_EVERY_SOURCE),
    "digits": _EVERY_SOURCE,
}


class SourceConfig(Section):
    """Where images come from."""

    kind: Literal["huggingface", "imagefolder", "torchvision", "digits"]
    path: str | None = None
    name: str | None = None
    split: Annotated[tuple[Annotated[str, AfterValidator(_check_split)], ...] | None, BeforeValidator(_as_tuple)] = None
    revision: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    streaming: Annotated[bool, Field(strict=True)] = False
    shuffle: bool = True
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    keep_columns: tuple[str, ...] = ()
    limit: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.kind != "digits" and self.path is None:
            raise ValueError(f"path is missing: kind {self.kind} needs it")
        if self.split is not None and (not self.split or len(set(self.split)) < len(self.split)):
            raise ValueError("split needs at least one name, each once")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ValueError("keep_columns names a column twice")
        self._refuse_unread(self.kind, SOURCE_KEYS[self.kind])
        if self.streaming and self.shuffle:
            raise ValueError("shuffle has no effect with streaming, which reads the source in its own order")
        # Of a chain of fsspec's, such as simplecache::https://, any part.
        if re.search(r"https?://[^?#]*[?#]", str(self.path), re.IGNORECASE):
            raise ValueError(
                "path has a query in it, which manifest and card would show to everyone; give a URL that needs none"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _stream_in_order(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("streaming") is True:
            return {"shuffle": False, **values}
        return values


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
    crop: Size = None
    interpolation: Interpolation = "bilinear"
    mode: Literal["RGB", "L"] = "RGB"

    @property
    def fixes_size(self) -> bool:
        """Whether every image comes out at one size, whatever size it had."""
        return self.crop is not None or isinstance(self.resize, tuple)


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a mean and a std that cannot be those of images in [0, 1].

    Raises:
        ValueError: they cannot; the message begins with the key.
    """
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
    """The victim: the model that is attacked."""

    kind: Literal["torchvision", "timm", "transformers", "factory", "digits"]
    name: str | None = None
    weights: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    label_map: dict[str | int, str | int] | Literal["identity"] | None = None

    @property
    def own_code(self) -> str | None:
        """The callable of the user's own that a run of this config calls, as `name` has it; None without one."""
        return self.name if self.kind == "factory" else None

    @field_validator("label_map", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for part in (*value, *value.values()):
                if isinstance(part, bool):
                    raise ValueError(f"YAML reads an unquoted yes or no as {part}; put class names in quotes")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_weights(cls, values: Any) -> Any:
        # The digits victim ships with trained weights; `weights: null` still asks for an untrained one.
        if isinstance(values, dict) and values.get("kind") == "digits":
            return {"weights": "digits", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.kind != "digits" and self.name is None:
            raise ValueError(f"name is missing: kind {self.kind} needs it")
        if self.kind == "factory" and ":" not in str(self.name):
            raise ValueError(
                f"name {self.name!r} is not of the form package.module:callable or path/to/file.py:callable"
            )
        check_normalisation(self.mean, self.std)
        for key in REFUSED_KWARGS.get(self.kind, ()):
            if key in self.kwargs:
                raise ValueError(
                    f"kwargs.{key} could run code that the config does not name; code of your own has kind factory"
                )
        if "/" in str(self.kwargs.get("attn_implementation")) and self.kind == "transformers":
            raise ValueError("kwargs.attn_implementation names code on the Hub; choose eager or sdpa")
        if self.label_map == {}:
            raise ValueError("label_map is empty; name each class of the dataset, or leave the key out")
        if self.kind == "digits":
            self._refuse_unread("digits", ("weights", "mean", "std", "label_map"))
        return self


class EvaluatorConfig(ModelConfig):
    """One more model: its predictions on the victim's images are recorded in columns that bear its id."""

    id: str

    @field_validator("id")
    @classmethod
    def _fits_a_column(cls, name: str) -> str:
        if not re.fullmatch(ID, name):
            raise ValueError(f"got {name!r}; allowed: up to 64 letters, digits and underscores, a letter first")
        return name


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return value


class AttackConfig(Section):
    """How the images at each epsilon are made: by an attack of this package, or by a class of the user's own."""

    kind: str = "fgsm"
    epsilons: tuple[str | Annotated[float, BeforeValidator(_no_boolean)], ...] = Field(min_length=1)
    label: Literal["dataset", "prediction"] = "dataset"
    target: str | Annotated[int, Field(strict=True)] | None = None
    rounding: Literal["down", "nearest"] = "down"
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_kind(self) -> "AttackConfig":
        if self.kind != "fgsm" and not self.own_code:
            raise ValueError(f"kind: got {self.kind!r}; allowed: 'fgsm', or path/to/file.py:Attack")
        if not self.own_code:
            self._refuse_unread(self.kind, ("kind", "label", "target", "rounding"))
        return self

    @property
    def own_code(self) -> str | None:
        """The class of the user's own that a run of this config calls, `path/to/file.py:Attack`; None without one."""
        return self.kind if ":" in self.kind else None

    @property
    def title(self) -> str:
        """The attack's name for people: FGSM, or that of the user's own class."""
        return self.kind.rpartition(":")[2] if self.own_code else self.kind.upper()

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


def epsilon_value(epsilon: str | float) -> float:
    """An epsilon as a number: `k/255` or a decimal.

    Raises:
        ValueError: it is neither, or lies outside [1/255, 1].
    """
    if isinstance(epsilon, str):
        fraction = re.fullmatch(r"\s*(\d+)\s*/\s*255\s*", epsilon)
        if fraction:
            value = int(fraction[1]) / 255
        else:
            try:
                value = float(epsilon)
            except ValueError:
                raise ValueError(f"epsilons: {epsilon!r} is neither a number nor of the form k/255") from None
    else:
        value = float(epsilon)
    if math.isnan(value):
        raise ValueError(f"epsilons: {epsilon} is not a number")
    if value > 1:
        hint = f"; write {value:g}/255" if value <= 255 and "/" not in str(epsilon) else ""
        raise ValueError(f"epsilons: {epsilon} is above 1, and pixels run from 0 to 1{hint}")
    if 255 * value < 1 - LEVEL_SLACK:
        raise ValueError(f"epsilons: {epsilon} is below 1/255, the smallest step an 8-bit image can hold")
    return value


def epsilon_level(epsilon: str | float, rounding: str) -> int:
    """The epsilon on the 8-bit lattice, in grey levels 1..255.

    Rounding `down` keeps the image inside the ball asked for; `nearest` is there to compare with
    float papers.

    Raises:
        ValueError: as `epsilon_value`.
    """
    scaled = 255 * epsilon_value(epsilon)
    return math.floor(scaled + LEVEL_SLACK) if rounding == "down" else round(scaled)


def reading_levels(epsilons: Sequence[str | float]) -> list[int]:
    """Epsilons as a reader asks for them, in grey levels and in that order; 0 is clean.

    Raises:
        ConfigError: one cannot be stored, two are the same, or there is none.
    """
    if isinstance(epsilons, str) or not epsilons:
        raise ConfigError(f"epsilons: got {epsilons!r}; name them in a list, such as ['8/255'].")
    requested: dict[int, str | float] = {}
    for epsilon in epsilons:
        try:
            level = 0 if epsilon in (0, "0", "0/255") else epsilon_level(epsilon, "down")
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
        if level in requested:
            raise ConfigError(f"epsilons: {requested[level]} and {epsilon} are both {level}/255; keep one of them.")
        requested[level] = epsilon
    return list(requested)


def stored_just_below(epsilon: str | float) -> bool:
    """Whether an epsilon lies so little under a grey level that the next level was probably meant.

    0.031 is often written for 8/255, yet 255 * 0.031 = 7.905 stores 7.
    """
    missing = -(255 * epsilon_value(epsilon)) % 1
    return LEVEL_SLACK < missing <= 0.1


def _refuse_jpeg(value: Any) -> Any:
    if str(value).lower() in ("jpeg", "jpg"):
        raise ValueError(
            "JPEG is lossy: the stored pixels would differ from the attacked ones and leave the epsilon ball; "
            "use auto, webp or png, which are lossless"
        )
    return value


def is_address(path: str | Path) -> bool:
    """Whether an output lies in an object store, such as s3://bucket/prefix, rather than in a folder."""
    return "://" in str(path)


def check_address(address: str) -> None:
    """Refuse an address in an object store that can be none, without quoting what may be a secret.

    Raises:
        ValueError: it holds credentials, names no bucket, holds what would not be taken for a name by all who read from
            there, or is of a protocol that is no object store's.
    """
    protocol, _, place = address.partition("://")
    bucket = place.partition("/")[0]
    # A secret key may hold a slash, so that its address seems to have a host and a port.
    if ":" in bucket or ("@" in bucket and not protocol.startswith("abfs")) or "?" in place or "#" in place:
        raise ValueError(
            "the address holds more than a bucket and a prefix; write it as s3://bucket/prefix, and give credentials "
            "in the environment only, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if strange := re.search(r"[\s\"'`<>\\{}*\[\]]", place):
        raise ValueError(f"the address holds {strange[0]!r}; use letters, digits and . _ - / in it")
    if protocol in ("file", "local", "memory", "http", "https", "hf"):
        mend = "fgsm publish uploads a dataset to the Hub" if protocol == "hf" else "write a folder without a protocol"
        raise ValueError(f"{protocol}:// is no object store; {mend}")
    if not bucket:
        raise ValueError(f"{address} names no bucket; write it as {protocol}://bucket/prefix")


class OutputConfig(Section):
    """Where the dataset goes, and in what form."""

    path: str
    layout: Literal["images", "signs", "wide"] = "images"
    image_format: Annotated[Literal["auto", "webp", "png"], BeforeValidator(_refuse_jpeg)] = "auto"
    images_per_shard: Count = 4096

    @field_validator("path")
    @classmethod
    def _usable(cls, path: str) -> str:
        if is_address(path):
            check_address(path)
        elif path.startswith("~") and _home(path) == Path(path):
            raise ValueError(f"{path!r} names no user of this machine")
        return path


def _check_gpus(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= 1 or value % 1 == 0):
        raise ValueError(f"got {value!r}; allowed: auto, a share of a GPU from 0 to 1, or a whole number")
    if value < 0 or not math.isfinite(value):
        raise ValueError(f"got {value!r}; allowed: auto, a share of a GPU from 0 to 1, or a whole number")
    return float(value)


class RayConfig(Section):
    """What the Ray executor asks of a cluster; nothing of it enters the run id.

    workers: how many at once; gpus_per_worker, cpus_per_worker: what each is given.
    """

    workers: Count | Literal["auto"] = "auto"
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_check_gpus)] = "auto"
    cpus_per_worker: Count | Literal["auto"] = "auto"


class RuntimeConfig(Section):
    """How the run uses the machine."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    batch_size: Count = 256
    workers: Annotated[int, Field(ge=0, strict=True)] | Literal["auto"] = "auto"
    compile: Literal["auto"] | Annotated[bool, Field(strict=True)] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    on_error: Literal["skip", "fail"] = "skip"
    max_skipped: float = Field(default=0.01, ge=0, le=1)
    max_pixels: Count = MOST_PIXELS
    ray: RayConfig = RayConfig()


class Config(Section):
    """One run."""

    source: SourceConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    model: ModelConfig
    attack: AttackConfig
    evaluators: tuple[EvaluatorConfig, ...] = ()
    output: OutputConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, values: Any) -> Any:
        # Before anything else is checked, as a message quotes what it refuses.
        if where := find_secret(values):
            raise ValueError(
                f"{where} holds a credential, and a config is written into manifest.json, which is published; remove "
                "it, and log in with `hf auth login` or set HF_TOKEN or what the storage's client reads"
            )
        return values

    @model_validator(mode="after")
    def _check(self) -> "Config":
        ids = [evaluator.id for evaluator in self.evaluators]
        twice = next((name for name in ids if ids.count(name) > 1), None)
        if twice:
            raise ValueError(f"evaluators: two of them have the id {twice}; each needs its own")
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

    @property
    def attack_id(self) -> str:
        """What rows call the attack."""
        return plain_id(self.attack.kind)

    @property
    def model_id(self) -> str:
        """What rows call the model that is attacked."""
        return plain_id(self.model.name or self.model.kind)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is stored of every image, clean first."""
        return make_variants({self.attack_id: ([self.model_id], self.attack.levels)})

    def _check_channels(self) -> None:
        models = [("model", self.model), *((f"evaluators, {other.id}", other) for other in self.evaluators)]
        for name, model in models:
            for key, values in (("mean", model.mean), ("std", model.std)):
                if values is not None and len(values) not in (1, 3):
                    raise ValueError(f"{name}.{key}: {len(values)} values, and RGB images have 3 channels; give 3 or 1")


def packaged_configs() -> Path:
    """The folder of shipped configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def working_folder() -> Path | None:
    """The folder to which relative paths are relative, None where it was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def load_config(
    name: str, overrides: Sequence[str] = (), *, output: str | None = None, limit: int | None = None
) -> Config:
    """Read a config file, or a shipped config by its name, and apply overrides.

    Relative input paths in a file are relative to that file's folder; in a shipped config and in
    overrides to the working directory, as is `output.path` everywhere.

    Args:
        name: a path to a YAML file, or the stem of a file in `configs/`.
        overrides: `key=value`, dotted keys, YAML values; later ones win.
        output: overrides `output.path`.
        limit: overrides `source.limit`.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a key or value is not allowed.
    """
    path = Path(name)
    shipped = packaged_configs() / f"{name}.yaml"
    if path.is_file():
        raw = _anchor_inputs(_read_yaml(path), path.resolve().parent)
    elif shipped.is_file():
        raw = _read_yaml(shipped)
    else:
        names = ", ".join(sorted(file.stem for file in packaged_configs().glob("*.yaml")))
        raise ConfigError(f"There is no config file {name}, and no shipped config of that name (shipped: {names}).")
    for override in overrides:
        _override(raw, override)
    # What is still relative came from an override or a shipped config. Absolute paths let `verify --recompute`
    # find the model again from any folder.
    raw = _anchor_inputs(raw, working_folder() or Path("/the removed working folder"))
    if output is not None:
        _override_value(raw, "output.path", output)
    if limit is not None:
        _override_value(raw, "source.limit", limit)
    _check_recordable(raw)
    return parse_config(raw)


def _check_recordable(raw: Mapping[str, Any]) -> None:
    """Refuse a path whose bytes are no UTF-8: JSON, of which the manifest is, has no such text."""
    for section, keys in raw.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise ConfigError(
                    f"{section}.{key}: the path {printable(value)} is no UTF-8, and manifest.json cannot record it; "
                    "rename that file or folder."
                )


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a config that is already a mapping.

    Raises:
        ConfigError: a key or value is not allowed; one sentence that names the first such key.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(printable(_sentence(error))) from None
    except RecursionError:
        raise ConfigError(f"The config is nested too deep; {MOST_DEPTH} levels are more than any needs.") from None


class BoundedLoader(yaml.SafeLoader):
    """YAML of a bounded size and depth, aliases written out.

    Nine lines of aliases to aliases are a billion values to whoever merges, copies, prints or compares them.
    """

    most_nodes = MOST_NODES

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._count
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands within what it is an alias of")
        self._count += self._sizes[id(node)] if alias else 1
        if self._count > self.most_nodes:
            raise yaml.YAMLError(f"it holds more than {self.most_nodes:,} values")
        self._sizes[id(node)] = self._count - before
        return node


class _Loader(BoundedLoader):
    """A config's YAML: no key stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.YAMLError(f"the key {key.value} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = self.construct_scalar(node)
        if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
            raise yaml.YAMLError("a text holds a character that no path and no file may have")
        return str(text)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        number = self.construct_yaml_int(node)
        if abs(number) >= 2**63:
            raise yaml.YAMLError("a whole number has more than 64 bits")
        return int(number)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def _parse_yaml(text: str) -> Any:
    """A YAML text as values.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    # Dates, numbers and keys that cannot be: PyYAML passes on what Python says of them.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, LookupError) as error:
        raise ValueError(first_line(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ConfigError(f"{path} is not valid YAML: {_quoted(str(error))}.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of sections such as source, model and attack.")
    return raw


def _anchor_inputs(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative input paths of a config file relative to its folder."""
    source = raw.get("source")
    if isinstance(source, dict):
        path = source.get("path")
        # A Hub id looks like a relative path; it is one only if it says so or is there.
        if isinstance(path, str) and (
            source.get("kind") == "imagefolder"
            or (source.get("kind") == "huggingface" and (path.startswith((".", "~")) or _is_there(folder / path)))
        ):
            source["path"] = _anchored(path, folder)
        kwargs = source.get("kwargs")
        if isinstance(kwargs, dict) and isinstance(kwargs.get("root"), str):
            kwargs["root"] = _anchored(kwargs["root"], folder)
    attack = raw.get("attack")
    if isinstance(attack, dict) and isinstance(kind := attack.get("kind"), str) and names_file(kind):
        attack["kind"] = _anchored(kind, folder)
    evaluators = raw.get("evaluators")
    for model in (raw.get("model"), *(evaluators if isinstance(evaluators, list) else ())):
        if isinstance(model, dict):
            _anchor_model(model, folder)
    return raw


def _anchored(path: str, folder: Path) -> str:
    # An address stays as it is: as a path it would lose a slash, and a password in it would not be found.
    return path if is_address(path) else str(folder / _home(path))


def _home(path: str) -> Path:
    """A path with its ~ written out, if it is that of a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name
        return False


def _anchor_model(model: dict[str, Any], folder: Path) -> None:
    weights, name = model.get("weights"), model.get("name")
    if isinstance(weights, str) and is_checkpoint(weights):
        model["weights"] = _anchored(weights, folder)
    if isinstance(name, str) and (
        names_file(name) or (model.get("kind") == "transformers" and _is_there(folder / name))
    ):
        model["name"] = _anchored(name, folder)


def is_checkpoint(weights: str) -> bool:
    """Whether `model.weights` names a checkpoint file rather than published weights."""
    return weights.endswith((".safetensors", ".pt", ".pth"))


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {_quoted(override)}: write it as key=value, for example --set runtime.batch_size=64.")
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ConfigError(f"--set {_quoted(override)}: {_quoted(repr(text))} is not a YAML value.") from None
    _override_value(raw, key, value)


def _override_value(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if raw.get(section) is None:
            raw[section] = {}
        if not isinstance(raw[section], dict):
            raise ConfigError(f"--set {_quoted(key)}: {_quoted(section)} is not a section.")
        raw = raw[section]
    raw[last] = value


def _quoted(text: str, most: int = MOST_QUOTED) -> str:
    """What a message quotes, on one line and not too long for it."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[:most]}..."


def _sentence(error: ValidationError) -> str:
    """The first problem of a failed validation, as one sentence that names the key."""
    problem = error.errors(include_url=False)[0]
    # The config is sections of keys, and a list of sections; deeper parts of a location are branches of unions.
    deep = 3 if problem["loc"][:1] == ("evaluators",) else 2
    loc = [_quoted(str(part)) for part in problem["loc"][:deep]]
    location = ".".join(loc)
    kind, got = problem["type"], _quoted(repr(problem.get("input")))
    message = _quoted(problem["msg"].removeprefix("Value error, "), MOST_SAID)
    if kind == "extra_forbidden":
        section: Any = Config
        if len(loc) > 1:
            section = EvaluatorConfig if loc[0] == "evaluators" else Config.model_fields[loc[0]].annotation
        near = get_close_matches(loc[-1], section.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(section.model_fields)}."
        return f"{location} is an unknown key; {hint}"
    if kind == "missing":
        return f"{location} is missing from the config."
    if kind == "literal_error":
        return f"{location}: got {got}; allowed: {problem['ctx']['expected']}."
    if kind in ("model_type", "dict_type"):
        return f"{location} must be a mapping of keys (got {got})."
    if kind == "tuple_type":
        return f"{location} must be a list (got {got})."
    if kind == "value_error":
        # A section's own checks begin their message with the key.
        return f"{location}{'.' if len(loc) == deep - 1 else ': '}{message}." if loc else f"{message}."
    return f"{location}: {message} (got {got})."
