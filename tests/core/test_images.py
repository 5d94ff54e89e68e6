"""Images: every kind of file becomes the mode that was asked for, broken ones say why, and storage is exact."""

import errno
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import PipelineError
from pipeline.core.images import (
    MAX_SIDE,
    ImageFormat,
    UndecodableError,
    choose_format,
    decode_image,
    encode_images,
    open_image,
)
from pipeline.engine.decode import read_image
from tests.conftest import png_bytes, random_pixels

MAX_PIXELS = 1_000_000


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def opener(data: bytes) -> Callable[[], Image.Image]:
    return lambda: Image.open(io.BytesIO(data))


def read(data: bytes, *, max_pixels: int = MAX_PIXELS, **preprocess: Any) -> Tensor:
    return read_image(opener(data), PreprocessConfig(**preprocess), max_pixels)


def palette() -> Image.Image:
    """Two pixels: entry 0 is (200, 0, 0), entry 1 is (10, 20, 30)."""
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([200, 0, 0, 10, 20, 30])
    return image


def flat(mode: str, *colours: Any) -> Image.Image:
    """One row of pixels."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def gray(values: Sequence[Any], dtype: Any) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


RED, COLOUR = (200, 0, 0), (10, 20, 30)
# 0.299 R + 0.587 G + 0.114 B
LUMA = {RED: 60, COLOUR: 18, (255, 0, 0): 76, (0, 0, 255): 29, (40, 40, 40): 40}


def greys(*values: int) -> list[tuple[int, int, int]]:
    return [(value, value, value) for value in values]


def tiff_of_12_bits(first: int, second: int, third: int, fourth: int) -> bytes:
    """Four gray values of 12 bits each, which Pillow reads and does not write: little-endian, one strip."""
    packed = ((first << 36) | (second << 24) | (third << 12) | fourth).to_bytes(6, "big")
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    fields = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return struct.pack("<2sHI", b"II", 42, 14) + packed + struct.pack("<H", len(entries)) + fields + bytes(4)


@pytest.mark.parametrize(
    ("mode", "data", "pixels"),
    [
        ("1", encoded(flat("1", 0, 1)), greys(0, 255)),
        ("L", encoded(flat("L", 3, 250)), greys(3, 250)),
        ("L", encoded(flat("L", 3, 250), transparency=3), greys(3, 250)),
        ("LA", encoded(flat("LA", (3, 0), (250, 128))), greys(3, 250)),
        ("P", encoded(palette()), [RED, COLOUR]),
        ("P", encoded(palette(), transparency=0), [RED, COLOUR]),
        ("P", encoded(palette(), transparency=b"\x00\x80"), [RED, COLOUR]),
        ("P", encoded(palette(), "GIF", transparency=1), [RED, COLOUR]),
        ("RGB", encoded(flat("RGB", RED, COLOUR)), [RED, COLOUR]),
        ("RGB", encoded(flat("RGB", RED, COLOUR), transparency=RED), [RED, COLOUR]),
        ("RGBA", encoded(flat("RGBA", (*RED, 0), (*COLOUR, 128))), [RED, COLOUR]),
        ("CMYK", encoded(flat("CMYK", (0, 255, 255, 0), (0, 0, 0, 215)), "TIFF"), [(255, 0, 0), (40, 40, 40)]),
        ("I;16", encoded(gray([0, 257, 65535, 32896], np.uint16)), greys(0, 1, 255, 128)),
        # 128 away from a level rounds to the nearer one.
        ("I;16", encoded(gray([128, 129, 65406, 65407], np.uint16)), greys(0, 1, 254, 255)),
        ("I;16B", encoded(gray([0, 257, 65535], ">u2"), "TIFF"), greys(0, 1, 255)),
        ("I;16", encoded(gray([0, 257, 65535], np.uint16), "TIFF"), greys(0, 1, 255)),
        ("I;16", encoded(gray([0, 257, 65535], np.uint16), "JPEG2000", irreversible=False), greys(0, 1, 255)),
        # 0 is white.
        ("I;16", encoded(gray([0, 257, 65535], np.uint16), "TIFF", tiffinfo={262: 0}), greys(255, 254, 0)),
        ("I;16", tiff_of_12_bits(0, 16, 2048, 4095), greys(0, 1, 128, 255)),
        ("L", b"P5 3 1 255 \x00\x01\xff", greys(0, 1, 255)),
        ("L", b"P5 3 1 100 \x00\x32\x64", greys(0, 128, 255)),
        ("I", b"P5 3 1 65535 \x00\x00\x01\x01\xff\xff", greys(0, 1, 255)),
        ("I", b"P5 3 1 1023 \x00\x00\x02\x00\x03\xff", greys(0, 128, 255)),
        ("I", b"P2 3 1 4095 0 16 4095", greys(0, 1, 255)),
        ("RGB", b"P6 1 1 65535 \xff\xff\x00\x00\x00\x00", [(255, 0, 0)]),
    ],
)
def test_every_kind_of_pixel(mode: str, data: bytes, pixels: list[tuple[int, int, int]]) -> None:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
    rgb = read(data, mode="RGB")
    assert rgb.dtype == torch.uint8
    assert rgb.shape == (3, 1, len(pixels))
    assert [tuple(pixel) for pixel in rgb[:, 0].T.tolist()] == pixels
    luma = read(data, mode="L")
    assert luma.shape == (1, 1, len(pixels))
    assert luma.flatten().tolist() == [LUMA.get(pixel, pixel[0]) for pixel in pixels]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda pixels: pixels),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (5, lambda pixels: pixels.transpose(1, 0, 2)),
        (6, lambda pixels: np.rot90(pixels, k=-1)),
        (8, lambda pixels: np.rot90(pixels)),
    ],
)
def test_exif_orientation_is_applied(
    orientation: int, upright: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> None:
    pixels = random_pixels(1)[0, :2, :5]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(encoded(Image.fromarray(pixels), exif=exif))
    assert torch.equal(image, torch.from_numpy(upright(pixels).transpose(2, 0, 1).copy()))


def test_an_upright_image_is_still_known_to_have_16_bits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    tiff = encoded(gray([0, 257, 65535], np.uint16), "TIFF", tiffinfo={262: 0, 0x0112: 3})
    png = encoded(gray([0, 257, 65535], np.uint16), exif=exif)
    assert read(png, mode="L").flatten().tolist() == [255, 1, 0]
    assert read(tiff, mode="L").flatten().tolist() == [0, 254, 255]


def test_orientation_comes_before_resize_and_crop() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), exif=exif)
    assert read(data, resize=5).shape == (3, 10, 5)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert read(data)[:, 1, 1].tolist() == [255, 0, 0]


def test_file_is_closed_after_reading(tmp_path: Path) -> None:
    # An open file would end this test with a ResourceWarning.
    path = tmp_path / "image.png"
    path.write_bytes(png_bytes(random_pixels(1)[0]))
    assert read_image(partial(Image.open, path), PreprocessConfig(), MAX_PIXELS).shape == (3, 16, 16)


NOISE = encoded(Image.fromarray(random_pixels(1, side=64)[0]))


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (NOISE[: len(NOISE) // 2], {}, r"truncated"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-200], {}, r"(?i)truncated"),
        (b"", {}, r"cannot identify"),
        (b"not an image at all", {}, r"cannot identify"),
        (encoded(gray([0.5], np.float32), "TIFF"), {}, r"floating-point"),
        (b"Pf 1 1 -1.0 \x00\x00\x80\x3f", {}, r"floating-point"),
        (encoded(gray([40, 70_000], np.int32), "TIFF"), {}, r"32-bit or signed"),
        (encoded(gray([40, 200], np.int32), "TIFF", tiffinfo={339: 1}), {}, r"32-bit or signed"),
        (encoded(gray([40, 200], np.uint16), "TIFF", tiffinfo={339: 2}), {}, r"32-bit or signed"),
        (NOISE, {"max_pixels": 64 * 64 - 1}, r"64x64 .*runtime\.max_pixels = 4095"),
        # 400 pixels become 256 x 102,400.
        (
            encoded(Image.new("L", (400, 1))),
            {"resize": 256},
            r"102400x256 .*runtime\.max_pixels = 1000000",
        ),
    ],
)
def test_undecodable_image_says_why(data: bytes, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        read(data, **options)


@pytest.mark.parametrize("decode", [read, decode_image])
def test_reason_is_the_same_on_every_read(decode: Callable[[bytes], Tensor]) -> None:
    # Reasons are kept in receipts and the manifest, so they hold no addresses of objects.
    with pytest.raises(UndecodableError) as error:
        decode(b"not an image")
    assert "0x" not in str(error.value)


def test_max_pixels_admits_exactly_so_many() -> None:
    assert read(NOISE, max_pixels=64 * 64).shape == (3, 64, 64)


def test_max_pixels_may_lie_past_pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's default; more than twice that is an error
    data = encoded(Image.new("1", (9_500, 9_500), 1))
    with pytest.raises(Image.DecompressionBombWarning), Image.open(io.BytesIO(data)):
        pass
    image = read(data, mode="L", max_pixels=9_500 * 9_500)
    assert image.shape == (1, 9_500, 9_500)
    assert image[0, -1, -1] == 255
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(NOISE).shape == (3, 64, 64)


def test_stored_image_is_read_back_whatever_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Verify reads what a run with a raised max_pixels has stored, in a process that did not raise it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(NOISE, (3, 64, 64)).shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("size", "steps"),
    [
        ({"resize": 20}, [("resize", 20)]),
        ({"resize": 50}, [("resize", 50)]),
        ({"resize": [9, 13]}, [("resize", [9, 13])]),
        ({"crop": 7}, [("crop", 7)]),
        ({"crop": [6, 11]}, [("crop", [6, 11])]),
        ({"crop": [60, 9]}, [("crop", [60, 9])]),
        ({"resize": 20, "crop": 16}, [("resize", 20), ("crop", 16)]),
    ],
)
def test_resize_and_crop_are_torchvisions(
    size: dict[str, Any], steps: list[tuple[str, Any]], interpolation: str, mode: str
) -> None:
    image = Image.fromarray(random_pixels(1, side=64)[0, :31, :44])
    expected = image.convert(mode)
    for step, length in steps:
        expected = (
            transforms.Resize(length, transforms.InterpolationMode(interpolation), antialias=True)(expected)
            if step == "resize"
            else transforms.CenterCrop(length)(expected)
        )
    actual = read(encoded(image), interpolation=interpolation, mode=mode, **size)
    assert torch.equal(actual, transforms.PILToTensor()(expected))


FORMATS = [("webp", 3), ("png", 3), ("png", 1)]


@pytest.mark.parametrize(("image_format", "channels"), FORMATS)
@given(data=st.data())
@settings(max_examples=60)
def test_stored_pixels_are_exact(image_format: ImageFormat, channels: int, data: st.DataObject) -> None:
    sizes = st.tuples(st.integers(1, 3), st.just(channels), st.integers(1, 19), st.integers(1, 19))
    images = torch.from_numpy(data.draw(hnp.arrays(np.uint8, sizes)))
    stored = encode_images(images, image_format)
    assert len(stored) == len(images)
    assert torch.equal(torch.stack([decode_image(image) for image in stored]), images)
    assert stored == encode_images(images, image_format)
    assert stored[-1:] == encode_images(images[-1:], image_format)


@pytest.mark.parametrize(("image_format", "channels"), FORMATS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 48), (0, 1), (1, 0)])
def test_stored_noise_is_exact(image_format: ImageFormat, channels: int, height: int, width: int) -> None:
    """Also along the largest side, here 0."""
    height, width = height or MAX_SIDE[image_format], width or MAX_SIDE[image_format]
    images = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    stored = encode_images(images, image_format)
    assert torch.equal(torch.stack([decode_image(image) for image in stored]), images)
    with Image.open(io.BytesIO(stored[0])) as image:
        assert (image.format, image.mode) == (image_format.upper(), "RGB" if channels == 3 else "L")


@pytest.mark.parametrize(("image_format", "channels"), FORMATS)
def test_what_repeats_is_stored_in_little(image_format: ImageFormat, channels: int) -> None:
    """A single grey, with a line across, in less than a hundredth of its bytes; a ramp in less than a tenth."""
    flat = torch.full((1, channels, 256, 256), 200, dtype=torch.uint8)
    flat[:, :, 100] = 0
    ramp = torch.arange(256, dtype=torch.uint8) // 2
    for images, part in ((flat, 0.01), ((ramp + ramp[:, None]).expand(1, channels, -1, -1), 0.1)):
        (stored,) = encode_images(images, image_format)
        assert len(stored) < images.numel() * part
        assert torch.equal(decode_image(stored), images[0])


@pytest.mark.parametrize(("image_format", "channels"), FORMATS)
def test_sign_maps_are_no_smooth_images(image_format: ImageFormat, channels: int) -> None:
    """Each value in at most two bits, where it could be one of three."""
    signs = 127 * torch.randint(0, 3, (1, channels, 128, 128), dtype=torch.uint8)
    (stored,) = encode_images(signs, image_format, smooth=False)
    assert len(stored) < signs.numel() / 4
    assert torch.equal(decode_image(stored), signs[0])


def test_images_in_channels_last_memory_are_stored_alike() -> None:
    images = torch.from_numpy(random_pixels(2).transpose(0, 3, 1, 2).copy())
    for image_format in ("webp", "png"):
        assert encode_images(images.contiguous(memory_format=torch.channels_last), image_format) == encode_images(
            images, image_format
        )


ENCODE_WITHOUT_MEMORY = """
import resource, torch
from pipeline.core.images import encode_images
image = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(ROOM), -1))
held = []
while not ROOM:  # also what was freed and kept
    try:
        held.append(bytearray(2**16))
    except MemoryError:
        del held[0]  # room for what is returned, and not for an encoder
        break
try:
    encode_images(image, "FORMAT")
except MemoryError:
    del held
    print("no memory")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
encode_images(image[..., :8, :8], "FORMAT")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of the process from /proc")
@pytest.mark.parametrize(
    ("image_format", "side", "room"),
    [("webp", 8_000, 10e6), ("webp", 8_000, 400e6), ("png", 8_000, 10e6), ("webp", 1_000, 0), ("png", 64, 0)],
)
def test_encoding_that_gets_no_memory_says_so(image_format: str, side: int, room: float) -> None:
    """Before the pixels are taken over, and after: by Python and by the encoder, which works again once there is."""
    code = ENCODE_WITHOUT_MEMORY.replace("ROOM", str(room)).replace("SIDE", str(side)).replace("FORMAT", image_format)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "no memory\n", done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data", [b"", b"no image", NOISE[: len(NOISE) // 2]])
def test_stored_bytes_that_are_no_image(data: bytes) -> None:
    with pytest.raises(UndecodableError):
        decode_image(data)


@pytest.mark.parametrize(
    ("channels", "height", "width", "image_format"),
    [
        (3, 32, 32, "webp"),
        (3, 16_382, 1, "webp"),
        (3, 1, 16_382, "webp"),
        (3, 16_383, 1, "png"),
        (3, 1, 16_383, "png"),
        (1, 32, 32, "png"),
    ],
)
def test_automatic_format(channels: int, height: int, width: int, image_format: str) -> None:
    assert choose_format(channels, height, width) == image_format


def test_exif_that_cannot_be_parsed_does_not_cost_the_image() -> None:
    buffer = io.BytesIO()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(buffer, "PNG", exif=b"Exif\x00\x00no TIFF header")
    read = read_image(lambda: Image.open(io.BytesIO(buffer.getvalue())), PreprocessConfig(), 100)
    np.testing.assert_array_equal(read.permute(1, 2, 0).numpy(), pixels)


def test_a_reason_does_not_name_the_machine_s_own_paths(tmp_path: Path) -> None:
    with pytest.raises(UndecodableError, match=r"^IsADirectoryError: ") as caught:
        read_image(lambda: Image.open(tmp_path), PreprocessConfig(), 100)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/mnt/cat.png"), r"/mnt/cat\.png .*\(OSError: Input"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), r"\(OSError: Too many"),
        (TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), r"\(TimeoutError: "),
        (MemoryError(), "memory"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/mnt/cat.png"),
            r"/mnt/cat\.png .*\(PermissionError: ",
        ),
        (OSError(errno.EBUSY, os.strerror(errno.EBUSY)), r"\(OSError: "),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/mnt/cat.png"), r"/mnt/cat\.png "),
        (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/mnt/cat.png"), r"/mnt/cat\.png "),
    ],
)
def test_what_the_machine_fails_at_is_not_skipped_for_ever(error: Exception, named: str) -> None:
    def opener() -> Image.Image:
        raise error

    with pytest.raises(PipelineError, match=f"^source: .*{named}") as caught:
        read_image(opener, PreprocessConfig(), 100)
    assert type(caught.value) is PipelineError


@pytest.mark.parametrize("offset", [8, 2**31, 2**32 - 1])
def test_a_broken_file_is_not_the_machine_s_failure(tmp_path: Path, offset: int) -> None:
    """The operating system itself may refuse to go where a file points to."""
    path = tmp_path / "broken.tif"
    data = bytearray(encoded(Image.new("L", (8, 8)), "TIFF"))
    data[4:8] = offset.to_bytes(4, "little")
    path.write_bytes(data[:100])
    with pytest.raises(UndecodableError):
        read_image(partial(open_image, path), PreprocessConfig(), MAX_PIXELS)

    def seeks() -> Image.Image:
        with path.open("rb", buffering=0) as file:
            file.seek(-1)
        raise AssertionError

    with pytest.raises(UndecodableError, match=os.strerror(errno.EINVAL)):
        read_image(seeks, PreprocessConfig(), MAX_PIXELS)
