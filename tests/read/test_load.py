"""Reading back: whatever the layout and the epsilon, the same rows, to the pixel."""

import gc
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

import pipeline
from pipeline.core.errors import ConfigError, PipelineError
from pipeline.core.lattice import sign_to_picture, step
from tests.conftest import (
    KINDS,
    LAYOUTS,
    WriteConfig,
    generate,
    generate_once,
    loaded_by,
    png_bytes,
    random_pixels,
    some_slow,
    write_parquet,
)

MADE = ("attack", "model")
ANSWERS = ("prediction", "confidence", "label_confidence", "correct", "fooled")


def plain(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that compare: images as their mode and bytes."""
    return [{**row, "image": (row["image"].mode, row["image"].tobytes())} for row in rows]


def array(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def write_all(write_config: WriteConfig, folder: Path, **sections: dict[str, Any]) -> None:
    """The same run in a folder for each layout, at 2/255 and 8/255."""
    for layout in LAYOUTS:
        generate(write_config(**{**sections, "output": {"layout": layout, "path": str(folder / layout)}}))


@pytest.mark.parametrize("kind", some_slow(KINDS, "plain", "unlabelled"))
def test_all_layouts_give_the_same_rows(write_config: WriteConfig, tmp_path: Path, kind: str) -> None:
    sections = KINDS[kind](tmp_path)
    write_all(write_config, tmp_path, **{**sections, "source": {"limit": 16, **sections.get("source", {})}})
    stored = datasets.load_dataset(str(tmp_path / "images"), "all", split="test")
    expected = plain(stored)
    small = [row for row in expected if row["epsilon"] == 2 / 255]
    # 3/255 and 255/255 were not recorded.
    assert {(row["attack"], row["model"]) for row in small} == {("fgsm", "make")}
    made: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for layout in LAYOUTS:
        # What streams decode and carry through: all of it is in these two kinds.
        for streaming in (False, True) if kind in ("gray", "unlabelled") else (False,):
            read = pipeline.load(tmp_path / layout, split="test", streaming=streaming)
            assert list(read.features) == read.column_names == stored.column_names
            assert {name: read.features[name] for name in stored.column_names[1:]} == {
                name: stored.features[name] for name in stored.column_names[1:]
            }
            assert plain(read) == expected
            one = pipeline.load(tmp_path / layout, ["2/255"], split="test", streaming=streaming)
            assert plain(one) == small
            other = pipeline.load(tmp_path / layout, ["255/255", 0, "3/255", "2/255"], "test", streaming)
            made[layout, streaming] = plain(other)
    first = made["images", False]
    assert all(rows == first for rows in made.values())
    count = len(small)
    assert [row["epsilon"] for row in first] == [k / 255 for k in (255, 0, 3, 2) for _ in range(count)]
    assert [(row["attack"], row["model"]) for row in first[count : 2 * count]] == [(None, None)] * count
    assert first[count : 2 * count] == expected[:count]
    assert first[3 * count :] == small
    clean, attacked = (stored.select(range(start, start + count)) for start in (0, 2 * count))
    for start, level in ((0, 255), (2 * count, 3)):
        for row, there, zero, eight in zip(first[start : start + count], small, clean, attacked, strict=True):
            sign = np.sign(array(eight["image"]) - array(zero["image"]))
            expected_image = np.clip(array(zero["image"]) + level * sign, 0, 255).astype(np.uint8)
            unknown = dict.fromkeys(ANSWERS)
            assert row == {
                **there,
                **unknown,
                "epsilon": level / 255,
                "image": (zero["image"].mode, expected_image.tobytes()),
            }


@given(st.data())
def test_any_step_follows_from_any_other(data: st.DataObject) -> None:
    from pipeline.layouts.stepped import SteppedImage

    shape = data.draw(st.sampled_from([(3, 4), (3, 4, 3)]))
    ends = st.one_of(st.sampled_from([0, 1, 254, 255]), st.integers(0, 255))
    clean = data.draw(arrays.arrays(np.uint8, shape, elements=ends))
    sign = data.draw(arrays.arrays(np.int8, shape, elements=st.integers(-1, 1)))
    recorded, wanted = data.draw(st.integers(1, 255)), data.draw(st.integers(1, 255))
    moved = np.clip(clean + recorded * sign.astype(np.int16), 0, 255).astype(np.uint8)
    picture = sign_to_picture(torch.from_numpy(sign)).numpy()
    expected = np.clip(clean + wanted * sign.astype(np.int16), 0, 255)
    for attacked, direction in ((False, picture), (True, moved)):
        cell = {"picture": png_bytes(clean), "direction": png_bytes(direction), "level": wanted}
        read = SteppedImage(attacked=attacked).decode_example(cell)
        np.testing.assert_array_equal(np.asarray(read), expected)
        assert read.mode == ("RGB" if len(shape) == 3 else "L")
    np.testing.assert_array_equal(step(torch.from_numpy(clean), torch.from_numpy(sign), wanted).numpy(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_splits_come_as_datasets_gives_them(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    images = [png_bytes(image) for image in random_pixels(12)]
    write_parquet(tmp_path / "two", images, [0, 1, 2] * 4, split="train")
    write_parquet(tmp_path / "two", images[:5], [0, 1, 2, 0, 1], split="test")
    source = {"path": str(tmp_path / "two"), "split": ["train", "test"]}
    generate_once(write_config(source=source, output={"layout": layout}))
    whole = pipeline.load(str(tmp_path / "out"), [0, "4/255"])
    assert isinstance(whole, datasets.DatasetDict)
    assert {name: (len(rows), rows.split) for name, rows in whole.items()} == {
        "train": (24, "train"),
        "test": (10, "test"),
    }
    streamed = pipeline.load(str(tmp_path / "out"), [0, "4/255"], streaming=True)
    assert isinstance(streamed, datasets.IterableDatasetDict)
    assert {name: plain(rows) for name, rows in streamed.items()} == {name: plain(rows) for name, rows in whole.items()}


@pytest.fixture(params=["signs, recorded", "signs", "signs-bits", "images", "wide"])
def view(request: pytest.FixtureRequest, write_config: WriteConfig, tmp_path: Path) -> Any:
    """Clean rows, then rows whose images are made on reading."""
    layout, _, recorded = request.param.partition(", ")
    generate_once(write_config(output={"layout": layout}))
    return pipeline.load(tmp_path / "out", [0, "8/255" if recorded else "5/255"], "test")


def test_a_view_can_be_used_as_stored_images_can(view: Any) -> None:
    level = round(255 * view[40]["epsilon"])
    image = array(view[45]["image"])
    assert abs(image - array(view[5]["image"])).max() == level
    np.testing.assert_array_equal(array(view["image"][45]), image)
    np.testing.assert_array_equal(array(view[40:50]["image"][5]), image)
    np.testing.assert_array_equal(array(view.select_columns(["image"])[45]["image"]), image)
    np.testing.assert_array_equal(view.with_format("numpy")[45]["image"], image)
    np.testing.assert_array_equal(view.with_format("torch")[45]["image"].permute(1, 2, 0), image)
    shuffled = view.shuffle(seed=0)
    place = view.add_column("row", list(range(80))).shuffle(seed=0)["row"][:].index(45)
    np.testing.assert_array_equal(array(shuffled[place]["image"]), image)
    np.testing.assert_array_equal(array(view.filter(lambda row: row["epsilon"] > 0)[5]["image"]), image)
    np.testing.assert_array_equal(array(datasets.concatenate_datasets([view, view])[125]["image"]), image)
    mapped = view.map(lambda row: {"twice": 2 * row["label"]})
    np.testing.assert_array_equal(array(mapped[45]["image"]), image)
    turned = view.map(lambda row: {"image": row["image"].rotate(90)})
    np.testing.assert_array_equal(array(turned[45]["image"]), np.rot90(image))


def test_a_view_is_pickled_as_the_way_to_make_it(view: Any) -> None:
    data = pickle.dumps(view)
    assert len(data) < 10_000 < view.data.nbytes / 3
    assert plain(pickle.loads(data)) == plain(view)
    loader = torch.utils.data.DataLoader(
        view.select_columns(["image"]).with_format("torch"),
        batch_size=16,
        num_workers=2,
        multiprocessing_context="forkserver",
    )
    read = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(read, view.with_format("torch")[:]["image"])


def test_a_view_is_never_written_as_what_it_is_not(view: Any, tmp_path: Path) -> None:
    file = tmp_path / "view.parquet"
    view.to_parquet(file)
    assert plain(datasets.load_dataset("parquet", data_files=str(file), split="train")) == plain(view)
    with pytest.raises(PipelineError, match=r"ds\.map\("):  # what push_to_hub calls
        datasets.table.embed_table_storage(view.data.table)
    unread = view.cast_column("image", datasets.Image(decode=False))[45]["image"]
    assert unread == {"bytes": None, "path": None}
    # The mend that the error names.
    features = datasets.Features({**view.features, "image": datasets.Image()})
    made = view.map(lambda row: {"image": row["image"]}, features=features)
    made.to_parquet(tmp_path / "x.parquet")
    again = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train")
    assert again.features["image"] == datasets.Image()
    assert plain(again) == plain(view)


@pytest.mark.parametrize("view", ["images"], indirect=True)
def test_readers_without_our_code_do_not_see_clean_images(view: Any, tmp_path: Path) -> None:
    file = tmp_path / "view.parquet"
    view.to_parquet(file)
    code = f"import datasets; datasets.load_dataset('parquet', data_files={str(file)!r}, cache_dir={str(tmp_path)!r})"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 1
    assert "SteppedImage" in elsewhere.stderr


def test_nothing_is_written_but_what_datasets_caches_anyway(view: Any) -> None:
    def cached() -> int:
        return sum(file.stat().st_size for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))

    size = cached()
    gc.collect()
    allocated = pa.total_allocated_bytes()
    again = pickle.loads(pickle.dumps(view))
    plain(again)
    assert cached() == size
    # The encoded images are the cache's own, not copies.
    gc.collect()
    assert pa.total_allocated_bytes() - allocated < size / 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_reads_a_few_rows_at_a_time(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    from pipeline.layouts.stepped import stepped_cells
    from pipeline.read import load as dataset

    generate_once(write_config(output={"layout": layout}))
    sizes, cells = [], stepped_cells

    def counting(pictures: pa.ChunkedArray, directions: pa.ChunkedArray | None, level: int) -> pa.ChunkedArray:
        sizes.append(len(pictures))
        return cells(pictures, directions, level)

    monkeypatch.setattr(dataset, "stepped_cells", counting)
    monkeypatch.setattr(dataset, "STREAMED_ROWS", 5)
    stream = pipeline.load(tmp_path / "out", ["3/255"], "test", streaming=True)
    next(iter(stream))
    assert sizes
    assert sum(sizes) <= 10
    assert len(list(stream)) == 40
    assert max(sizes) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_workers_share_a_stream(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    generate_once(write_config(output={"layout": layout}))
    stream = pipeline.load(tmp_path / "out", ["2/255", "3/255"], "test", streaming=True)
    assert stream.num_shards == 2 * 3
    columns = stream.select_columns(["source_index", "epsilon", "image"]).with_format("torch")
    loader = torch.utils.data.DataLoader(columns, batch_size=None, num_workers=2)
    rows = sorted((int(row["source_index"]), round(255 * float(row["epsilon"]))) for row in loader)
    assert rows == [(index, level) for index in range(40) for level in (2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overwritten_folder_gives_its_own_rows(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    config = write_config(output={"layout": layout})
    generate_once(config)
    first = pipeline.load(tmp_path / "out", ["3/255"], "test")
    generate(config, "--overwrite", "--set", "runtime.seed=1")
    second = pipeline.load(tmp_path / "out", ["3/255"], "test")
    assert first["source_index"][:] != second["source_index"][:]


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("epsilons", "named"),
    [
        (["8"], r"epsilons: 8 .* 8/255\.$"),
        ([0.001], r"epsilons: 0\.001 .*1/255"),
        (["large"], "epsilons: 'large' .*k/255"),
        (["8/255", 0.032], r"epsilons: 8/255 and 0\.032 .* 8/255;"),
        ([0, "0/255"], "epsilons: 0 and 0/255 .* 0/255;"),
        ([], r"epsilons: .*\[\]; .*'8/255'"),
        ("8/255", "epsilons: .*'8/255'; .*list"),
    ],
)
def test_epsilons_that_cannot_be_are_one_sentence(tmp_path: Path, epsilons: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        pipeline.load(tmp_path, epsilons)


def test_decimals_mean_what_they_mean_in_the_config(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output={"layout": "signs"}))
    read = pipeline.load(tmp_path / "out", [0.0, 0.0157, 0.0313725490], "test")
    assert sorted(set(read["epsilon"])) == [0, 4 / 255, 8 / 255]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_is_one_sentence(
    write_config: WriteConfig, tmp_path: Path, layout: str, streaming: bool
) -> None:
    generate_once(write_config(output={"layout": layout}))
    with pytest.raises(ConfigError, match=rf"^split: {tmp_path / 'out'} .*'train'; .* test\.$"):
        pipeline.load(tmp_path / "out", split="train", streaming=streaming)


CARD = """---
configs:
- config_name: signs
  data_files: [{split: test, path: '*.parquet'}]
---
"""


def test_folders_that_are_none_of_ours_are_one_sentence(image_parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = {
        tmp_path / "nowhere": f" {tmp_path / 'nowhere'}",
        tmp_path / "empty": f"^{tmp_path / 'empty'} ",
        image_parquet: rf"^{image_parquet} .*\bdefault\b",
    }
    for path, named in refused.items():
        with pytest.raises(ConfigError, match=named) as caught:
            pipeline.load(path)
        assert "\n" not in str(caught.value)
    (image_parquet / "README.md").write_text(CARD)
    with pytest.raises(ConfigError, match=rf"^{image_parquet} .*\bsigns .*columns"):
        pipeline.load(image_parquet)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_a_manifest_says_whether_other_epsilons_follow(
    write_config: WriteConfig, tmp_path: Path, layout: str
) -> None:
    generate_once(write_config(output={"layout": layout}))
    (tmp_path / "out/manifest.json").unlink()
    assert len(pipeline.load(tmp_path / "out", ["8/255"], "test")) == 40
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        pipeline.load(tmp_path / "out", ["3/255"], "test")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_former_format_are_one_sentence(write_config: WriteConfig, tmp_path: Path, layout: str) -> None:
    """As on the Hub, where only the rows tell: until format 5 they did not say what made them."""
    generate_once(write_config(output={"layout": layout}))
    (tmp_path / "out/manifest.json").unlink()
    card = tmp_path / "out/README.md"
    configs = yaml.safe_load(card.read_text().split("---")[1])["configs"]
    card.write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for path in (tmp_path / "out").rglob("*.parquet"):
        kept = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        if "attacks" in kept.column_names:
            features = kept.features
            entries = {name: value for name, value in features["attacks"].feature.items() if name not in MADE}
            former = [[{key: entry[key] for key in entries} for entry in row] for row in kept["attacks"]]
            kept = kept.remove_columns("attacks").add_column("attacks", former, feature=datasets.List(entries))
            kept = kept.select_columns(list(features))
        else:
            kept = kept.remove_columns(list(MADE))
        kept.to_parquet(path)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/out .*\bsubset .*columns"):
        pipeline.load(tmp_path / "out", split="test")


def test_damaged_files_are_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    generate_once(write_config(output={"layout": "signs"}))
    for file in (tmp_path / "out/signs").iterdir():
        file.write_bytes(b"cut short")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/out: .*\bsigns\b"):
        pipeline.load(tmp_path / "out")


def test_a_sign_map_with_other_values_is_one_sentence() -> None:
    from pipeline.layouts.stepped import SteppedImage

    clean, direction = random_pixels(1)[0], np.full((16, 16, 3), 254, dtype=np.uint8)
    for value in (1, 126, 128, 255):
        direction[3, 4, 1] = value
        cell = {"picture": png_bytes(clean), "direction": png_bytes(direction), "level": 4}
        with pytest.raises(PipelineError, match=r"\b0, 127 and 254;.*fgsm verify"):
            SteppedImage().decode_example(cell)


# ------------------------------------------------------------------------------------------------- importing


def test_importing_the_package_is_instant_and_load_is_there() -> None:
    assert not {"torch", "datasets", "pyarrow", "pipeline.read.load"} & loaded_by("import pipeline")
    assert "load" in pipeline.__all__
    assert not hasattr(pipeline, "unload")


@pytest.mark.slow
def test_reading_loads_neither_attack_nor_victim() -> None:
    loaded = {name for name in loaded_by("from pipeline import load") if name.startswith("pipeline.")}
    assert {name.split(".")[1] for name in loaded} == {"core", "config", "layouts", "output", "read"}
