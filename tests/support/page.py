"""Reports for tests: what a page says, and datasets worth one."""

import html
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import Manifest, require_manifest
from pipeline.reporting.page import report
from tests.conftest import (
    png_bytes,
    random_pixels,
    write_parquet,
)

NASTY = (
    "<script>document.title = 'pwned'</script>",
    "\"'><img src=x onerror=\"document.title = 'pwned'\">",
    "long " * 40,
    "unbroken" * 40,
    "🐢 turtle",
    "\u202eقطة",
    "",
    "$\\nope{1}$ {{ 7 * 7 }}\n%",
)


class Page(HTMLParser):
    """What a page says: its tables as rows of texts by caption, its images, and the elements in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._rows: list[list[str]] = []
        self._into: list[str] | None = None
        self._caption: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._into = []
        elif tag == "caption":
            self._caption = self._into = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._into or ()).split()))
        elif tag == "table":
            self.tables["".join(self._caption)] = self._rows
        if tag in ("td", "th", "caption"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        """All text, its spaces made one, without markup."""
        body = self.text[self.text.index("<body>") :]
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def opened(folder: Path) -> tuple[OutputFolder, Manifest]:
    output = OutputFolder(folder)
    return output, require_manifest(output)


def make(folder: Path) -> Page:
    return Page(Path(report(folder)))


LINEAR = """
import torch
from torch import nn


class Linear(nn.Module):
    # Of a coarse image, around grey: it takes images of all colours for all classes.
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(48, classes, bias=False)

    def forward(self, x):
        return 20 * self.linear(nn.functional.adaptive_avg_pool2d(x - 0.5, 4).flatten(1))
"""


def self_labelled(folder: Path, names: Sequence[str], count: int = 60, side: int = 16) -> dict[str, dict[str, Any]]:
    """A dataset of noise of all colours, and a victim that reads it all right: it is labelled as the victim says.

    Returns:
        The sections of a config for both.
    """
    namespace: dict[str, Any] = {}
    exec(LINEAR, namespace)
    torch.manual_seed(0)  # runtime.seed
    model = namespace["Linear"](len(names)).eval()
    colours = np.random.RandomState(1).randint(0, 256, (count, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    pixels = (random_pixels(count, side) // 4 + 3 * (colours // 4)).astype(np.uint8)
    with torch.inference_mode():
        labels = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255).argmax(1).tolist()
    label = (datasets.ClassLabel(names=list(names)), labels)
    source = write_parquet(folder / "own", [png_bytes(image) for image in pixels], None, label=label)
    victim = folder / "linear.py"
    victim.write_text(LINEAR)
    model_section = {"name": f"{victim}:Linear", "kwargs": {"classes": len(names)}}
    return {"source": {"path": str(source)}, "model": model_section}


def opened_png(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
