"""What an image, a config or a manifest from elsewhere cannot cost: memory, time, what is stored."""

import errno
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

import pipeline.engine.decode
from pipeline.check.verify import verify
from pipeline.config.load import load_config
from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.images import MAX_SIDE, OtherShapeError, UndecodableError, decode_image, open_image
from pipeline.engine.decode import read_image
from pipeline.output.folder import OutputFolder, Receipt
from pipeline.output.manifest import Manifest, require_manifest
from pipeline.output.summary import inspect
from pipeline.reporting.page import report
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.origins import front_matter
from pipeline.sources.registry import open_source
from pipeline.sources.torchvision import TorchvisionConfig as TorchvisionSourceConfig
from tests.conftest import WriteConfig, fgsm, png_bytes, random_pixels, shard_path, write_parquet
from tests.support.configs import section
from tests.support.sources import openers_of


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"\0" * 100) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data, 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "WEBP", lossless=True)
    frame = bytes(6) + (1).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + buffer.getvalue()[12:]
    parts = [(b"VP8X", b"\2\0\0\0" + canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    data = b"WEBP" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", len(data)) + data


def tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(12)


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x08\x01\0\0"
    return b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6) + frame + b";"


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue().replace(
        struct.pack(">BHH", 8, 8, 8), struct.pack(">BHH", 8, min(height, 65535), min(width, 65535)), 1
    )


BOMBS = {
    "png": png(60_000, 60_000),
    "png-absurd": png(2**31 - 1, 2**31 - 1),
    "webp": webp(60_000, 60_000),
    "tiff": tiff(60_000, 60_000),
    "tiff-absurd": tiff(2**32 - 1, 2**32 - 1),
    "gif": gif(60_000, 60_000),
    "bmp": bmp(2**31 - 1, 2**31 - 1),
    "jpeg": jpeg(60_000, 60_000),
}


def packed_bombs() -> dict[str, bytes]:
    """Small images with 300 MB of zeros in them, which take seconds to pack."""
    zeros = zlib.compress(bytes(300_000_000), 9)
    return {
        "png-text": png(8, 8, *[chunk(b"zTXt", b"a%d\0\0" % i + zeros) for i in range(3)]),
        "png-itxt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)),
        "png-iccp": png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros)),
        "png-idat": png(8, 8, data=bytes(300_000_000)),
    }


# The script that a subprocess runs on each: how much more memory it came to hold, and what it answered.
BOUNDED = """
import io, resource, sys, time
from pathlib import Path
from pipeline.config.schema import PreprocessConfig
from pipeline.core.images import UndecodableError, open_image, decode_image
from pipeline.engine.decode import read_image
read = lambda data: read_image(lambda: open_image(io.BytesIO(data)), PreprocessConfig(resize=8, crop=8), 10_000_000)
read(Path(sys.argv[1]).read_bytes())
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for attempt in (read, lambda data: decode_image(data, (3, 8, 8))):
        try:
            answer = str(tuple(attempt(data).shape))
        except UndecodableError as error:
            answer = str(error)
        spent = time.process_time() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(Path(path).name, grown, round(spent, 1), answer, sep="\\t")
"""


@pytest.mark.slow
def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(png_bytes(random_pixels(1)[0]))
    packed = packed_bombs()
    bombs = {**BOMBS, **packed}
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", BOUNDED, str(tmp_path / "good")]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in bombs)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(bombs)
    for name, grown, seconds, answer in lines:
        # 64 MB is what Pillow lets all texts of a PNG come to.
        assert int(grown) < 100, (name, grown)
        assert float(seconds) < 5, (name, seconds)
        if name not in packed:
            assert answer[0] != "(", (name, answer)


@pytest.mark.parametrize("name", ["png", "webp", "gif", "jpeg", "tiff"])
@pytest.mark.filterwarnings("ignore")
def test_the_refusal_names_the_key_that_raises_the_limit(name: str) -> None:
    with pytest.raises(UndecodableError, match=r"runtime\.max_pixels = 10000000"):
        read_image(lambda: open_image(io.BytesIO(BOMBS[name])), PreprocessConfig(), 10_000_000)


def test_pillows_own_limit_stays_for_what_decodes_by_itself() -> None:
    read_image(lambda: open_image(io.BytesIO(png_bytes(random_pixels(1)[0]))), PreprocessConfig(), 1000)
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(UndecodableError, match=r"runtime\.max_pixels = 1000\b"):
        # As a dataset of torchvision does it.
        read_image(lambda: Image.open(io.BytesIO(BOMBS["png"])).convert("RGB"), PreprocessConfig(), 1000)


def test_no_image_is_opened_to_open_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cells are paths, the digest takes the files, whatever they claim to hold."""
    monkeypatch.setattr("pipeline.sources.cells.open_image", lambda _: pytest.fail("an image was opened"))
    digests = set()
    for data in (b"one", b"two", b"one"):
        (tmp_path / "photos/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos/a/0.png").write_bytes(png(12_000, 12_000, data=data))
        digests.add(
            open_source(HuggingFaceConfig(kind="huggingface", path=str(tmp_path / "photos")), need_labels=False).digest
        )
    assert len(digests) == 2


def test_a_digest_of_a_torchvision_dataset_takes_no_image_past_pillows_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes decode by themselves; what they would be warned of has its error in the digest instead."""
    for name in ("train", "val"):
        (tmp_path / "imagenette2" / name / "n01440764").mkdir(parents=True)
    file = tmp_path / "imagenette2/train/n01440764/0.JPEG"
    file.write_bytes(png_bytes(random_pixels(1, side=40)[0]))
    config = TorchvisionSourceConfig(
        kind="torchvision", path="Imagenette", kwargs={"root": str(tmp_path), "download": False, "size": "full"}
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**9)
    whole = open_source(config, need_labels=True).digest
    monkeypatch.setattr("pipeline.sources.torchvision.PILLOW_PIXELS", 1000)
    assert open_source(config, need_labels=True).digest != whole


def test_a_stored_picture_of_another_shape_is_not_decoded() -> None:
    with pytest.raises(OtherShapeError, match=r"^9000x9000 .*\bRGB$"):
        decode_image(png(9_000, 9_000), (3, 8, 8))


def test_no_manifest_makes_room_for_a_bomb(out: Path) -> None:
    """Not by the shape that it claims, nor by a config in which the limit was raised."""
    content = json.loads((out / "manifest.json").read_text())
    assert Manifest.model_validate({**content, "shape": [3, 10_000, 10_000]}).shape == (3, 10_000, 10_000)
    content["shape"] = [3, 10_000, 10_001]
    content["config"]["runtime"]["max_pixels"] = 2**40
    (out / "manifest.json").write_text(json.dumps(content))
    looks: list[Callable[[], object]] = [lambda: verify(out), lambda: report(out), lambda: inspect(out)]
    looks.append(lambda: pipeline.training_dataset(out, "test"))
    for look in looks:
        with pytest.raises(PipelineError, match=r"\bshape: 10001x10000 .* 100,000,000 "):
            look()


def test_nothing_is_stored_that_could_not_be_read_again(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.loader.MOST_PIXELS", 16 * 16 - 1)
    result = fgsm("generate", write_config(runtime={"max_pixels": 2**40}))
    assert result.exit_code == 2
    assert re.search(r"Error: preprocess: .* 16x16\b.* 255 ", result.stderr)
    assert not (tmp_path / "out/manifest.json").exists()
    smaller = write_config(runtime={"max_pixels": 2**40}, preprocess={"resize": 15})
    assert fgsm("generate", smaller).exit_code == 0


@pytest.mark.parametrize("image_format", ["webp", "png", "auto"])
@pytest.mark.parametrize("resize", [(16, 17), (17, 16)])
def test_sides_that_no_encoder_takes_are_refused_first(
    image_format: str,
    resize: tuple[int, int],
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for each in MAX_SIDE:
        monkeypatch.setitem(MAX_SIDE, each, 16)
    result = fgsm("generate", write_config(preprocess={"resize": resize}, output={"image_format": image_format}))
    assert result.exit_code == 2
    # Nothing helps but other sizes: png takes them no more than webp.
    assert re.search(rf"Error: output\.image_format: .* 16 .* {resize[1]}x{resize[0]}\b.*preprocess\.", result.stderr)
    assert not (tmp_path / "out/manifest.json").exists()
    smaller = write_config(preprocess={"resize": 16}, output={"image_format": image_format})
    assert fgsm("generate", smaller).exit_code == 0


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF", "SGI"])
def test_formats_that_no_dataset_needs_are_not_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript ran"))
    with pytest.raises(UndecodableError, match="cannot identify"):
        read_image(lambda: open_image(io.BytesIO(buffer.getvalue())), PreprocessConfig(), 10_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_that_datasets_use_are_opened(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    pixels = read_image(lambda: open_image(io.BytesIO(buffer.getvalue())), PreprocessConfig(), 10_000)
    assert pixels.shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["huggingface", "imagefolder"])
def test_a_source_opens_no_other_format(tmp_path: Path, kind: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "EPS")
    if kind == "huggingface":
        folder = write_parquet(tmp_path / "data", [png_bytes(random_pixels(1)[0]), buffer.getvalue()], [0, 1])
    else:
        folder = tmp_path / "data"
        (folder / "a").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "a/0.png")
        (folder / "a/1.png").write_bytes(buffer.getvalue())
    source = open_source(section("source", kind=kind, path=str(folder)), need_labels=True)
    opener = openers_of(source, next(iter(source.splits)))[1]
    with pytest.raises(UndecodableError, match="cannot identify"):
        read_image(opener, PreprocessConfig(), 10_000)


# ------------------------------------------------------------------------------------------------------------- configs


# A billion laughs: ten aliases of the line before, eight times.
PAIRS = [*itertools.pairwise("abcdefghi")]
LAUGHS = "a: &a [x, x]\n" + "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in PAIRS)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LAUGHS, "/config.yaml .*alias"),
        ("source: &a [*a]", "/config.yaml .*alias"),
        ("[" * 60 + "]" * 60, r"/config.yaml .*\b50\b"),
        ("[" * 5000, r"/config.yaml .*\b50\b"),
        ("runtime: {seed: " + "9" * 5000 + "}", "/config.yaml "),
        ("runtime: {seed: 0x" + "f" * 5000 + "}", r"runtime.seed: .*\b64\b"),
        ("source: {path: 2001-99-99}", "/config.yaml "),
        ('source: {path: "\\ud800"}', "source.path: "),
        ('source: {path: "\\0"}', "source.path: "),
        ("source: !!python/object/apply:os.system [id]", "/config.yaml "),
        ("? [a]\n: b", "/config.yaml "),
        ("a: 1\na: 2", r"/config.yaml .*\bkey a\b"),
    ],
)
def test_a_config_that_is_a_bomb(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as refused:
        load_config(str(path))
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000
    if "\n" not in text:
        with pytest.raises(ConfigError):
            load_config(
                "digits", [f"source.path={text.partition(': ')[2] if text.startswith(('source', 'runtime')) else text}"]
            )


@pytest.mark.parametrize(
    "front",
    [
        LAUGHS,
        # Merged, they are a billion pairs that PyYAML itself writes out.
        "a: &a {x: 1}\n"
        + "".join(f"{name}: &{name} {{<<: [{', '.join([f'*{former}'] * 10)}]}}\n" for former, name in PAIRS),
        "a: " + "[" * 60 + "]" * 60,
    ],
)
def test_a_card_that_is_a_bomb_has_no_front_matter(front: str) -> None:
    began = time.process_time()
    assert front_matter(f"---\nlicense: mit\n{front}\n---\nText.".encode()) is None
    assert time.process_time() - began < 5
    assert front_matter(b"---\na: [mit]\nlicense: mit\n---\nText.") == {"a": ["mit"], "license": "mit"}


def test_messages_quote_values_in_part_only(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"source": ["x" * 1000] * 50}))
    with pytest.raises(ConfigError) as refused:
        load_config(str(path))
    assert len(str(refused.value)) < 400


def test_a_receipt_is_as_strict_as_it_was(out: Path) -> None:
    content = json.loads(shard_path(out, ".run/receipts/test-00000-of-00002.json").read_text())
    assert Receipt.model_validate(content).shard == "test-00000-of-00002"
    with pytest.raises(ValidationError):
        Receipt.model_validate({**content, "split": "../x"})


def test_a_manifest_nested_without_end(out: Path) -> None:
    (out / "manifest.json").write_text('{"format": 3, "config": ' + "[" * 200_000)
    with pytest.raises(PipelineError, match=rf"^{out}/manifest\.json "):
        require_manifest(OutputFolder(out))


def test_want_of_memory_is_a_sentence(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any) -> str:
        raise MemoryError

    monkeypatch.setattr("pipeline.output.summary.inspect", greedy)
    result = fgsm("inspect", out)
    assert result.exit_code == 1
    assert re.search(f"Error: .*{os.strerror(errno.ENOMEM)}.*runtime\\.batch_size", result.stderr)
