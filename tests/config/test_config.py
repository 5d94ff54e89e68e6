"""The config: what is accepted, what is refused and how the refusal reads, and what paths are relative to."""

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.kinds import ATTACKS
from pipeline.config.load import load_config, packaged_configs, parse_config
from pipeline.config.schema import Config
from pipeline.core.epsilon import epsilon_level, stored_just_below
from pipeline.core.errors import ConfigError
from tests.conftest import loaded_by

HUB = {"kind": "huggingface", "path": "me/photos"}
SHIPPED = ("cifar10", "cifar10-ensemble", "digits", "digits-ensemble", "imagefolder", "imagenet-resnet50", "mnist")


def small(**sections: dict[str, Any]) -> dict[str, Any]:
    """A small valid config; keyword arguments update its sections."""
    config: dict[str, dict[str, Any]] = {
        "source": {"kind": "digits"},
        "model": {"kind": "digits"},
        "attack": {"epsilons": ["8/255"]},
        "output": {"path": "out"},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def write(path: Path, config: Any) -> str:
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return str(path)


def value_at(config: Config, key: str) -> Any:
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value.get(part)  # a kind may not have it
    return value


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"runtime": {"batchsize": 3}}, r"^runtime\.batchsize .* batch_size\?$"),
        ({"source": {**HUB, "image_colum": "x"}}, r"^source\.image_colum .* image_column\?$"),
        ({"attack": {"epsilon": [0.1]}}, r"^attack\.epsilon .* epsilons\?$"),
        ({"model": {"kind": "factory", "nam": "x:y"}}, r"^model\.nam .* name\?$"),
        ({"runtime": {"ray": {"worker": 3}}}, r"^runtime\.ray\.worker .* workers\?$"),
        ({"attack": {"steps": 3}}, r"^attack\.steps .* fgsm; .* bim or pgd or mifgsm"),
        ({"attack": {"kind": "pdg", "steps": 3}}, r"^attack\.kind: .*'pdg'"),
        ({"preprocess": {"zzz": 1}}, r"^preprocess\.zzz .*: resize, crop, .*mode\.$"),
        ({"modle": {"kind": "digits"}}, r"^modle .* model\?$"),
        ({"qqq": {}}, r"^qqq .*: source, .*runtime\.$"),
        ({"source": {"kind": "webdataset"}}, r"^source\.kind: .*'webdataset'.*'imagefolder'"),
        ({"source": {"kind": "imagefolder"}}, r"^source\.path .* imagefolder "),
        ({"source": {"split": "train[:10%]"}}, r"^source\.split: 'train\[:10%\]' .*source\.limit"),
        ({"source": {"split": ["test", "test"]}}, r"^source\.split "),
        ({"source": {"split": []}}, r"^source\.split "),
        ({"source": {"keep_columns": ["id"]}}, r"^source\.keep_columns .* digits; .*: kind, split"),
        ({"source": {"kwargs": {"root": "x"}}}, r"^source\.kwargs .* digits; "),
        ({"source": {**HUB, "kwargs": {"root": "x"}}}, r"^source\.kwargs .* huggingface; .*: kind"),
        ({"model": {"kind": "resnet"}}, r"^model\.kind: .*'resnet'.*'torchvision'.*'digits'"),
        ({"model": {"kind": ["digits"]}}, r"^model\.kind: .*\['digits'\]"),
        ({"attack": {"kind": "fgm"}}, r"^attack\.kind: .*'fgm'.*'fgsm'.*'path/to/file\.py:Attack'"),
        ({"attack": {"kwargs": {"steps": 3}}}, r"^attack\.kwargs .* fgsm; .*: kind, epsilons"),
        ({"source": {"limit": 0}}, r"^source\.limit: .* 0\b"),
        ({"model": {"kind": "factory"}}, r"^model\.name .* factory "),
        ({"model": {"kind": "factory", "name": "victim.py"}}, r"^model\.name 'victim\.py' "),
        ({"model": {"label_map": "same"}}, r"^model\.label_map .*'same'"),
        ({"model": {"label_map": {}}}, r"^model\.label_map "),
        ({"model": {"mean": [float("nan")]}}, r"^model\.mean .*\[nan\]"),
        ({"model": {"mean": [123.675, 116.28, 103.53]}}, r"^model\.mean .*\[123\.675, .* 255"),
        ({"model": {"mean": [0.5, 1.5, 0.5]}}, r"^model\.mean "),
        ({"model": {"mean": [0.5, -0.5, 0.5]}}, r"^model\.mean "),
        ({"model": {"mean": []}}, r"^model\.mean "),
        ({"model": {"mean": [0.5] * 4}}, r"^model\.mean: 4 .*RGB.* 3 "),
        ({"model": {"std": [0.5] * 2}}, r"^model\.std: 2 "),
        ({"model": {"std": [float("inf")]}}, r"^model\.std "),
        ({"model": {"std": [0.5, 0]}}, r"^model\.std "),
        ({"model": {"std": [0.5, -0.5, 0.5]}}, r"^model\.std "),
        ({"model": {"mean": [0.5], "std": [58.395, 57.12, 57.375]}}, r"^model\.std .*\[58\.395, .* 255"),
        ({"model": {"kwargs": {"width": 8}}}, r"^model\.kwargs .* digits; .*: kind, weights"),
        ({"model": {"name": "resnet18"}}, r"^model\.name: .*'strided'"),
        ({"source": {"path": "somewhere"}}, r"^source\.path .* digits; "),
        ({"source": {"limit": True}}, r"^source\.limit: .*integer"),
        ({"runtime": {"batch_size": "64"}}, r"^runtime\.batch_size: .*integer"),
        ({"runtime": {"seed": 2**32}}, r"^runtime\.seed: .*4294967296"),
        ({"attack": {"target": False}}, r"^attack\.target: "),
        ({"attack": {"epsilons": "8/255"}}, r"^attack\.epsilons .*list"),
        ({"preprocess": {"crop": 9_999_999}}, r"^preprocess\.crop: 9999999x9999999 .*runtime\.max_pixels"),
        ({"preprocess": {"resize": [20_000, 6_000]}}, r"^preprocess\.resize: 6000x20000 .*runtime\.max_pixels"),
        ({"runtime": {"ray": {"workers": 0}}}, r"^runtime\.ray: .* 0\b"),
        ({"runtime": {"ray": {"cpus_per_worker": 1.5}}}, r"^runtime\.ray: .*integer"),
        ({"runtime": {"ray": {"gpus_per_worker": 1.5}}}, r"^runtime\.ray: .*1\.5.*auto"),
        ({"runtime": {"ray": {"gpus_per_worker": -1}}}, r"^runtime\.ray: .*-1.*auto"),
        ({"runtime": {"ray": {"gpus_per_worker": True}}}, r"^runtime\.ray: .*True.*auto"),
        (
            {"runtime": {"device": "cuda", "ray": {"gpus_per_worker": 0}}},
            r"^runtime\.ray: gpus_per_worker 0 .*runtime\.device cuda",
        ),
        (
            {"runtime": {"device": "cpu", "ray": {"gpus_per_worker": 0.5}}},
            r"^runtime\.ray: gpus_per_worker 0\.5 .*runtime\.device cpu",
        ),
        # YAML reads unquoted yes and no as booleans, which are also the numbers 1 and 0.
        ({"model": {"label_map": {False: 1, True: 0}}}, r"^model\.label_map: .*(True|False)"),
        ({"preprocess": {"resize": 0}}, r"^preprocess\.resize: got 0;"),
        ({"preprocess": {"resize": 1.5}}, r"^preprocess\.resize: got 1\.5;"),
        ({"preprocess": {"resize": True}}, r"^preprocess\.resize: got True;"),
        ({"preprocess": {"resize": [256]}}, r"^preprocess\.resize: got \[256\];"),
        ({"preprocess": {"crop": [8, 8, 8]}}, r"^preprocess\.crop: got \[8, 8, 8\];.*\[height, width\]"),
        ({"preprocess": {"crop": "big"}}, r"^preprocess\.crop: got 'big';"),
        ({"output": {"path": "s3://id:hush/hush@bucket/out"}}, r"^output\.path\b(?!.*hush)"),
        ({"output": {"path": "s3://bucket/out?a=b"}}, r"^output\.path: "),
        ({"output": {"path": "s3://hush@bucket/out"}}, r"^output\.path (?!.*hush)"),
        ({"output": {"path": "az://bucket/out?sig=hush"}}, r"^output\.path (?!.*hush)"),
        ({"output": {"path": "s3:///out"}}, r"^output\.path: s3:///out .*s3://bucket/prefix"),
        ({"output": {"path": "s3://bucket/a b"}}, r"^output\.path: .* ' '"),
        ({"output": {"path": "file:///out"}}, r"^output\.path: file:// "),
        ({"output": {"path": "hf://datasets/me/x"}}, r"^output\.path: hf:// .*fgsm publish "),
        ({"output": {"image_format": "jpeg"}}, r"^output\.image_format: JPEG .*webp.*png"),
        ({"output": {"image_format": "JPG"}}, r"^output\.image_format: JPEG .*webp.*png"),
        ({"output": {"image_format": "tiff"}}, r"^output\.image_format: .*'tiff'.*'webp'.*'png'"),
        (
            {"output": {"image_format": "webp"}, "preprocess": {"mode": "L"}},
            r"^output\.image_format: webp .*png",
        ),
        ({"runtime": {"workers": -1}}, r"^runtime\.workers: "),
        ({"runtime": {"max_skipped": 1.5}}, r"^runtime\.max_skipped: .* 1\b"),
        ({"runtime": {"max_pixels": "many"}}, r"^runtime\.max_pixels: .*integer"),
    ],
)
def test_refusal_names_the_key_and_the_mend(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(small(**sections))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        # Not that epsilons is missing.
        ({"attack": {"epsilon": ["8/255"]}}, r"^attack\.epsilon .* epsilons\?$"),
        ({"attack": {"eps": ["8/255"]}}, r"^attack\.eps .* epsilons\?$"),
        # Keys without their section.
        ({"epsilons": ["8/255"]}, r"^epsilons .* attack\.epsilons\?$"),
        ({"batchsize": 3}, r"^batchsize .* runtime\.batch_size\?$"),
    ],
)
def test_a_key_in_place_of_another_names_what_was_meant(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({**small(), **sections})


@pytest.mark.parametrize(
    "key", ["source", "model", "attack", "output", "source.kind", "attack.epsilons", "output.path"]
)
def test_missing_key_is_named(key: str) -> None:
    config = small()
    section, _, last = key.rpartition(".")
    del (config[section] if section else config)[last]
    with pytest.raises(ConfigError, match=rf"^{key} "):
        parse_config(config)


@pytest.mark.parametrize(
    ("size", "fixed"),
    [({}, False), ({"resize": 9}, False), ({"resize": [9, 7]}, True), ({"crop": 5}, True), ({"crop": [5, 4]}, True)],
)
def test_what_fixes_the_size(size: dict[str, Any], fixed: bool) -> None:
    assert parse_config(small(preprocess=size)).preprocess.fixes_size == fixed


def levels(epsilons: Sequence[str | float], rounding: str = "down") -> tuple[int, ...]:
    return parse_config(small(attack={"epsilons": list(epsilons), "rounding": rounding})).all_attacks["fgsm"].levels


@pytest.mark.parametrize(
    ("epsilon", "down", "nearest"),
    [
        ("8/255", 8, 8),
        (" 8 / 255 ", 8, 8),
        ("1/255", 1, 1),
        ("255/255", 255, 255),
        (8 / 255, 8, 8),
        ("0.1", 25, 26),
        (0.03, 7, 8),
        (0.031, 7, 8),
        (0.0059, 1, 2),
        (0.0098, 2, 2),
        (1, 255, 255),
        (1.0, 255, 255),
        # Written with ten decimals they are short of the level by less than the slack, with seven by more.
        (0.0313725490, 8, 8),
        (0.0313725, 7, 8),
        (0.0078431372, 2, 2),
        (0.0039215686, 1, 1),
    ],
)
def test_epsilon_in_grey_levels(epsilon: str | float, down: int, nearest: int) -> None:
    assert levels([epsilon]) == (down,)
    assert levels([epsilon], "nearest") == (nearest,)


def test_every_fraction_of_255_is_its_own_level() -> None:
    for level in range(1, 256):
        assert epsilon_level(f"{level}/255", "down") == level
        assert epsilon_level(level / 255, "down") == level


@given(st.floats(0.004, 1))
def test_the_stored_epsilon_stays_inside_the_ball(epsilon: float) -> None:
    # Decimals have 1e-6 of slack.
    assert epsilon_level(epsilon, "down") / 255 <= epsilon + 1.001e-6
    assert epsilon_level(epsilon, "down") > 255 * epsilon - 1
    assert abs(epsilon_level(epsilon, "nearest") - 255 * epsilon) <= 0.5


@pytest.mark.parametrize(
    ("epsilon", "named"),
    [
        (0.003, r"0\.003 .*1/255"),
        (0, r"0\S* .*1/255"),
        ("0/255", r"0/255 .*1/255"),
        (-0.1, r"-0\.1 .*1/255"),
        ("-8/255", r"'-8/255' .*k/255"),
        (1.001, r"1\.001 .* 1\b"),
        (8, r"8\S* .* 8/255\.$"),
        ("8", r"8 .* 8/255\.$"),
        (256, r"256\S* .* 1\b"),
        # A fraction that is too large has no better spelling.
        ("300/255", r"300/255 (?!.*/255)"),
        (math.inf, r"inf .* 1\b"),
        (math.nan, r"nan "),
        ("nan", r"nan"),
        ("eight", r"'eight' .*k/255"),
        ("8/256", r"'8/256' .*k/255"),
        ("", r"'' .*k/255"),
        (True, r"[Tt]rue"),
        (None, r"None"),
    ],
)
def test_refused_epsilon(epsilon: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^attack\.epsilons: .*{named}"):
        levels(["2/255", epsilon])


def test_epsilons_need_one_and_each_level_once() -> None:
    with pytest.raises(ConfigError, match=r"^attack\.epsilons: "):
        levels([])
    with pytest.raises(ConfigError, match=r"^attack\.epsilons: 8/255 and 0\.0315 "):
        levels(["8/255", 0.0315])
    with pytest.raises(ConfigError, match=r"^attack\.epsilons: 0\.031 and 8/255 "):
        levels([0.031, "8/255"], "nearest")
    assert levels([0.031, "8/255"]) == (7, 8)


def test_epsilons_come_in_rising_order_with_what_was_asked_for() -> None:
    attack = parse_config(small(attack={"epsilons": ["16/255", 0.031, "2/255"]})).all_attacks["fgsm"]
    assert list(attack.requested.items()) == [(2, "2/255"), (7, 0.031), (16, "16/255")]


@pytest.mark.parametrize(
    ("epsilon", "below"),
    [
        (0.031, True),
        ("0.031", True),
        (7.9001 / 255, True),
        (7.8999 / 255, False),
        (7.99 / 255, True),
        ("8/255", False),
        (8 / 255, False),
        (0.0313725490, False),
        (0.0313725, True),
        (8.01 / 255, False),
        (0.5, False),
        (1.0, False),
    ],
)
def test_stored_just_below_the_level_that_was_probably_meant(epsilon: str | float, below: bool) -> None:
    assert stored_just_below(epsilon) == below


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["runtime.batch_size=64"], "runtime.batch_size", 64),
        (["runtime.batch_size=64", "runtime.batch_size=32"], "runtime.batch_size", 32),
        (["attack.epsilons=[1/255, 0.5]"], "attack.epsilons", ("1/255", 0.5)),
        (["source.split=test"], "source.split", ("test",)),
        (["source.shuffle=false"], "source.shuffle", False),
        (["model.weights=null"], "model.weights", None),
        (["model.label_map={one: 1}"], "model.label_map", {"one": 1}),
        (["model.kind=timm", "model.name=x", "model.kwargs.a.b=3"], "model.kwargs", {"a": {"b": 3}}),
        (["runtime.batch_size=64", "runtime.batch_size=", "runtime.seed=3"], "runtime.seed", 3),
        (["preprocess.mode=L"], "preprocess.mode", "L"),
        (["preprocess={resize: 9, crop: [5, 4]}"], "preprocess.crop", (5, 4)),
        (["output.path=a=b"], "output.path", "a=b"),
    ],
)
def test_override(tmp_path: Path, overrides: list[str], key: str, value: Any) -> None:
    path = write(tmp_path / "config.yaml", small())
    assert value_at(load_config(path), key) != value
    assert value_at(load_config(path, overrides), key) == value


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("runtime.batch_size", r"^--set runtime\.batch_size: .*key=value"),
        ("=3", r"^--set =3: .*key=value"),
        ("source.split=[", r"^--set source\.split=\[: '\[' "),
        ("attack.epsilons.first=1/255", r"^--set attack\.epsilons\.first: epsilons "),
        ("runtime.batchsize=3", r"^runtime\.batchsize .* batch_size\?"),
        ("runtme.batch_size=3", r"^runtme .* runtime\?"),
        ("runtime=3", r"^runtime .*\bmapping\b.*\b3\b"),
    ],
)
def test_malformed_override(tmp_path: Path, override: str, named: str) -> None:
    path = write(tmp_path / "config.yaml", small())
    with pytest.raises(ConfigError, match=named):
        load_config(path, [override])


def test_output_and_limit_arguments_win(tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", small())
    config = load_config(path, ["output.path=b", "source.limit=5"], output="c", limit=7)
    assert (config.output.path, config.source.limit) == ("c", 7)


@pytest.mark.parametrize(
    ("sections", "key", "expected"),
    [
        ({"source": {"kind": "imagefolder", "path": "photos"}}, "source.path", "{folder}/photos"),
        ({"source": {"kind": "imagefolder", "path": "not/there"}}, "source.path", "{folder}/not/there"),
        ({"source": {"kind": "huggingface", "path": "photos"}}, "source.path", "{folder}/photos"),
        ({"source": {"kind": "huggingface", "path": "./gone"}}, "source.path", "{folder}/gone"),
        ({"source": {"kind": "huggingface", "path": "../gone"}}, "source.path", "{folder}/../gone"),
        ({"source": {"kind": "huggingface", "path": "uoft-cs/cifar10"}}, "source.path", "uoft-cs/cifar10"),
        ({"source": {"kind": "huggingface", "path": "/data/photos"}}, "source.path", "/data/photos"),
        ({"source": {"kind": "imagefolder", "path": "/data/photos"}}, "source.path", "/data/photos"),
        ({"source": {"kind": "huggingface", "path": "~/photos"}}, "source.path", "~/photos"),
        ({"source": {"kind": "imagefolder", "path": "~/photos"}}, "source.path", "~/photos"),
        ({"source": {"kind": "torchvision", "path": "photos"}}, "source.path", "photos"),
        (
            {"source": {"kind": "torchvision", "path": "MNIST", "kwargs": {"root": "data"}}},
            "source.kwargs.root",
            "{folder}/data",
        ),
        (
            {"source": {"kind": "torchvision", "path": "MNIST", "kwargs": {"root": "~/data"}}},
            "source.kwargs.root",
            "~/data",
        ),
        ({"model": {"weights": "a/b.safetensors"}}, "model.weights", "{folder}/a/b.safetensors"),
        ({"model": {"weights": "b.pt"}}, "model.weights", "{folder}/b.pt"),
        ({"model": {"weights": "b.pth"}}, "model.weights", "{folder}/b.pth"),
        ({"model": {"weights": "/w/b.pth"}}, "model.weights", "/w/b.pth"),
        ({"model": {"weights": "~/b.pth"}}, "model.weights", "~/b.pth"),
        ({"model": {"weights": "IMAGENET1K_V2"}}, "model.weights", "IMAGENET1K_V2"),
        ({"model": {"kind": "factory", "name": "victim.py:make"}}, "model.name", "{folder}/victim.py:make"),
        ({"model": {"kind": "factory", "name": "package.module:make"}}, "model.name", "package.module:make"),
        ({"model": {"kind": "transformers", "name": "photos"}}, "model.name", "{folder}/photos"),
        ({"model": {"kind": "transformers", "name": "google/vit"}}, "model.name", "google/vit"),
        (
            {"model": {"kind": "transformers", "name": "google/vit", "weights": "photos"}},
            "model.weights",
            "{folder}/photos",
        ),
        ({"output": {"path": "photos"}}, "output.path", "photos"),
    ],
)
def test_relative_inputs_of_a_file_are_relative_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], key: str, expected: str
) -> None:
    folder, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    (folder / "photos").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write(folder / "config.yaml", small(**sections))
    # Named by a relative path, so that the file's folder has to be made absolute.
    value = value_at(load_config("../configs/config.yaml"), key)
    assert Path(value).expanduser() == Path(expected.format(folder=folder)).expanduser()


def test_relative_paths_of_overrides_stay(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    path = write(tmp_path / "config.yaml", small(source={"kind": "imagefolder", "path": "other"}))
    config = load_config(path, ["source.path=photos", "model.weights=victim.pt"], output="photos")
    here = Path.cwd()
    assert config.source.folder == here / "photos"
    assert config.all_models["digits"].weights == str(here / "victim.pt")
    assert config.output.path == "photos"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads_by_name(name: str) -> None:
    config = load_config(name)
    assert Path(config.output.path).parent == Path("out")
    text = (packaged_configs() / f"{name}.yaml").read_text()
    assert parse_config(yaml.safe_load(text)).all_attacks == config.all_attacks


def test_every_shipped_config_is_tested() -> None:
    assert sorted(path.stem for path in packaged_configs().glob("*")) == list(SHIPPED)


def test_shipped_paths_are_relative_to_the_working_directory() -> None:
    assert load_config("imagefolder").source.folder == Path.cwd() / "data/photos"
    assert value_at(load_config("mnist"), "source.kwargs.root") == str(Path.cwd() / "data")


def test_a_file_comes_before_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "digits", small(output={"path": "mine"}))
    assert load_config("digits").output.path == "mine"


def test_unknown_name_lists_the_shipped_configs() -> None:
    with pytest.raises(ConfigError, match=r" digit, ") as error:
        load_config("digit")
    assert all(name in str(error.value) for name in SHIPPED)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"source: [", r"/config\.yaml "),
        (b"source: {kind: digits", r"/config\.yaml "),
        (b"source:\n\tkind: digits", r"/config\.yaml "),
        (b"source: \xff\xfe", r"/config\.yaml "),
        (b"- source\n- model", r"/config\.yaml "),
        (b"just words", r"/config\.yaml "),
        (b"", r"/config\.yaml "),
        (b"source: digits", r"^source .*'digits'"),
        (b"1: 2", r"^source "),
    ],
)
def test_broken_config_file(tmp_path: Path, text: bytes, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=named) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


# What a config may hold: no path has a null byte.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
CONFIGS = st.fixed_dictionaries(
    {
        "source": st.one_of(
            st.fixed_dictionaries(
                {"kind": st.just("digits"), "split": st.sampled_from([None, "test", ["train", "test"]])}
            ),
            st.fixed_dictionaries(
                {
                    "kind": st.just("huggingface"),
                    "path": st.just("uoft-cs/cifar10"),
                    "limit": st.none() | st.integers(1, 10**9),
                    "classes": st.none() | st.lists(TEXT, min_size=1),
                    "keep_columns": st.lists(TEXT, unique=True),
                }
            ),
        ),
        "preprocess": st.fixed_dictionaries(
            {
                "resize": st.none() | st.integers(1, 999) | st.lists(st.integers(1, 999), min_size=2, max_size=2),
                "crop": st.none() | st.integers(1, 999) | st.lists(st.integers(1, 999), min_size=2, max_size=2),
                "mode": st.sampled_from(["RGB", "L"]),
            }
        ),
        "model": st.fixed_dictionaries(
            {
                "kind": st.just("digits"),
                "mean": st.none() | st.lists(st.floats(0, 1), min_size=3, max_size=3),
                "label_map": st.none()
                | st.just("identity")
                | st.dictionaries(TEXT, st.integers(0, 9) | TEXT, min_size=1),
            }
        ),
        "attack": st.fixed_dictionaries(
            {
                "epsilons": st.lists(st.integers(1, 255), min_size=1, max_size=5, unique=True).map(
                    lambda levels: [f"{level}/255" if level % 2 else level / 255 for level in levels]
                ),
                "label": st.sampled_from(["dataset", "prediction"]),
                "target": st.none() | st.sampled_from(["random", "least_likely"]) | TEXT | st.integers(0, 9),
                "rounding": st.sampled_from(["down", "nearest"]),
            }
        ),
        "output": st.fixed_dictionaries({"path": st.just("out"), "image_format": st.sampled_from(["auto", "png"])}),
        "runtime": st.fixed_dictionaries(
            {
                "device": st.sampled_from(["auto", "cuda", "mps", "cpu"]),
                "workers": st.just("auto") | st.integers(0, 99),
                "compile": st.sampled_from(["auto", False]),
                "max_skipped": st.floats(0, 1),
            }
        ),
    }
)


@given(CONFIGS)
@settings(max_examples=60)
def test_a_dump_parses_back_to_an_equal_config(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    assert parse_config(config.model_dump()) == config
    # The manifest keeps the config as JSON.
    assert parse_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_a_config_is_sent_to_another_process() -> None:
    raw = {key: value for key, value in small().items() if key != "model"}
    config = parse_config(
        {**raw, "models": {"a": {"kind": "torchvision", "name": "resnet18"}, "b": {"kind": "digits"}}}
    )
    assert pickle.loads(pickle.dumps(config)) == config


LARGE = {"torch", "datasets", "torchvision", "timm", "transformers", "sklearn"}


def test_a_config_is_checked_without_large_libraries() -> None:
    kinds = [{"kind": kind, "name": "a:b"} for kind in ("torchvision", "timm", "transformers", "factory")]
    models: list[dict[str, Any]] = [{"model": model} for model in [*kinds, {"kind": "digits"}]]
    attacks = [{"attack": {"kind": kind, "epsilons": ["8/255"]}} for kind in [*ATTACKS, "a.py:B"]]
    sources = ({"kind": "imagefolder", "path": "a"}, {"kind": "torchvision", "path": "MNIST"}, {"kind": "digits"})
    raw = [{**small(source=HUB), **changed} for changed in [*models, *attacks]]
    raw += [small(source=source) for source in sources]
    loaded = loaded_by(f"from pipeline.config.load import parse_config; [parse_config(raw) for raw in {raw!r}]")
    assert "pipeline.config.schema" in loaded
    assert not LARGE & loaded


def test_config_is_frozen() -> None:
    config = parse_config(small())
    with pytest.raises(ValidationError, match="frozen"):
        config.all_attacks["fgsm"].label = "prediction"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.runtime = config.runtime  # type: ignore[misc]


def test_digits_victim_is_trained_unless_weights_are_null() -> None:
    assert parse_config(small()).all_models["digits"].weights == "digits"
    assert parse_config(small(model={"weights": None})).all_models["digits"].weights is None


def test_a_section_without_values_stands_for_its_defaults() -> None:
    config = {**small(runtime={"batch_size": None, "ray": None}), "preprocess": None, "models": None}
    assert parse_config(config) == parse_config(small())


def test_the_contract_s_defaults_are_accepted() -> None:
    ray = {"workers": "auto", "gpus_per_worker": "auto", "cpus_per_worker": "auto"}
    # Those of other kinds too, as long as they say nothing.
    source = {"streaming": False, "kwargs": {}, "keep_columns": [], "path": None}
    runtime = {"ray": ray, "precision": "fp32", "compile": "auto"}
    parse_config({**small(source=source, runtime=runtime), "models": {}, "attacks": {}})


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("source: {kind: digits}\nmodel: {kind: digits}\nsource: {kind: digits, limit: 3}\n")
    with pytest.raises(ConfigError, match=r"/config\.yaml .*\bkey source\b"):
        load_config(str(path))
