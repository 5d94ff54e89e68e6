"""Tars that are streamed, in the shapes that people pack them in: endings, links, litter, compression, false claims."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.check.verify import verify
from pipeline.core.errors import ConfigError, PipelineError, RowError
from pipeline.core.left_out import LeftOut, sum_left_out
from pipeline.sources.base import Source
from pipeline.sources.huggingface import HuggingFaceConfig
from pipeline.sources.registry import open_source
from tests.conftest import WriteConfig, fgsm, generate, manifest
from tests.support.files import serving, stream
from tests.support.sources import plan_for

# A member: its name, what it holds, and fields of its header.
Member = tuple[str, bytes, dict[str, Any]]
HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


def shade(value: int, kind: str = "PNG") -> bytes:
    """An image of one gray, which tells it from others."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def sample(row: int, ending: str = "png", kind: str = "PNG") -> list[Member]:
    """An image of gray 40 * row whose class is row."""
    return [(f"{row:04d}.{ending}", shade(40 * row, kind), {}), (f"{row:04d}.cls", b"%d" % row, {})]


def link(name: str, to: str, kind: bytes) -> Member:
    return (name, b"", {"type": kind, "linkname": to})


def pack(members: Sequence[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tars"
    path.mkdir()
    return path


Row = tuple[int | None, int]


def read(path: Path | str, *, need_labels: bool = True, **keys: Any) -> tuple[list[Row], tuple[LeftOut, ...]]:
    """The rows of a source as (gray, class), and what was left out; gray is a multiple of 40, as JPEG is not exact."""
    most = {"max_pixels": keys.pop("max_pixels")} if "max_pixels" in keys else {}
    source = open_source(
        HuggingFaceConfig(kind="huggingface", path=str(path), streaming=True, **keys), need_labels=need_labels, **most
    )
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    plan = plan_for(source)
    for _, table, left in source.tables(plan, plan.shards):
        left_out += left
        for cell, label in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
            gray = (
                None
                if cell["bytes"] is None
                else int(np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L")).flat[0])
            )
            rows.append((None if gray is None else 40 * round(gray / 40), label))
    return rows, sum_left_out(left_out)


def rows_of(count: int) -> list[Row]:
    return [(40 * row, row) for row in range(count)]


# ------------------------------------------------------------------------------------------------- images


def test_what_pillow_opens_by_its_name_is_an_image(folder: Path) -> None:
    kinds = [("jpg", "JPEG"), ("JPEG", "JPEG"), ("gif", "GIF"), ("Tif", "TIFF"), ("jfif", "JPEG"), ("jp2", "JPEG2000")]
    (folder / "0.tar").write_bytes(pack([part for row, kind in enumerate(kinds) for part in sample(row, *kind)]))
    assert read(folder)[0] == rows_of(6)


def test_the_first_tar_that_has_samples_says_what_they_hold(folder: Path) -> None:
    (folder / "0.tar").write_bytes(pack([]))
    (folder / "1.tar").write_bytes(pack(sample(0, "jpg", "JPEG")))
    (folder / "2.tar").write_bytes(pack(sample(1, "png")))
    assert read(folder)[0] == rows_of(2)


def test_a_sample_that_lacks_a_field_does_not_hide_it(folder: Path) -> None:
    first = [("README.md", b"of what follows", {}), sample(0)[0]]
    (folder / "0.tar").write_bytes(pack([*first, *sample(1), ("0001.txt", b"said", {})]))
    assert read(folder, need_labels=False, keep_columns=["txt"])[0] == [(None, -1), (0, -1), (40, 1)]


@pytest.mark.parametrize("members", [[], [("LICENSE", b"", {}), (".cache/0000.png", shade(0), {})]])
def test_tars_without_samples(folder: Path, members: list[Member]) -> None:
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(pack(members))
    with pytest.raises(ConfigError, match=r"^source: .* tars? .*samples"):
        read(folder)


@pytest.mark.parametrize(("first", "need_labels"), [(1, True), (0, True), (0, False)])
def test_a_tar_that_is_sorted_by_type_loses_no_label(folder: Path, first: int, need_labels: bool) -> None:
    parts = [sample(row)[part] for part in (first, 1 - first) for row in range(3)]
    (folder / "0.tar").write_bytes(pack(parts))
    with pytest.raises(PipelineError, match=r"^source: 0\.tar .*--sort=name"):
        read(folder, need_labels=need_labels)


def test_a_second_image_is_never_taken_for_the_first(folder: Path) -> None:
    mask: Member = ("0001.mask.png", shade(200), {})
    (folder / "0.tar").write_bytes(pack([*sample(0), mask, *sample(1)]))
    with pytest.raises(PipelineError, match=r"^source.*\b0001\b"):
        read(folder)
    (folder / "0.tar").write_bytes(pack([*sample(0), *sample(1), mask]))
    with pytest.raises(RowError, match=r"^source\.image_column: .* 0001 in 0\.tar .* 2 "):
        read(folder)
    assert read(folder, image_column="png")[0] == rows_of(2)


# -------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("kind", [HARD, SYMBOLIC])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_link_is_named(folder: Path, kind: bytes, packed: Callable[[bytes], bytes]) -> None:
    (folder / "0.tar").write_bytes(packed(pack([*sample(0), link("0001.png", "0000.png", kind)])))
    with pytest.raises(PipelineError, match=r"^source: 0001\.png in 0\.tar .*link"):
        read(folder, need_labels=False)


UNSTREAMED = {
    "__": [*sample(0), ("__1.png", shade(40), {}), ("__1.cls", b"1", {})],
    "kind": [*(part for row in range(6) for part in sample(row)), *sample(6, "webp", "WEBP")],
}


def unstreamed(folder: Path) -> Source:
    """Open tars as a run does that does not stream them."""
    config = HuggingFaceConfig(kind="huggingface", path=str(folder), label_column="cls")
    return open_source(config, need_labels=True)


@pytest.mark.parametrize("named", UNSTREAMED)
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_tar_of_which_datasets_would_leave_images_out_is_refused(
    folder: Path, named: str, packed: Callable[[bytes], bytes]
) -> None:
    (folder / "0.tar").write_bytes(packed(pack(UNSTREAMED[named])))
    with pytest.raises(PipelineError, match=rf"^source: \w+\.\w+ in 0\.tar .*{named}.*source\.streaming: true"):
        unstreamed(folder)


def test_a_tar_with_another_behind_it_is_refused_unstreamed_too(folder: Path) -> None:
    (folder / "0.tar").write_bytes(2 * pack(sample(0)))
    with pytest.raises(PipelineError, match=r"^source: 0\.tar "):
        unstreamed(folder)


def test_a_first_tar_without_samples_is_named_unstreamed(folder: Path) -> None:
    (folder / "0.tar").write_bytes(pack([]))
    (folder / "1.tar").write_bytes(pack(sample(0)))
    with pytest.raises(ConfigError, match=r"^source: 0\.tar .*source\.streaming: true"):
        unstreamed(folder)


def test_plain_tars_are_read_unstreamed(folder: Path) -> None:
    for row in range(3):
        (folder / f"{row}.tar").write_bytes(pack([*sample(row), (f"{row}.d/._x.png", b"", {})]))
    source = unstreamed(folder)
    assert source.labels["train"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"M"])
def test_what_is_neither_file_nor_link_is_named(folder: Path, kind: bytes) -> None:
    (folder / "0.tar").write_bytes(pack([*sample(0), ("0001.png", b"", {"type": kind})]))
    with pytest.raises(PipelineError, match=r"^source: 0001\.png in 0\.tar .*device"):
        read(folder)


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_file_is_named_and_not_unpacked(folder: Path, tmp_path: Path, form: str) -> None:
    with (tmp_path / "0001.png").open("wb") as file:
        file.truncate(3 * 2**30)
    subprocess.run(["tar", "-S", f"--format={form}", "-C", tmp_path, "-cf", folder / "0.tar", "0001.png"], check=True)
    assert (folder / "0.tar").stat().st_size < 100_000
    with pytest.raises(PipelineError, match=r"^source: 0001\.png in 0\.tar .*sparse"):
        read(folder, need_labels=False)


# ----------------------------------------------------------------------------------------- what is left out


def test_what_is_left_out_is_counted_and_said(write_config: WriteConfig, folder: Path, tmp_path: Path) -> None:
    litter = ["._0000.png", ".DS_Store", "__MACOSX/._0000.png", "__MACOSX/0000.png", "a/Thumbs.db", ".git/a.png"]
    others: list[Member] = [(name, b"litter", {}) for name in (*litter, "PaxHeaders.12/0000.png")]
    first = [("sub", b"", {"type": tarfile.DIRTYPE}), *others, ("LICENSE", b"free", {}), *sample(0)]
    (folder / "0.tar").write_bytes(pack([*first, ("./label", b"", {"type": b"V"})]))
    (folder / "1.tar").write_bytes(pack([*sample(1), ("LICENSE", b"free", {})]))
    log = generate(write_config(source=stream(folder)))
    left_out = {
        part["reason"]: (part["count"], part["first"]) for part in manifest(tmp_path / "out")["members_left_out"]
    }
    assert sorted(left_out.values()) == [(1, ["./label"]), (2, ["LICENSE"] * 2), (7, litter[:5])]
    assert manifest(tmp_path / "out")["rows"] == 2
    assert "LICENSE" in log
    assert "LICENSE" in fgsm("inspect", tmp_path / "out").stdout
    assert verify(tmp_path / "out", recompute=True).problems == []


def test_folders_are_left_out_silently(folder: Path) -> None:
    (folder / "0.tar").write_bytes(pack([("sub", b"", {"type": tarfile.DIRTYPE}), *sample(0)]))
    assert read(folder) == (rows_of(1), ())


# -------------------------------------------------------------------------------------------- compression

Pack = Callable[[bytes], bytes]
PACKED: dict[str, Pack] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
    "gz in parts": lambda content: gzip.compress(content[:1000]) + gzip.compress(content[1000:]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_compressed_tar_is_read_whatever_it_is_called(folder: Path, kind: str) -> None:
    (folder / "0.tar").write_bytes(PACKED[kind](pack([*sample(0), *sample(1)])))
    assert read(folder)[0] == rows_of(2)
    (folder / "0.tar").rename(folder / f"0.tar.{kind[:3].strip()}")
    assert read(folder)[0] == rows_of(2)
    assert read(folder, limit=2)[0] == rows_of(2)
    with serving(folder) as server:
        assert read(f"{server.url}/0.tar.{kind[:3].strip()}")[0] == rows_of(2)


@pytest.mark.parametrize("kind", PACKED)
def test_a_compressed_tar_that_breaks_off_is_named(folder: Path, kind: str) -> None:
    content = PACKED[kind](pack([*sample(0), *sample(1)]))
    (folder / "0.tar").write_bytes(content[: len(content) - 20])
    with pytest.raises(PipelineError, match=r"^source: 0\.tar "):
        read(folder)


def test_a_compressed_tar_is_checked_to_its_end(folder: Path) -> None:
    content = bytearray(gzip.compress(pack(sample(0))))
    content[-6] ^= 1
    (folder / "0.tar").write_bytes(content)
    with pytest.raises(PipelineError, match=r"^source: 0\.tar "):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\3\4" + bytes(2000), b"<!doctype html>" + b"x" * 2000])
def test_what_is_no_tar_is_called_so(folder: Path, content: bytes) -> None:
    (folder / "0.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^source: 0\.tar .* no tar"):
        read(folder)


# ------------------------------------------------------------------------------------------- false claims


CLAIMS = {
    "an image": ("0001.png", 2**42, tarfile.REGTYPE),
    "what nobody reads": ("0001.mp4", 2**62, tarfile.REGTYPE),
    "less than nothing": ("0001.mp4", -512, tarfile.REGTYPE),
    "a long name": ("././@LongLink", 3 * 2**30, b"L"),
    "a long link": ("././@LongLink", 3 * 2**30, b"K"),
    "a header": ("x", 3 * 2**30, b"x"),
    "a header of all": ("x", 3 * 2**30, b"g"),
}


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("what", CLAIMS)
def test_what_a_header_claims_is_not_believed(folder: Path, what: str, packed: Pack) -> None:
    name, size, kind = CLAIMS[what]
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    last = sample(0)[-1]
    before = pack(sample(0))
    end = before.index(last[0].encode()) + 512 + 512
    content = before[:end] + member.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000
    (folder / "0.tar").write_bytes(packed(content))
    with pytest.raises(PipelineError, match=rf"^source: 0\.tar .* {size:,} bytes"):
        read(folder)


def test_members_have_no_more_bytes_than_an_image_or_a_text_may(folder: Path) -> None:
    noise = bytes(17 * 2**20)
    (folder / "0.tar").write_bytes(pack([*sample(0), ("0000.json", noise, {})]))
    assert read(folder)[0] == rows_of(1), "nobody reads it"
    with pytest.raises(PipelineError, match=r"^source: 0000\.json in 0\.tar .*17,825,792"):
        read(folder, keep_columns=["json"])
    (folder / "0.tar").write_bytes(pack([sample(0)[0], ("0000.cls", noise, {})]))
    with pytest.raises(PipelineError, match=r"^source: 0000\.cls in 0\.tar .*17,825,792"):
        read(folder)
    (folder / "0.tar").write_bytes(pack([*sample(0), ("0001.png", shade(40) + noise, {}), sample(1)[1]]))
    assert read(folder)[0] == rows_of(2)
    with pytest.raises(PipelineError, match=r"^source: 0001\.png in 0\.tar .*runtime\.max_pixels"):
        read(folder, max_pixels=1)
