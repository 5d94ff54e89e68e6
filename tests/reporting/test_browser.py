"""The report in a real browser."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.output.folder import ModelCounts
from pipeline.reporting.page import write_report
from pipeline.reporting.plots import RIGHT
from tests.conftest import (
    REPOSITORY,
    WriteConfig,
    fgsm,
    generate_once,
    rows,
)
from tests.support.page import NASTY, Page, make, opened, opened_png, self_labelled
from tests.support.several import write_several


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


Look = Callable[..., Any]


@pytest.fixture
def look(browser: Any) -> Iterator[Look]:
    """Open a page; what goes wrong in it fails the test at its end."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_sees_it(width: int, scheme: str, digits: Path, look: Look) -> None:
    page = look(digits / "report.html", width, scheme)
    assert page.evaluate(FITS)
    images = page.evaluate(
        "Promise.all([...document.images].map(image => image.decode().then(() => {"
        "  const box = image.getBoundingClientRect();"
        "  return [image.naturalWidth, box.width, box.height, image.currentSrc.length] })))"
    )
    assert len(images) == 3 + 2 + 9 * 6
    assert all(natural > 0 and shown > 80 and height > 80 for natural, shown, height, _ in images)
    plot = opened_png(page.query_selector(".accuracy img").screenshot()).convert("RGB")
    drawn = {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in plot.getcolors(1 << 20)}  # type: ignore[misc,union-attr]
    assert {"#ffffff", RIGHT} <= drawn
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(245, 246, 248)" if scheme == "light" else "rgb(15, 18, 23)")
    # What a plot shows must be large enough to read.
    smallest = page.evaluate("Math.min(...[...document.querySelectorAll('.plot img')].map(i => i.clientWidth))")
    assert smallest >= 320
    rendering = page.evaluate("getComputedStyle(document.querySelector('.strip img')).imageRendering")
    assert rendering == "pixelated"


@pytest.mark.parametrize("width", [1280, 390])
def test_what_the_attack_does_is_seen_before_anything_is_scrolled(width: int, digits: Path, look: Look) -> None:
    page = look(digits / "report.html", width)
    ends = page.evaluate(
        "[...document.querySelectorAll('.hero .says, .headline')].map(e => e.getBoundingClientRect().bottom)"
    )
    assert len(ends) == 3
    assert max(ends) <= 844


def test_a_table_says_that_it_scrolls_where_it_does(digits: Path, look: Look) -> None:
    """Counts and sessions do on a phone, nothing does on a wide screen."""
    hints = (
        "[...document.querySelectorAll('.scroll')].map(box => ["
        "  box.scrollWidth > box.clientWidth, parseFloat(getComputedStyle(box, '::before').height) > 10])"
    )
    assert look(digits / "report.html", 390).evaluate(hints) == [[True, True]] * 2
    page = look(digits / "report.html", 1280)
    assert page.evaluate(hints) == [[False, False]] * 2
    widths = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(b => b.firstElementChild.offsetWidth / b.clientWidth)"
    )
    assert min(widths) > 0.99


def test_the_marked_epsilon_is_so_without_colour(digits: Path, look: Look) -> None:
    page = look(digits / "report.html")
    marks = page.evaluate(
        "[...document.querySelectorAll('tbody th[scope=row]')].map(cell => ["
        "  cell.parentElement.getAttribute('aria-current'), getComputedStyle(cell, '::before').content])"
    )
    marked = [mark for mark in marks if mark != [None, "none"]]
    assert marked == [["true", '"▸ "']]


def test_the_first_tab_reaches_the_skip_link(digits: Path, look: Look) -> None:
    page = look(digits / "report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    order = []
    for _ in range(2):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert order == ["Counts at each epsilon", "Sessions"]


def test_names_of_classes_stay_text(write_config: WriteConfig, tmp_path: Path, look: Look) -> None:
    generate_once(write_config(**self_labelled(tmp_path, NASTY), attack={"epsilons": ["4/255", "32/255"]}))
    made = make(tmp_path / "out")
    assert "<script" not in made.text
    assert "onerror=" not in made.text.replace("onerror=&#34;", "")
    assert look(tmp_path / "out/report.html", 390).evaluate(FITS)
    page = look(tmp_path / "out/report.html", 1280)
    assert page.evaluate(FITS)
    assert "under FGSM" in page.title()
    shown = page.evaluate("[...document.querySelectorAll('.says bdi')].map(name => name.textContent)")
    assert {*shown} <= {name.strip() or "(no name)" for name in NASTY}
    assert len({*shown}) >= 5


def test_a_page_with_everything_fits(write_config: WriteConfig, tmp_path: Path, look: Look) -> None:
    config = yaml.safe_load(write_several(write_config, tmp_path).read_text())
    config["models"] |= {f"a_rather_long_name_of_a_model_{index}": config["models"]["net"] for index in range(3)}
    everything = {"epsilons": ["2/255", "4/255", "8/255", "16/255"]}
    config["attacks"] = {name: {"kind": name, **everything} for name in ("bim", "fgsm", "noise")}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    generate_once(tmp_path / "config.yaml")
    folder, manifest = opened(tmp_path / "out")
    write_report(folder, manifest.model_copy(update={"complete": False}))
    for width, whole in ((1280, 0.98), (390, 0.55)):
        page = look(Path(folder.store.at(folder.report)), width)
        assert page.evaluate(FITS)
        assert page.is_visible("text=Incomplete:")
        assert page.locator(".matrix:visible").count() == 4
        # What of a block is seen without scrolling.
        seen = page.evaluate(
            "[...document.querySelectorAll('.matrix')].map(m => m.parentElement.clientWidth / m.offsetWidth)"
        )
        assert min(seen) > whole


def test_a_page_without_rows_fits(write_config: WriteConfig, tmp_path: Path, look: Look) -> None:
    generate_once(write_config())
    for path in (tmp_path / "out").rglob("*.parquet"):
        path.unlink()
    make(tmp_path / "out")
    page = look(tmp_path / "out/report.html", 390)
    assert page.evaluate(FITS)
    assert page.is_visible("text=There is nothing to show yet")
    assert list((tmp_path / "out").glob("assets/*")) == []


# ------------------------------------------------------------------------------------------------------ on real images


DATA = REPOSITORY.parent / "shared/data"
CIFAR, RESNET20 = DATA / "cifar10-test-2000", DATA / "cifar10-resnet20.safetensors"
PLAIN = """
from torch import nn


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48 * 16, 10),
    )
"""
ATTACKED = 256


def train_plain(folder: Path) -> dict[str, Any]:
    """A small plain network, trained for seconds on rows that are not attacked; as a model of a config."""
    unseen = datasets.load_dataset(str(CIFAR), split="test").select(range(ATTACKED, 2000))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in unseen["img"]])
    images, labels = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255, torch.tensor(unseen["label"])
    namespace: dict[str, Any] = {}
    exec(PLAIN, namespace)
    model = namespace["plain"]()
    # By hand: the first optimizer of torch.optim imports its compiler, which takes seconds.
    weights = list(model.parameters())
    speeds = [torch.zeros_like(weight) for weight in weights]
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(64):
            slopes = torch.autograd.grad(F.cross_entropy(model(2 * images[batch] - 1), labels[batch]), weights)
            with torch.no_grad():
                for weight, speed, slope in zip(weights, speeds, slopes, strict=True):
                    weight -= 0.05 * speed.mul_(0.9).add_(slope)
    (folder / "plain.py").write_text(PLAIN)
    save_file(model.state_dict(), folder / "plain.safetensors")
    return {
        "kind": "factory",
        "name": f"{folder}/plain.py:plain",
        "weights": f"{folder}/plain.safetensors",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


@pytest.mark.skipif(not (CIFAR.is_dir() and RESNET20.is_file()), reason=f"there is no CIFAR-10 in {DATA}")
def test_real_images_a_trained_model_and_what_transfers_of_it(
    write_config: WriteConfig, tmp_path: Path, look: Look
) -> None:
    trained = {
        "kind": "factory",
        "name": "pipeline.models.resnet20:resnet20",
        "weights": str(RESNET20),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    config = write_config(
        # In its own order: the plain network has seen none of these.
        source={"path": str(CIFAR), "shuffle": False, "limit": ATTACKED},
        attack={"epsilons": ["8/255", "32/255"], "models": ["resnet20"]},
        output={"images_per_shard": 128},
        runtime={"batch_size": 64},
    )
    sections = yaml.safe_load(config.read_text())
    del sections["model"]
    sections["models"] = {"resnet20": trained, "plain": train_plain(tmp_path)}
    config.write_text(yaml.safe_dump(sections, sort_keys=False))
    assert fgsm("generate", config).exit_code == 0
    folder, manifest = opened(tmp_path / "out")
    clean, *attacked = manifest.subsets
    # The published accuracy is 81 % clean and 7 % at 8/255; the plain network must know more than to guess.
    assert clean.correct / ATTACKED > 0.7
    assert attacked[0].correct / ATTACKED < 0.2
    assert clean.models["plain"].correct / ATTACKED > 0.3
    frames = {level: rows(Path(folder.root), subset) for level, subset in ((0, "clean"), (8, "eps-8"), (32, "eps-32"))}
    page = Page(Path(folder.store.at(folder.report)))
    known = frames[0]["correct_plain"].to_numpy(dtype=bool)
    for subset in attacked:
        (row,) = page.tables[f"{subset.level}/255, test images"][1:]
        fooled, correct = (frames[subset.level][name].to_numpy(dtype=bool) for name in ("fooled", "correct_plain"))
        lost = known & ~correct
        expected = ModelCounts(
            correct=int(correct.sum()),
            lost=int(lost.sum()),
            exposed=int((fooled & known).sum()),
            transferred=int((fooled & lost).sum()),
        )
        assert subset.models["plain"] == expected
        assert row[0] == "fgsm on resnet20"
        assert row[2] == f"{100 * lost.sum() / known.sum():.1f}%{100 * correct.mean():.1f}%"
    # A step that a person sees carries further.
    small, large = (subset.models["plain"].lost for subset in attacked)
    assert small < large
    for width in (1280, 390):
        seen = look(Path(folder.store.at(folder.report)), width)
        assert seen.evaluate(FITS)
        widths = seen.evaluate(
            "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
        )
        # How many rows resist every epsilon is the model's affair: two groups at least, of three examples each.
        strips = len(page.all("ol"))
        assert strips >= 1 + 6
        # Two plots, three pictures of one example; clean, sign map and two epsilons of each example.
        assert len(widths) == 2 + 3 + (strips - 1) * 4
        assert all(widths)
