"""Victims: every kind is really loaded, from files that the tests make; what does not fit is one sentence."""

import importlib
import math
import pickle
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config.load import parse_config
from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError, TemporaryError
from pipeline.engine.decode import read_image
from pipeline.engine.run import open_run
from pipeline.models.base import Model
from pipeline.models.checkpoints import load_checkpoint
from pipeline.models.digits import DigitsConfig
from pipeline.models.digits_net import NETS
from pipeline.models.load import load_model
from pipeline.models.transformers import _processor_sizes
from pipeline.sources.digits import digits_split
from tests.conftest import FACTORY, REPOSITORY
from tests.support.attacks import attack_one
from tests.support.configs import section

CPU = torch.device("cpu")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(seed: int = 0, **config: Any) -> Model:
    return load_model(section("model", **config), seed=seed, device=CPU)


def refused(**config: Any) -> str:
    """The sentence of a model that cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        load(**config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.flatten().tolist())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return one.state_dict().keys() == state.keys() and all(
        torch.equal(value, state[key]) for key, value in one.state_dict().items()
    )


# --------------------------------------------------------------------------------------------- the wrapper


def test_every_grey_level_becomes_its_255th() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for dtype in (torch.float32, torch.float64):
        unit = Model(nn.Linear(1, 1, dtype=dtype)).unit(levels)
        assert unit.dtype == dtype
        expected = np.arange(256).astype(str(dtype).removeprefix("torch.")) / 255
        np.testing.assert_array_equal(unit.flatten().numpy(), expected.astype(unit.numpy().dtype))


def test_normalisation_is_inside() -> None:
    module = nn.Flatten()
    victim = Model(module, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.numpy() / 255 - mean) / std
    np.testing.assert_allclose(victim(victim.unit(images)).numpy(), expected.reshape(2, -1), rtol=0, atol=1e-6)
    # To the last bit as each value by itself, since signs and bytes follow from it.
    alone = (victim.unit(images).contiguous() - victim.mean) / victim.std
    assert torch.equal(victim(victim.unit(images)), alone.flatten(1))
    assert torch.equal(victim.predict(images), alone.flatten(1))
    plain = Model(module)
    np.testing.assert_allclose(plain(plain.unit(images)).numpy(), images.flatten(1).numpy() / 255, atol=1e-7)


def test_logits_are_float32_or_more_and_may_come_wrapped() -> None:
    images = torch.zeros((1, 1, 2, 2), dtype=torch.uint8)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        victim = Model(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=dtype)))
        assert victim(victim.unit(images)).dtype == expected
    for wrap in (
        lambda logits: SimpleNamespace(logits=logits, loss=None),
        lambda logits: {"loss": None, "logits": logits},
        lambda logits: namedtuple("Outputs", ["logits", "aux_logits"])(logits, 3),  # type: ignore[call-arg]
    ):
        wrapping = Model(Returning(wrap))
        assert wrapping(wrapping.unit(images)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([torch.arange(4), torch.zeros(2)], torch.float32),
        ([torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.float16)], torch.float16),
        ([torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.float64)], torch.float64),
        ([torch.zeros(2).to(torch.float8_e4m3fn), torch.zeros(2, dtype=torch.bfloat16)], torch.bfloat16),
        ([torch.zeros(2, dtype=torch.bool)], torch.float32),
        ([], torch.float32),
    ],
)
@pytest.mark.parametrize("buffers", [False, True])
def test_the_first_floating_type_decides(tensors: list[Tensor], expected: torch.dtype, buffers: bool) -> None:
    module = nn.Flatten()
    for index, tensor in enumerate(tensors):
        if buffers:
            module.register_buffer(f"b{index}", tensor)
        else:
            module.register_parameter(f"p{index}", nn.Parameter(tensor, requires_grad=False))
    victim = Model(module, mean=(0.5,), std=(0.25,))
    assert victim.unit(torch.zeros((1, 3, 2, 2), dtype=torch.uint8)).dtype == expected
    assert (victim.mean.item(), victim.std.item()) == (0.5, 0.25)


def test_channels_last_changes_the_layout_and_not_the_numbers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    before = net(images / 255)
    victim = Model(net)
    assert victim.unit(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(victim(victim.unit(images)), before)


def test_frozen_and_in_eval_mode() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    assert module.training, "the module arrives as constructors leave it"
    victim = Model(module)
    before = {key: value.clone() for key, value in victim.state_dict().items()}
    assert not any(part.training for part in victim.module.modules())
    assert not any(parameter.requires_grad for parameter in victim.parameters())

    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    first, second = (torch.stack(attack_one(victim, images, torch.arange(5) % 3).logits) for _ in range(2))
    assert torch.equal(first, second), "dropout would differ"
    for key, value in victim.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in victim.parameters())


class Returning(nn.Module):
    """Returns what a function makes of its pixels (N, values)."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, images: Tensor) -> Any:
        return self.made(images.flatten(1))


@pytest.mark.parametrize(
    ("module", "options", "shape", "named"),
    [
        (nn.Conv2d(2, 4, 3), {}, (1, 8, 8), r"\(1, 8, 8\) .*: "),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), {}, (3, 8, 8), r"\(3, 8, 8\) .*: "),
        (nn.LSTM(2, 5), {}, (1, 2, 2), r"\(1, 2, 2\) .*: "),
        (nn.Identity(), {}, (3, 2, 2), r"\(1, 3, 2, 2\); "),
        (nn.Flatten(0), {}, (3, 2, 2), r"\(12,\); "),
        (nn.Flatten(0, 1), {}, (3, 2, 2), r"\(3, 2, 2\); "),
        (nn.Unflatten(2, (2, 1)), {}, (3, 2, 2), r"\(1, 3, 2, 1, 2\); "),
        (Returning(lambda logits: (logits, logits)), {}, (3, 2, 2), "tuple;"),
        (Returning(lambda logits: [logits]), {}, (3, 2, 2), "list;"),
        (Returning(lambda logits: {"out": logits, "aux": 3}), {}, (3, 2, 2), "dict;"),
        (Returning(lambda _: {"logits": None}), {}, (3, 2, 2), "dict;"),
        (Returning(lambda logits: SimpleNamespace(scores=logits)), {}, (3, 2, 2), "SimpleNamespace;"),
        (Returning(lambda logits: logits.numpy(force=True)), {}, (3, 2, 2), "ndarray;"),
        (Returning(lambda _: None), {}, (3, 2, 2), "NoneType;"),
        (Returning(lambda logits: logits.long()), {}, (3, 2, 2), r"torch\.int64 "),
        (Returning(lambda logits: logits > 0), {}, (3, 2, 2), r"torch\.bool "),
        (Returning(lambda logits: logits + 1j), {}, (3, 2, 2), r"torch\.complex64 "),
        (Returning(lambda logits: logits[..., None, None]), {}, (3, 2, 2), r"\(1, 12, 1, 1\); "),
        (Returning(lambda logits: logits.T), {}, (3, 2, 2), r"\(12, 1\); "),
        (Returning(lambda logits: logits.detach()), {}, (3, 2, 2), "gradient"),
        # One class: nothing to confuse it with, and a gradient that is always zero.
        (nn.Flatten(), {}, (1, 1, 1), r"\(1, 1\); "),
    ],
)
def test_models_whose_classes_cannot_be_counted(
    module: nn.Module, options: dict[str, Any], shape: tuple[int, int, int], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^model: .*{named}") as caught:
        Model(module, **options).count_classes(shape)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "count"), [("mean", 2), ("std", 4)])
def test_a_mean_or_std_of_other_channels_is_named(key: str, count: int) -> None:
    options: dict[str, Any] = {key: (0.5,) * count}
    with pytest.raises(ConfigError, match=rf"^model\.{key}: "):
        Model(nn.Flatten(), **options).count_classes((3, 2, 2))


@pytest.mark.parametrize(
    ("module", "options", "shape", "mode"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), {}, (3, 8, 8), "L"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), {}, (1, 8, 8), "RGB"),
        (nn.Flatten(), {"mean": IMAGENET_MEAN}, (1, 8, 8), "RGB"),
    ],
)
def test_a_model_of_other_channels_names_the_mode_that_it_needs(
    module: nn.Module, options: dict[str, Any], shape: tuple[int, int, int], mode: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model: .* preprocess\.mode: {mode}\.$"):
        Model(module, **options).count_classes(shape)


def test_digits_that_are_not_grayscale_name_the_mode(tmp_path: Path) -> None:
    values = {
        "source": {"kind": "digits", "limit": 2},
        "preprocess": {"interpolation": "nearest"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["8/255"]},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(ConfigError, match=r"preprocess\.mode: L\.$"):
        open_run(parse_config(values))


def test_classes_are_counted() -> None:
    victim = Model(nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert victim.count_classes((3, 2, 2)) == 7


# ------------------------------------------------------------------------------------------------- factory


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package with the factory in a module of its own."""
    folder = tmp_path / "fgsm_test_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fgsm_test_package", "fgsm_test_package.nets"):
        # An earlier test's package of that name is elsewhere.
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "fgsm_test_package.nets"


def test_a_factory_in_a_file_and_in_a_module(factory_file: Path, package: str) -> None:
    victims = [load(kind="factory", name=f"{where}:make") for where in (factory_file, package)]
    for victim in victims:
        assert victim.count_classes((3, 16, 16)) == 3
        assert victim.classes is None
    assert same_weights(*victims), "the same code and seed"
    assert load(kind="factory", name=f"{factory_file}:make", kwargs={"classes": 5}).count_classes((3, 9, 9)) == 5
    # A class is a callable too.
    assert load(kind="factory", name=f"{package}:Net", kwargs={"channels": 1}).count_classes((1, 9, 9)) == 3


def test_an_untrained_model_comes_from_the_seed_alone(factory_file: Path) -> None:
    name = f"{factory_file}:make"
    state = torch.get_rng_state()
    first = load(3, kind="factory", name=name)
    assert torch.equal(torch.get_rng_state(), state), "the process's own random numbers are left alone"
    torch.rand(5)
    again = load(3, kind="factory", name=name)
    other = load(4, kind="factory", name=name)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("{folder}/missing.py:make", {}, " {folder}/missing.py"),
        ("{folder}/victim.py:missing", {}, "{folder}/victim.py .* missing"),
        ("{folder}/victim.py:not_callable", {}, "{folder}/victim.py .* not_callable"),
        ("{folder}/victim.py:torch.nn.ReLU", {}, "{folder}/victim.py .* torch.nn.ReLU"),
        ("{folder}/victim.py:make", {"colour": "red"}, ": .*'colour'"),
        ("{folder}/broken.py:make", {}, "{folder}/broken.py .*: .*'no_such_module'"),
        ("{folder}/syntax.py:make", {}, "{folder}/syntax.py .*: "),
        ("{folder}/odd.py:text", {}, "{folder}/odd.py:text .* str, .*torch.nn.Module"),
        ("{folder}/odd.py:fails", {}, "{folder}/odd.py:fails: the weather is bad$"),
        ("no_such_package.nets:make", {}, "no_such_package.nets "),
        ("math:sqrt", {"x": 4}, "math:sqrt"),
    ],
)
def test_factories_that_cannot_be_used(factory_file: Path, name: str, kwargs: dict[str, Any], named: str) -> None:
    folder = factory_file.parent
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "syntax.py").write_text("def make(:\n")
    (folder / "odd.py").write_text(
        "def text():\n    return 'a model'\n\n\ndef fails():\n    raise RuntimeError('the weather is bad\\nand cold')\n"
    )
    found = refused(kind="factory", name=name.format(folder=folder), kwargs=kwargs)
    assert re.match(rf"model(\.name)?: .*{named.format(folder=folder)}", found)


def test_a_file_that_failed_to_import_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("import no_such_module\n")
    assert "no_such_module" in refused(kind="factory", name=f"{path}:make")
    path.write_text(FACTORY)
    assert load(kind="factory", name=f"{path}:make").count_classes((3, 8, 8)) == 3


def test_a_factory_takes_checkpoints_only(factory_file: Path) -> None:
    found = refused(kind="factory", name=f"{factory_file}:make", weights="IMAGENET1K_V1")
    assert re.match(r"model\.weights: IMAGENET1K_V1 .*\.safetensors", found)


CALLABLES = """

import functools

partial = functools.partial(make, classes=4)
cached = functools.cache(make)


class Maker:
    def __call__(self):
        return Net()


maker = Maker()
"""


@pytest.mark.parametrize("attribute", ["partial", "cached", "maker"])
def test_any_callable_is_a_factory(tmp_path: Path, attribute: str) -> None:
    path = tmp_path / "callables.py"
    path.write_text(FACTORY + CALLABLES)
    victim = load(kind="factory", name=f"{path}:{attribute}")
    assert victim.count_classes((3, 8, 8)) == (4 if attribute == "partial" else 3)


# -------------------------------------------------------------------------------------------------- digest


def test_the_digest_follows_weights_and_code_and_not_paths(tmp_path: Path) -> None:
    def digest(folder: str, code: str, scale: float) -> str:
        path = tmp_path / folder
        path.mkdir()
        (path / "victim.py").write_text(code)
        module = load(kind="factory", name=f"{path}/victim.py:make")
        weights = {key: (value * scale).contiguous() for key, value in module.module.state_dict().items()}
        save_file(weights, path / "weights.safetensors")
        name, file = f"{path}/victim.py:make", f"{path}/weights.safetensors"
        return load(kind="factory", name=name, weights=file).digest

    first = digest("first", FACTORY, 1)
    assert digest("moved", FACTORY, 1) == first
    assert digest("scaled", FACTORY, 2) != first
    assert digest("activation", FACTORY.replace("tanh", "relu"), 1) != first


def test_the_digest_follows_the_code_of_a_decorated_factory(tmp_path: Path) -> None:
    """The decorator comes from another file, and the config names this one."""
    digests = set()
    for activation in ("tanh", "relu"):
        path = tmp_path / f"{activation}.py"
        path.write_text(FACTORY.replace("tanh", activation) + "\n\nmade = torch.no_grad()(make)\n")
        digests.add(load(kind="factory", name=f"{path}:made").digest)
    assert len(digests) == 2


# ---------------------------------------------------------------------------------------------- torchvision


def test_untrained_torchvision_models() -> None:
    def make(seed: int) -> Model:
        return load(seed, kind="torchvision", name="squeezenet1_1", kwargs={"num_classes": 4})

    state = torch.get_rng_state()
    victim = make(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert victim.count_classes((3, 32, 32)) == 4
    assert same_weights(victim, make(1))
    assert not same_weights(victim, make(2))
    assert (victim.classes, victim.preprocess) == (None, None)
    assert (rounded(victim.mean), rounded(victim.std)) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"name": "resnet51"}, "model: .* resnet51: "),
        ({"name": "resnet51", "weights": "IMAGENET1K_V1"}, "model: .* resnet51: "),
        (
            {"name": "resnet50", "weights": "IMAGENET1K_V3"},
            r"model\.weights: resnet50 .*IMAGENET1K_V3;.* IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT",
        ),
        ({"name": "resnet50", "weights": "weights.ckpt"}, r"model\.weights: .*weights\.ckpt;.* \.safetensors, \.pt"),
        ({"name": "squeezenet1_1", "kwargs": {"depth": 3}}, "model: .* squeezenet1_1: .*'depth'"),
    ],
)
def test_torchvision_models_that_cannot_be_made(config: dict[str, Any], named: str) -> None:
    assert re.match(named, refused(kind="torchvision", **config))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Random weights of SqueezeNet, where torchvision keeps those it has downloaded."""
    from torchvision import models

    weights = models.get_model_weights("squeezenet1_1")["IMAGENET1K_V1"]
    module: nn.Module = models.squeezenet1_1()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(module.state_dict(), folder / Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return module


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT"])
def test_published_torchvision_weights_bring_their_preprocessing(published: nn.Module, weights: str) -> None:
    victim = load(kind="torchvision", name="squeezenet1_1", weights=weights)
    assert same_weights(victim.module, published)
    assert victim.preprocess == PreprocessConfig(resize=256, crop=224, interpolation="bilinear")
    assert (rounded(victim.mean), rounded(victim.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    assert victim.classes is not None
    assert len(victim.classes) == victim.count_classes((3, 64, 64)) == 1000
    assert victim.classes[:2] == ("tench", "goldfish")


@pytest.mark.usefixtures("published")
def test_mean_and_std_of_the_config_win() -> None:
    mean = (0.5, 0.25, 0.125)
    victim = load(kind="torchvision", name="squeezenet1_1", weights="IMAGENET1K_V1", mean=mean)
    assert (rounded(victim.mean), rounded(victim.std)) == (mean, IMAGENET_STD)


# ----------------------------------------------------------------------------------------------------- timm


def test_timm_untrained_and_from_a_checkpoint(tmp_path: Path) -> None:
    config: dict[str, Any] = {"kind": "timm", "name": "test_vit", "kwargs": {"num_classes": 6, "img_size": 32}}
    victim = load(1, **config)
    assert victim.count_classes((3, 32, 32)) == 6
    assert victim.preprocess is None
    assert same_weights(victim, load(1, **config))
    other = load(2, **config)
    assert not same_weights(victim, other)
    state = {name: value.contiguous() for name, value in victim.module.state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")
    assert same_weights(victim, load(2, **config, weights=str(tmp_path / "vit.safetensors")))


@pytest.mark.parametrize("weights", ["r160_in1k", "test_resnet.r160_in1k"])
def test_pretrained_timm_weights_bring_their_preprocessing(tmp_path: Path, weights: str) -> None:
    import timm

    module = timm.create_model("test_resnet")
    path = tmp_path / "resnet.safetensors"
    save_file(module.state_dict(), path)
    # timm reads a file instead of the Hub where its own config says so.
    kwargs = {"pretrained_cfg_overlay": {"file": str(path)}}
    victim = load(kind="timm", name="test_resnet", weights=weights, kwargs=kwargs)
    assert same_weights(victim.module, module)
    assert (rounded(victim.mean), rounded(victim.std)) == ((0.5,) * 3, (0.5,) * 3)
    assert victim.preprocess == PreprocessConfig(resize=math.floor(160 / 0.95), crop=160, interpolation="bilinear")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"name": "resnet_51"}, "model: .* resnet_51: "),
        ({"name": "test_vit", "weights": "no_such_tag"}, "model: .* test_vit: .*no_such_tag"),
    ],
)
def test_timm_models_that_cannot_be_made(config: dict[str, Any], named: str) -> None:
    assert re.match(named, refused(kind="timm", **config))


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_an_extra_that_is_not_installed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    assert re.match(rf"model\.kind: {kind} .*'fgsm-pipeline\[{kind}\]'", refused(kind=kind, name="any"))


# --------------------------------------------------------------------------------------------- transformers

NAMES = {0: "cat", 1: "dog", 2: "eel"}


def tiny_vit() -> Any:
    import transformers

    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label=NAMES,
        label2id={name: index for index, name in NAMES.items()},
    )


@pytest.fixture
def vit(tmp_path: Path) -> tuple[Any, Path]:
    """A tiny vision transformer, and the folder it is saved in."""
    import transformers

    module = transformers.ViTForImageClassification(tiny_vit())
    folder = tmp_path / "vit"
    module.save_pretrained(folder)
    return module, folder


def preprocessing(processor: str, options: Mapping[str, Any], folder: Path) -> None:
    import transformers

    getattr(transformers, processor)(**options).save_pretrained(folder)


@pytest.mark.parametrize(
    ("processor", "options", "expected"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}, {"resize": (32, 48), "interpolation": "bilinear"}),
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
            {"resize": 40, "crop": (32, 32), "interpolation": "bicubic"},
        ),
        ("ViTImageProcessor", {"do_resize": False}, None),
        # What microsoft/resnet-50 and ConvNeXt come with: they resize to 224 / crop_pct, then crop to 224.
        (
            "ConvNextImageProcessor",
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
            {"resize": 256, "crop": 224, "interpolation": "bicubic"},
        ),
    ],
)
def test_transformers_weights_bring_their_preprocessing(
    vit: tuple[Any, Path], processor: str, options: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    module, folder = vit
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    preprocessing(processor, {**options, **statistics}, folder)
    victim = load(kind="transformers", name="vit", weights=str(folder))
    assert same_weights(victim.module, module)
    assert victim.classes == tuple(NAMES.values())
    assert victim.count_classes((3, 32, 32)) == 3
    assert (rounded(victim.mean), rounded(victim.std)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = victim.preprocess and victim.preprocess.model_dump(exclude_unset=True, exclude_none=True)
    # A square crop may be given as one side or as two.
    if found and found.get("crop") == (224, 224):
        found["crop"] = 224
    assert found == expected


def test_a_network_that_fails_is_no_missing_processor(vit: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def lost(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect") from ConnectionResetError()

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lost)
    with pytest.raises(TemporaryError, match=r"^model: "):
        load(kind="transformers", name="vit", weights=str(vit[1]))


def test_transformers_weights_without_normalisation_or_processor(vit: tuple[Any, Path]) -> None:
    _, folder = vit
    victim = load(kind="transformers", name="vit", weights=str(folder))
    assert (victim.preprocess, rounded(victim.mean), rounded(victim.std)) == (None, (0.0,), (1.0,))
    assert not victim.stated
    preprocessing("ViTImageProcessor", {"do_normalize": False, "size": {"height": 32, "width": 32}}, folder)
    victim = load(kind="transformers", name="vit", weights=str(folder))
    assert (rounded(victim.mean), rounded(victim.std)) == ((0.0,), (1.0,))
    assert victim.stated == {"mean": "weights", "std": "weights"}
    assert victim.preprocess is not None


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"do_normalize": False}),
        # Grey levels, from a mean of 128 on or as they are.
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [128.0] * 3, "image_std": [64.0] * 3}),
        ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
        ("EfficientNetImageProcessor", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        ("EfficientNetImageProcessor", {"include_top": False}),
        ("EfficientNetImageProcessor", {"do_normalize": False}),
    ],
)
def test_the_model_sees_what_its_image_processor_would_give_it(
    vit: tuple[Any, Path], processor: str, options: dict[str, Any]
) -> None:
    import transformers

    _, folder = vit
    made = getattr(transformers, processor)(**options, do_resize=False, do_center_crop=False)
    made.save_pretrained(folder)
    victim = load(kind="transformers", name="vit", weights=str(folder))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    seen = (victim.unit(images) - victim.mean) / victim.std
    theirs = made([*images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, theirs.float(), rtol=1e-5, atol=1e-4)


def test_published_statistics_that_cannot_be_are_refused(vit: tuple[Any, Path]) -> None:
    _, folder = vit
    preprocessing("ViTImageProcessor", {"image_mean": [123.675, 116.28, 103.53]}, folder)
    assert refused(kind="transformers", name="vit", weights=str(folder)).startswith("model.weights: ")


def test_untrained_transformers_models(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    config: dict[str, Any] = {"kind": "transformers", "name": str(tmp_path)}
    victim = load(1, **config)
    assert victim.count_classes((3, 32, 32)) == 3
    assert victim.preprocess is None
    assert same_weights(victim, load(1, **config))
    assert not same_weights(victim, load(2, **config))


def test_a_transformers_model_runs_in_single_precision(tmp_path: Path) -> None:
    """`runtime.precision: fp32` holds for weights that are stored in half precision."""
    import transformers

    module: Any = transformers.ViTForImageClassification(tiny_vit())
    module.half().save_pretrained(tmp_path)
    victim = load(kind="transformers", name="vit", weights=str(tmp_path))
    assert {parameter.dtype for parameter in victim.parameters()} == {torch.float32}


def test_transformers_weights_without_a_head_are_refused(tmp_path: Path) -> None:
    """transformers itself would go on with a random one."""
    import transformers

    transformers.ViTModel(tiny_vit(), add_pooling_layer=False).save_pretrained(tmp_path)
    assert "classifier.weight" in refused(kind="transformers", name="vit", weights=str(tmp_path))


# --------------------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize(("name", "right"), [(None, 0.97), ("strided", 0.95), ("pooled", 0.95), ("mlp", 0.95)])
def test_a_digits_net_reads_held_out_digits(name: str | None, right: float) -> None:
    model = load(kind="digits", name=name)
    side = NETS[name].side
    images, labels = digits_split("test")
    preprocess = PreprocessConfig(mode="L", resize=side)
    pixels = torch.stack([read_image(partial(Image.fromarray, image), preprocess, 64 * 64) for image in images])
    assert pixels.shape == (445, 1, side, side)
    assert (model.predict(pixels).argmax(1).numpy() == labels).mean() > right
    assert model.classes == tuple("0123456789")


def test_the_digits_nets_are_of_different_architecture_and_small() -> None:
    names = get_args(get_args(DigitsConfig.model_fields["name"].annotation)[0])
    assert {None, *names} == NETS.keys()
    layers = {tuple(type(layer) for layer in net.make().modules()) for net in NETS.values()}
    assert len(layers) == len(NETS)
    assert sum(net.weights.stat().st_size for net in NETS.values()) < 300_000


def test_a_digits_victim_may_be_untrained_or_have_other_weights(tmp_path: Path) -> None:
    trained = load(kind="digits")
    untrained = load(5, kind="digits", weights=None)
    assert not same_weights(trained, untrained)
    assert same_weights(untrained, load(5, kind="digits", weights=None))
    shutil.copy(NETS[None].weights, tmp_path / "copy.safetensors")
    assert same_weights(trained, load(kind="digits", weights=str(tmp_path / "copy.safetensors")))
    assert re.match(r"model\.weights: .* IMAGENET1K_V1;", refused(kind="digits", weights="IMAGENET1K_V1"))


def test_the_digits_nets_are_trained_without_the_held_out_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    script = importlib.import_module("train_digits")
    nets = {name: net._replace(weights=tmp_path / net.weights.name) for name, net in NETS.items()}
    read: list[tuple[str, int]] = []

    def recorded(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        read.append((split, len([*tmp_path.iterdir()])))
        return digits_split(split)

    monkeypatch.setattr(script, "digits_split", recorded)
    monkeypatch.setattr(script, "NETS", nets)
    monkeypatch.setattr(script, "EPOCHS", 1)
    script.main()
    # With every reading, how many nets were trained by then.
    assert read == [*(("train", count) for count in range(4)), *[("test", 4)] * 4]
    for net in nets.values():
        load_checkpoint(net.make(), net.weights)


# ---------------------------------------------------------------------------------------------- checkpoints

State = dict[str, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def prefixed(state: State, prefix: str = "module.") -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def without_counters(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        prefixed,
        without_counters,
        lambda state: {"state_dict": state, "epoch": 90, "arch": "resnet20"},
        lambda state: {"model": state, "optimizer": {"step": torch.zeros(1)}},
        lambda state: {"state_dict": prefixed(state)},
        lambda state: {"model": prefixed(state), "epoch": 3},
        lambda state: {"net": state, "acc": 93.1, "epoch": 7},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"net": state, "optimizer": {"step": torch.zeros(1)}, "teacher": prefixed({"x": torch.ones(1)})},
        lambda state: prefixed(state, "_orig_mod."),
        lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
        lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
        lambda state: {"state_dict": prefixed(state, "backbone.")},
    ],
    ids=[
        *("plain", "module.", "no counters", "state_dict", "model", "state_dict module.", "model module."),
        *("net", "model_state_dict", "two deep", "others that do not fit", "_orig_mod.", "averaged", "both"),
        "an attribute",
    ],
)
def test_checkpoints(tmp_path: Path, name: str, wrap: Callable[[State], Any]) -> None:
    trained, path = net(), tmp_path / name
    trained.get_buffer("1.running_mean").fill_(3)
    content = wrap(trained.state_dict())
    if path.suffix == ".safetensors":
        # These files hold tensors only, so there is nothing to nest them under.
        while not all(isinstance(value, Tensor) for value in content.values()):
            content = next(iter(content.values()))
        save_file(content, path)
    else:
        torch.save(content, path)
    module = net()
    assert not same_weights(module, trained)
    load_checkpoint(module, path)
    assert same_weights(module, trained)


def test_a_model_whose_own_names_begin_alike_keeps_them(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

    trained = Wrapper()
    for state in (trained.state_dict(), prefixed(trained.state_dict())):
        torch.save(state, tmp_path / "a.pt")
        module = Wrapper()
        load_checkpoint(module, tmp_path / "a.pt")
        assert same_weights(module, trained)


def circle() -> dict[str, Any]:
    content: dict[str, Any] = {"epoch": 3}
    content["itself"] = content
    return content


@pytest.mark.parametrize(
    ("content", "named"),
    [
        # Both could be meant, and neither is taken.
        (lambda state: {"model": state, "model_ema": state}, ["model, model_ema"]),
        (lambda state: {"state_dict": state, "state_dict_ema": prefixed(state)}, ["state_dict, state_dict_ema"]),
        (lambda state: {"a": {"x": state["0.bias"]}, "b": {"y": state["0.bias"]}}, ["a, b", "none"]),
        (lambda _: {"epoch": 3, "arch": "resnet20"}, ["'epoch', 'arch'"]),
        (lambda _: circle(), ["'epoch', 'itself'"]),
        # One alone is it, and what does not fit of it is said.
        (lambda state: {"net": prefixed({**state, "head": state["0.bias"]})}, [" head."]),
    ],
)
def test_a_checkpoint_that_leaves_open_what_is_meant(
    tmp_path: Path, content: Callable[[State], Any], named: list[str]
) -> None:
    torch.save(content(net().state_dict()), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"^model\.weights: ") as caught:
        load_checkpoint(net(), tmp_path / "a.pt")
    assert all(part in str(caught.value) for part in named)


def test_a_checkpoint_in_another_precision_is_converted(tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in without_counters(net().state_dict()).items()}, tmp_path / "a.pt")
    module = net()
    load_checkpoint(module, tmp_path / "a.pt")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_keys_that_do_not_fit_are_listed_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    state = net().state_dict()
    kept = {"1.bias": state["1.bias"], "3.weight": torch.zeros(7, 4), "0.bias": torch.zeros(9)}
    torch.save({**kept, **{f"head.{index}": torch.zeros(1) for index in range(6)}}, path)
    module = net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"^model\.weights: {path} ") as caught:
        load_checkpoint(module, path)
    missing, unexpected, others = str(caught.value).split("; ")
    assert missing.endswith(" 0.weight, 1.weight, 1.running_mean, 1.running_var, 3.bias")
    assert " head.0, head.1, head.2, head.3, head.4 and 1 " in unexpected
    assert others.endswith(" 0.bias, 3.weight.")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_weights_of_another_architecture_are_refused(tmp_path: Path, factory_file: Path) -> None:
    path = tmp_path / "digits.safetensors"
    shutil.copy(NETS[None].weights, path)
    sentence = refused(kind="factory", name=f"{factory_file}:make", weights=str(path))
    assert re.match(r"model\.weights: .* conv\.weight, conv\.bias, linear\.weight, linear\.bias; ", sentence)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, write: Callable[[Any, Path], None], nested: bool) -> None:
    target, path = tmp_path / "executed", tmp_path / "weights.pt"
    code = Touch(target)
    write({**net().state_dict(), "extra": code} if nested else code, path)
    with pytest.raises(ConfigError, match=rf"^model\.weights: {path} "):
        load_checkpoint(net(), path)
    assert not target.exists()


def cut(path: Path) -> None:
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_safetensors(path: Path) -> None:
    save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-20])


PLAIN = "plain weights"
SAFE = "safetensors file"
NO_STATE = "state dict"


@pytest.mark.parametrize(
    ("name", "write", "named"),
    [
        ("a.pt", Path.touch, PLAIN),
        ("a.pth", cut, PLAIN),
        ("a.pt", lambda path: path.write_text("not weights\n"), PLAIN),
        ("a.pt", lambda path: torch.save(net(), path), PLAIN),
        ("a.pt", lambda path: save_file(net().state_dict(), path), PLAIN),
        ("a.safetensors", Path.touch, SAFE),
        ("a.safetensors", cut_safetensors, SAFE),
        ("a.safetensors", lambda path: path.write_text("not weights\n"), SAFE),
        ("a.safetensors", lambda path: torch.save(net().state_dict(), path), SAFE),
        ("a.pt", lambda path: torch.save([torch.zeros(1)], path), NO_STATE),
        ("a.pt", lambda path: torch.save(torch.zeros(1), path), NO_STATE),
        ("a.pt", lambda path: torch.save({}, path), NO_STATE),
        ("a.pt", lambda path: torch.save({"state_dict": "lost"}, path), NO_STATE),
        ("a.pt", lambda path: torch.save({"epoch": 3, "weight": torch.zeros(1)}, path), NO_STATE),
        ("a.pt", lambda path: torch.save({0: torch.zeros(1)}, path), NO_STATE),
        ("a.pt", lambda path: path.with_suffix(".pth").touch(), "no file"),
        ("a.pt", Path.mkdir, "no file"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, write: Callable[[Path], object], named: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(ConfigError, match=rf"^model\.weights: (?=.*{path}\b).*{named}") as caught:
        load_checkpoint(net(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "processor",
    [
        {"do_flip_channel_order": True},
        {"do_rescale": True, "rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"do_resize": True, "size": {"shortest_edge": 32}, "resample": 5},
    ],
)
def test_an_image_processor_that_preprocess_cannot_express_is_refused(processor: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.weights: .*preprocess .*factory"):
        _processor_sizes(processor)
