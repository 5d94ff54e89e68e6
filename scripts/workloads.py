"""What the benchmark runs on: workloads, each one or several models and a Parquet file of encoded images.

Every contender reads the same file, through the same config; the images are repeated until there are enough.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.sources.digits import digits_split

ROOT = Path(__file__).resolve().parent.parent
# Different synthetic images; more would only take longer to make.
SYNTHETIC = 64
ROWS_PER_WRITE = 512
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

Encoded = tuple[bytes, int]


@dataclass(frozen=True)
class Workload:
    """A model, or several, and how much of what it is shown.

    model and preprocess are sections of the config; more_models are further ones by their ids, which attack as well.
    `images` of our own contender and its bound, `peer_images` of the others, whose rates are as steady and lower.
    """

    name: str
    title: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    levels: tuple[int, ...]
    batch_size: int
    images: int
    peer_images: int
    more_models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def photographs(self) -> bool:
        """Whether images are large, so that what is stored of them counts."""
        return "crop" in self.preprocess


def _factory(module: str, name: str) -> dict[str, Any]:
    return {"kind": "factory", "name": f"pipeline.models.{module}:{name}", **IMAGENET}


RESNET20 = _factory("resnet20", "resnet20")


def _imagenet(name: str, batch_size: int, images: int, peer_images: int) -> Workload:
    return Workload(
        name=name,
        title=f"torchvision {name}, 224 px from JPEGs",
        model={"kind": "torchvision", "name": name, **IMAGENET},
        preprocess={"resize": 256, "crop": 224},
        levels=(1, 2, 4, 8),
        batch_size=batch_size,
        images=images,
        peer_images=peer_images,
    )


# The numbers of images are those of a 2-core machine: about a minute for each contender and round.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="cifar",
            title="CIFAR ResNet-20, 32 px",
            model=RESNET20,
            preprocess={},
            levels=(1, 2, 4, 8),
            batch_size=256,
            images=20_000,
            peer_images=2_048,
        ),
        Workload(
            name="three-models",
            title="CIFAR ResNet-20, a plain CNN and an MLP, 32 px: each attacked, each looking at all images",
            model=RESNET20,
            preprocess={},
            levels=(2, 8),
            batch_size=256,
            images=8_192,
            peer_images=2_048,
            more_models={name: _factory("small_models", name) for name in ("cnn", "mlp")},
        ),
        Workload(
            name="data-plane",
            title="a model that costs nothing, 32 px: everything but the model",
            model=_factory("small_models", "free") | {"kwargs": {"classes": 10}},
            preprocess={},
            levels=(1, 2, 4, 8),
            batch_size=256,
            images=98_304,
            peer_images=2_048,
        ),
        _imagenet("resnet18", batch_size=64, images=512, peer_images=192),
        _imagenet("resnet50", batch_size=32, images=256, peer_images=96),
        Workload(
            name="digits",
            title="digits CNN, 64 px, grayscale",
            model={"kind": "digits"},
            preprocess={"mode": "L"},
            levels=(8, 16, 32, 64),
            batch_size=256,
            images=16_384,
            peer_images=4_096,
        ),
    )
}


def encoded_images(workload: Workload, parquet: Path | None, images: Path | None) -> list[Encoded]:
    """The different images of a workload, as encoded bytes, and their classes.

    Args:
        workload: it decides which of the folders is meant for it.
        parquet: a Hub-style folder of Parquet files for `cifar`, else synthetic images.
        images: a folder of class folders of JPEGs for the photographs, else synthetic ones.

    Raises:
        ValueError: the folder holds no such images.
    """
    if workload.name == "digits":
        pixels, labels = digits_split("train")
        return [
            (_encode(Image.fromarray(image), "PNG"), int(label)) for image, label in zip(pixels, labels, strict=True)
        ]
    if workload.photographs:
        return _folder(images) if images else _synthetic([(500, 375), (375, 500), (500, 333), (480, 360)], classes=1000)
    return _parquet(parquet) if parquet else _synthetic([(32, 32)], classes=10)


def write_source(images: Sequence[Encoded], count: int, folder: Path) -> None:
    """Write a Hub-style folder of `count` rows, the images over and over, a bounded number of rows at a time."""
    folder.mkdir(parents=True)
    schema = FEATURES.arrow_schema
    rows = cycle(images)
    with pq.ParquetWriter(folder / "test-00000-of-00001.parquet", schema) as writer:
        for start in range(0, count, ROWS_PER_WRITE):
            part = list(islice(rows, min(ROWS_PER_WRITE, count - start)))
            columns = {
                "image": [{"bytes": data, "path": None} for data, _ in part],
                "label": [label for _, label in part],
            }
            writer.write_table(pa.table(columns, schema=schema))


def _parquet(folder: Path) -> list[Encoded]:
    files = sorted(folder.glob("**/*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no Parquet files.")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    images = [field.name for field in table.schema if pa.types.is_struct(field.type)]
    labels = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    if not images or not labels:
        raise ValueError(f"{folder} needs a column of images and one of integer labels.")
    pairs = zip(table[images[0]].to_pylist(), table[labels[0]].to_pylist(), strict=True)
    return [(image["bytes"], label) for image, label in pairs]


def _folder(folder: Path) -> list[Encoded]:
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"{folder} holds no class folders of JPEG files.")
    classes = sorted({path.parent.name for path in files})
    return [(path.read_bytes(), classes.index(path.parent.name)) for path in files]


def _synthetic(sizes: Sequence[tuple[int, int]], classes: int) -> list[Encoded]:
    generator = np.random.default_rng(0)
    return [
        # Quality 85 gives a photograph's 0.5 bytes a pixel: 100 KB at 500x375.
        (_encode(pink_noise(generator, *size), "JPEG", quality=85), int(generator.integers(classes)))
        for size in islice(cycle(sizes), SYNTHETIC)
    ]


def pink_noise(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls as 1/f, as a photograph's does (Field 1987), mostly grey.

    So it costs a codec about as much as a photograph.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    phases = generator.standard_normal((4, 2, *frequency.shape))
    spectrum = (phases[:, 0] + 1j * phases[:, 1]) / np.maximum(frequency, 1 / max(width, height))
    noise = np.fft.irfft2(spectrum, (height, width))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 52 * noise[:1] + 16 * noise[1:]  # luminance first, then what red, green and blue have of their own
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
