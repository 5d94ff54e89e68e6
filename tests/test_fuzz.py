"""Fuzz: whatever stands in a config, an image, a manifest or a class name, the answer is a value or one sentence.

A few examples by default; `pytest -m drill` tries many more of each.
"""

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

import pipeline
from pipeline.check.verify import verify
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import Config, PreprocessConfig
from pipeline.core.console import as_text
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import OtherShapeError, UndecodableError, decode_image, open_image
from pipeline.core.redaction import presentable, printable
from pipeline.engine.decode import read_image
from pipeline.output.card import render_card
from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, current_manifest, require_manifest
from pipeline.output.summary import Summary, inspect
from pipeline.read.load import _addresses
from pipeline.reporting.page import report
from tests.conftest import random_pixels, shard_path, write_sealed

FEW, MANY = 10, 2000
# Seconds of a core that one example may take: parsers that loop take minutes.
SLOW = 5.0


def often(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        # The gate's answer is the same each time; the drill looks further.
        derandomize=examples < MANY,
        phases=(Phase.explicit, Phase.generate),
    )


Counts = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.drill)])


def one_line(error: BaseException) -> None:
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000


# ---------------------------------------------------------------------------------------------- configs

KEYS = sorted(
    {
        (section, key)
        for section, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**80),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=40),
    st.sampled_from(["8/255", "~nobody/x", "../..", "/" + "x" * 300, "9" * 400 + "/255", "s3://a", "a.pt", "b.py:c"]),
    st.sampled_from(["huggingface", "imagefolder", "timm", "factory", "transformers", "identity", "auto", "1e999"]),
    st.dates(),
    st.binary(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
PLAIN: dict[str, dict[str, Any]] = {
    "source": {"kind": "digits"},
    "model": {"kind": "digits"},
    "attack": {"epsilons": ["8/255"]},
    "output": {"path": "out"},
}


def check_load(load: Callable[[], Config]) -> None:
    began = time.process_time()
    try:
        config = load()
        config.model_dump(mode="json")
    except ConfigError as error:
        one_line(error)
    assert time.process_time() - began < SLOW


@Counts
def test_any_value_of_any_key_is_a_config_or_a_sentence(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "config.yaml"

    @often(examples * 2)
    @given(place=st.sampled_from(KEYS), value=VALUES, several=st.booleans())
    def check(place: tuple[str, str], value: Any, several: bool) -> None:
        section, key = place
        raw: dict[str, Any] = {name: dict(keys) for name, keys in PLAIN.items()}
        raw.setdefault(section, {})
        raw[section][key] = value
        if several:
            raw["models"] = {"one": raw.pop("model"), "other": value}
            raw["attacks"] = {"one": raw.pop("attack"), "other": value}
        check_load(lambda: parse_config(raw))
        path.write_text(yaml.safe_dump(raw, allow_unicode=False), encoding="utf-8")
        check_load(lambda: load_config(str(path)))

    check()


@Counts
def test_any_text_is_a_config_or_a_sentence(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "config.yaml"
    pieces = st.sampled_from(
        [
            *("source:", "model: ", "kind: digits", "\n", "\n  ", "&a ", "*a", "<<: ", "- ", "[", "]", "{", "}", ", "),
            *("0x" + "f" * 4000, "9" * 5000, "2001-99-99", "!!int x", "!!python/object/apply:os.system [x]", "? "),
            *('"\\ud800"', "\x00", "\x85", "\t", "1_0:99", ".inf", "!!timestamp x", "!!float x", "'", '"', "|\n", ": "),
            "!!binary x",
        ]
    )

    @often(examples * 2)
    @given(text=st.one_of(st.lists(pieces, max_size=30).map("".join), st.binary(max_size=200)))
    def check(text: str | bytes) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        check_load(lambda: load_config(str(path)))

    check()


@Counts
def test_any_override_is_a_config_or_a_sentence(examples: int) -> None:
    @often(examples)
    @given(
        key=st.one_of(st.text(max_size=20), st.sampled_from([".".join(key) for key in KEYS])),
        value=st.one_of(st.text(max_size=60), VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True))),
    )
    def check(key: str, value: str) -> None:
        check_load(lambda: load_config("digits", [f"{key}={value}"]))

    check()


# ----------------------------------------------------------------------------------------------- images


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_images() -> list[bytes]:
    """One small valid file of each kind."""
    noise = Image.fromarray(random_pixels(1, side=24)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(pixels) for pixels in random_pixels(3, side=24)]
    return [
        saved(noise, "PNG"),
        saved(noise.quantize(16), "PNG", transparency=3),
        saved(noise, "JPEG", exif=exif.tobytes()),
        saved(noise, "JPEG", progressive=True),
        saved(noise, "WEBP", lossless=True),
        saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(noise, "TIFF"),
        saved(noise, "TIFF", compression="tiff_lzw"),
        saved(noise, "TIFF", compression="jpeg"),
        saved(noise, "BMP"),
        saved(noise, "PPM"),
        saved(noise, "JPEG2000"),
        saved(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24)), "PNG"),
    ]


WHOLE = whole_images()
CROPPED = PreprocessConfig(resize=8, crop=8)


@st.composite
def broken_images(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, numbers made absurd, parts cut out, doubled or filled."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1))) if draw(st.booleans()) else draw(st.integers(0, 80))
        kind = draw(st.sampled_from(["byte", "number", "cut", "double", "fill", "tail"]))
        if kind == "byte":
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
            data[place : place + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        elif kind == "fill":
            data[place : place + 16] = bytes(16)
        else:
            del data[place:]
    return bytes(data)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What is imported where it is needed does not count as time."""
    read_image(lambda: open_image(io.BytesIO(WHOLE[0])), CROPPED, 1_000_000)


def check_image(data: bytes) -> None:
    began = time.process_time()
    for preprocess in (PreprocessConfig(), CROPPED):
        try:
            pixels = read_image(lambda: open_image(io.BytesIO(data)), preprocess, 1_000_000)
        except UndecodableError as error:
            one_line(error)
            continue
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3
        assert pixels[0].numel() <= 1_000_000
        assert preprocess is not CROPPED or pixels.shape == (3, 8, 8)
    try:
        assert decode_image(data, (3, 24, 24)).shape == (3, 24, 24)
    except UndecodableError as error:
        assert isinstance(error, OtherShapeError) or str(error)
    assert time.process_time() - began < SLOW


@Counts
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_pixels_or_undecodable(examples: int) -> None:
    @often(examples * 6)
    @given(data=broken_images())
    def check(data: bytes) -> None:
        check_image(data)

    check()


def corpus() -> Iterator[bytes]:
    """Every valid file cut off at every place, and with each of its first bytes at its extremes."""
    for data in WHOLE:
        for end in range(0, len(data), max(1, len(data) // 40)):
            yield data[:end]
        for place in range(0, min(100, len(data)), 2):
            for value in (0, 0xFF):
                yield data[:place] + bytes([value]) + data[place + 1 :]


@pytest.mark.filterwarnings("ignore")
def test_a_corpus_of_broken_files() -> None:
    for data in corpus():
        check_image(data)


# ------------------------------------------------------------------------------- manifests and receipts


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**65)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["../../x", "/etc/passwd", "clean/../../x.parquet", "test", "eps-8", "signs", "Image", "Path"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one of its parts replaced, dropped or added."""
    if isinstance(content, dict) and content and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(content)))
        return {**content, key: draw(mutated(content[key]))}
    if isinstance(content, list) and content and draw(st.integers(0, 5)):
        index = draw(st.integers(0, len(content) - 1))
        return [*content[:index], draw(mutated(content[index])), *content[index + 1 :]]
    if isinstance(content, dict) and content and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(content)))
        return {name: value for name, value in content.items() if name != key}
    return draw(JSON)


def small(content: Any) -> bool:
    """Whether the numbers of a manifest are such that this machine can hold its plan."""
    if isinstance(content, dict):
        return all(map(small, content.values()))
    if isinstance(content, list):
        return all(map(small, content))
    return not isinstance(content, int | float) or content <= 100_000


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TEXTS = ("", "../x", "\ud800")
ODD: tuple[Any, ...] = (None, True, -1, 2**63, 10**400, float("inf"), *TEXTS, [], {}, ["../x"], {"../x": -1})


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each part of a JSON value."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inside in parts:
        yield (*above, key)
        yield from places(inside, (*above, key))


def replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A JSON value with another part in a place."""
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = replaced(content[place[0]], place[1:], value)
    return copy


# A manifest that plans other shards is of an incomplete dataset, which the readers warn of.
@pytest.mark.filterwarnings("ignore:.* is incomplete:UserWarning")
@pytest.mark.parametrize(("step", "odd"), [(3, 1), pytest.param(1, 5, marks=pytest.mark.drill)])
@pytest.mark.parametrize("streamed", [False, True])
def test_parts_of_a_manifest_may_be_anything(
    finished: Path, tmp_path: Path, step: int, odd: int, streamed: bool
) -> None:
    """One odd value in every third place; in the drill five of them in every place.

    The report, which takes as long as all others, sees every sixteenth of them, of a dataset as the Hub gives it.
    """
    out, bare = tmp_path / "out", tmp_path / "bare"
    shutil.copytree(finished, out)
    shutil.copytree(finished, bare, ignore=shutil.ignore_patterns(".run"))
    original = json.loads((out / "manifest.json").read_text())
    if streamed:
        files = [{"path": "a.parquet", "cuts": [6]}, {"path": "b.tar", "cuts": None}]
        original |= {"split_rows": {"test": None}, "streamed": {"test": files}}
    looks: list[Callable[[], object]] = [
        lambda: as_text(inspect(out), 80),
        lambda: verify(out),
        lambda: pipeline.training_dataset(out, "test"),
        lambda: _addresses("s3://bucket/out", require_manifest(OutputFolder(out)), "clean"),
        lambda: as_text(inspect(bare)),
    ]
    for number, place in enumerate(islice(places(original), 0, None, step)):
        for value in (ODD[(number + offset) % len(ODD)] for offset in range(odd)):
            for folder in (out, bare):
                write_sealed(folder / "manifest.json", replaced(original, place, value))
            for look in looks if number % 16 else [*looks, lambda: report(bare)]:
                try:
                    look()
                except PipelineError as error:
                    one_line(error)
                except Exception as error:
                    raise AssertionError(f"{place} as {value!r:.50}") from error


SKIPPED = {"split": "test", "source_index": 11, "reason": "cannot identify image file"}


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("skipped",), [{"x": 1}], "skipped.0.split: "),
        (("skipped",), [{**SKIPPED, "source_index": "1,000"}], "skipped.0.source_index: "),
        (("skipped", 0, "reason"), "\ud800", "hex escape"),
        (("subsets", 0, "level"), 3, " (subsets "),
        (("subsets", 1, "attack"), "pgd", " (subsets "),
        (("subsets", 1, "model"), "../x", "subsets.1.model: "),
        (("subsets", 1, "subset"), "../x", "subsets.1.subset: "),
        (("subsets", 0, "split"), "train", " (subsets "),
        (("subsets", 0, "models"), {"x": {}}, " (subsets "),
        (("subsets", 1, "bytes"), None, " (subsets "),
        (("subsets", 1, "rows"), 1, "subsets.1: "),
        (("subsets", 0, "confidence_sum"), float("nan"), "subsets.0.confidence_sum: "),
    ],
)
def test_a_manifest_that_no_run_writes_is_refused(
    finished: Path, tmp_path: Path, place: tuple[Any, ...], value: Any, named: str
) -> None:
    """Without receipts, as from the Hub, there is nothing else that a report could go by."""
    original = json.loads((finished / "manifest.json").read_text())
    assert original["skipped"] == [SKIPPED]
    (tmp_path / "manifest.json").write_text(json.dumps(replaced(original, place, value)))
    for look in (report, inspect):
        with pytest.raises(PipelineError, match=re.escape(f"{tmp_path}/manifest.json ")) as refused:
            look(tmp_path)
        assert named in str(refused.value)
        one_line(refused.value)


@Counts
@pytest.mark.parametrize("name", ["manifest.json", ".run/receipts/test-00000-of-00002.json"])
def test_any_manifest_or_receipt_gets_problems_or_a_sentence(
    finished: Path, tmp_path: Path, examples: int, name: str
) -> None:
    out = tmp_path / "place" / "out"
    shutil.copytree(finished, out)
    (tmp_path / "place" / "x.parquet").write_text("a neighbour")
    altered = out / name if name == "manifest.json" else shard_path(out, name)
    original = json.loads(altered.read_text())
    before = tree(tmp_path)

    @often(examples)
    @given(content=mutated(original))
    def check(content: Any) -> None:
        text = json.dumps(content)
        if isinstance(content, dict):
            write_sealed(altered, content)
        else:
            altered.write_text(text)
        if name == "manifest.json" and not small(
            json.loads(text).get("split_rows") if isinstance(content, dict) else 0
        ):
            return
        for look in (lambda: verify(out), lambda: str(Summary(current_manifest(OutputFolder(out))))):
            try:
                found = look()
                for problem in getattr(found, "problems", ()):
                    assert len(printable(problem).splitlines()) == 1
            except PipelineError as error:
                one_line(error)
        altered.write_text(json.dumps(original))
        after = tree(tmp_path)
        there = str(altered.relative_to(tmp_path))
        assert {path: data for path, data in after.items() if path != there} == {
            path: data for path, data in before.items() if path != there
        }

    check()


# ---------------------------------------------------------------------------------------------- names

NAMES = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
        st.sampled_from(
            [
                "---",
                "| a |",
                "`x`",
                "</td><script>alert(1)</script>",
                "$\\frac{",
                "\x1b[2J",
                "\x85",
                "\u202eabc",
                "a\nb",
            ]
        ),
    ),
    min_size=3,
    max_size=3,
    unique=True,
)


def renamed(manifest: Manifest, names: list[str]) -> Manifest:
    content = json.loads(manifest.model_dump_json())

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: names if key == "names" else rename(inside) for key, inside in value.items()}
        return [rename(inside) for inside in value] if isinstance(value, list) else value

    content["features"] = rename(content["features"])
    content["dataset_classes"] = names
    for space in content["spaces"].values():
        space["recorded_classes"] = names
    return Manifest.model_validate(content)


@Counts
def test_any_class_name_stays_a_name_in_the_card(finished: Path, examples: int) -> None:
    manifest = require_manifest(OutputFolder(finished))
    plain_tokens = [token.type for token in MarkdownIt("commonmark").enable("table").parse(body(render_card(manifest)))]

    @often(examples)
    @given(names=NAMES)
    def check(names: list[str]) -> None:
        card = render_card(renamed(manifest, names))
        front = next(iter(yaml.safe_load_all(card)))
        label = next(column for column in front["dataset_info"]["features"] if column["name"] == "label")
        assert list(label["dtype"]["class_label"]["names"].values()) == names
        # Neither the table nor any other block is broken, and nothing begins a new one.
        tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
        assert [token.type for token in tokens] == plain_tokens
        assert "<script" not in card.lower().partition("---\n\n")[2]

    check()


def body(card: str) -> str:
    return card.partition("\n---\n\n")[2]


@pytest.mark.parametrize("examples", [3, pytest.param(100, marks=pytest.mark.drill)])
def test_any_class_name_stays_a_name_in_the_report(finished: Path, tmp_path: Path, examples: int) -> None:
    from pipeline.reporting.page import write_report

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    folder = OutputFolder(out)
    manifest = require_manifest(folder)

    @often(examples)
    @given(names=NAMES)
    def check(names: list[str]) -> None:
        assert tags(renamed(manifest, names)) == plain

    def tags(shown: Manifest) -> list[str]:
        return re.findall(r"<[a-z/!]+", Path(write_report(folder, shown)).read_text(encoding="utf-8"))

    plain = tags(manifest)
    check()


@Counts
def test_any_text_is_only_shown_by_a_terminal(examples: int) -> None:
    @often(examples)
    @given(text=st.text(st.characters()))
    def check(text: str) -> None:
        assert presentable(text).isprintable()
        presentable(text).encode()

    check()
