"""Images as bytes: the formats that are opened, and lossless encoding.

Only formats of FORMATS are opened, whatever else Pillow could: PostScript would run Ghostscript, and formats that
nobody keeps photographs in are parsers that nobody has attacked yet.
"""

import contextlib
import errno
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from imagecodecs import PNG, PngError, WebpError, png_encode, webp_encode
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.redaction import redact

if TYPE_CHECKING:
    from torch import Tensor

# The largest side of an image that is written. WebP's header holds 14 bits, and the encoder takes one pixel less;
# libpng refuses more.
MAX_SIDE = {"webp": 16_382, "png": 1_000_000}

# What the operating system says of a broken file, or of a path in a row that cannot be one. Any other error goes away
# or can be fixed, so it must not skip a row: a row that is skipped stays so.
IMAGE_ERRORS = (errno.EINVAL, errno.EOVERFLOW, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG)
# What images of datasets come in, as Pillow names it: JPEG is MPO too, PPM its whole family, BMP also DIB.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow calls files of these formats by their names alone.
NAMED_FORMATS = (*FORMATS, "MPO", "DIB")
# What pictures are stored in.
STORED_FORMATS = ("WEBP", "PNG")
# Pillow's own limit, above which it warns; above twice as much it refuses.
PILLOW_PIXELS = Image.MAX_IMAGE_PIXELS or 0

ImageFormat = Literal["webp", "png"]
Opener = Callable[[], Image.Image]


class UndecodableError(PipelineError):
    """An image that cannot become pixels; the message is the reason that is recorded."""


class OtherShapeError(UndecodableError):
    """A stored picture whose header says another shape than it should have; nothing of it was decoded."""


def open_image(file: Path | str | IO[bytes]) -> Image.Image:
    """Open an image of one of FORMATS; its pixels are decoded later. Errors are Pillow's, for what is none."""
    return Image.open(file, formats=FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings of names of images, in lower case: those of FORMATS, as Pillow has them."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in NAMED_FORMATS)


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as that of an image does, in letters of either case."""
    return PurePath(name).suffix.lower() in image_suffixes()


def is_of_the_machine(error: Exception) -> bool:
    """Whether memory, a disk or the network failed, or a file is gone: the same image may be read the next time."""
    # Pillow's own errors have no number.
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None and error.errno not in IMAGE_ERRORS
    )


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in words that are the same on every read."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of the stream
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"  # without the path, which is the machine's own
    return redact(f"{type(error).__name__}: {first_line(error)}")


def to_tensor(image: Image.Image) -> "Tensor":
    """(C, H, W) uint8, a view of pixels that lie channels last, as Pillow and the victims have them."""
    import torch  # here, as configs of sources are checked without it

    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def choose_format(channels: int, height: int, width: int) -> ImageFormat:
    """What `image_format: auto` means: WebP, which is smaller, but has no gray and no large images."""
    return "webp" if channels == 3 and max(height, width) <= MAX_SIDE["webp"] else "png"


def encode_images(images_u8: "Tensor", image_format: ImageFormat, *, smooth: bool = True) -> list[bytes]:
    """Encode N images losslessly.

    Args:
        images_u8: (N, C, H, W) uint8 on the CPU, C 1 or 3; WebP takes 3 only. Channels last in memory, there is
            nothing to copy.
        image_format: which takes images of `MAX_SIDE` pixels a side at most.
        smooth: whether neighbouring pixels are alike, as in photographs, and not in sign maps: PNG then stores how each
            differs from its neighbours.

    Raises:
        MemoryError: there is not enough.
    """
    return [_encode(pixels, image_format, smooth) for pixels in images_u8.permute(0, 2, 3, 1).numpy()]


def _encode(pixels: NDArray[np.uint8], image_format: ImageFormat, smooth: bool) -> bytes:
    # The encoders want the strides of a plain array, also along a side of one pixel.
    plain = pixels.ravel().reshape(pixels.shape if pixels.shape[2] == 3 else pixels.shape[:2])
    try:
        # Pillow would make an image and a stream in Python for each. WebP's bytes would be the same.
        if image_format == "webp":
            return bytes(webp_encode(plain, lossless=True, level=0, method=0))
        # Attacked pixels are close to noise: to look for more in them than runs, and to choose a filter for each line,
        # takes twice as long, and photographs become no smaller.
        filtering = PNG.FILTER.PAETH if smooth else PNG.FILTER.NONE
        # Bytes at most: a line has one more for its filter, which the encoder's own estimate leaves out. zlib adds at
        # most an eighth to what it cannot compress, and PNG 12 bytes to every 8 KiB and less than a hundred in all.
        filtered = plain.nbytes + len(plain)
        room = filtered + filtered // 4 + 1024
        return bytes(png_encode(plain, level=1, strategy=PNG.STRATEGY.RLE, filter=filtering, out=room))
    except (WebpError, PngError) as error:  # nothing else can go wrong with such sizes
        raise MemoryError(str(error)) from error


def open_stored(
    data: bytes, shape: Sequence[int] | None = None, formats: tuple[str, ...] = STORED_FORMATS
) -> Image.Image:
    """Open a stored picture; its pixels are decoded later, and only if it has the shape that it should have.

    Args:
        data: the encoded picture.
        shape: (C, H, W); None takes any that Pillow's own limit admits.
        formats: those that it may be of.

    Raises:
        OtherShapeError: it has another shape.
        OSError, ValueError, SyntaxError: it is no picture of such a format.
    """
    image = Image.open(io.BytesIO(data), formats=formats)
    if shape is not None and (len(image.getbands()), image.height, image.width) != tuple(shape):
        raise OtherShapeError(f"{image.width}x{image.height} in mode {image.mode}")
    return image


def decode_image(data: bytes, shape: Sequence[int] | None = None) -> "Tensor":
    """Read a stored image back, exactly, as (C, H, W) uint8; `shape` is the (C, H, W) that it must have, None for any.

    Raises:
        UndecodableError: the bytes are no image, or its header says another shape; then nothing is decoded.
    """
    with _stored(data, shape, STORED_FORMATS) as image:
        return to_tensor(image)


def decode_images(data: Sequence[bytes], image_format: ImageFormat, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Read N stored images of one shape back, exactly: (N, H, W, C) uint8.

    Args:
        data: the encoded images.
        image_format: theirs. Left to find out, Pillow tries one after the other: at 32 px as long as decoding takes.
        shape: (C, H, W) of each.

    Raises:
        UndecodableError: one is no image of that format and shape.
    """
    channels, height, width = shape
    pixels = []
    for encoded in data:
        with _stored(encoded, shape, (image_format,)) as image:
            pixels.append(image.tobytes())
    # All at once: an array of its own for every image would cost a tenth of its decoding.
    return np.frombuffer(bytearray().join(pixels), dtype=np.uint8).reshape(-1, height, width, channels)


@contextlib.contextmanager
def _stored(data: bytes, shape: Sequence[int] | None, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """A stored picture, of which nothing else is said than why it cannot be decoded; arguments as `open_stored`."""
    if shape is not None:  # which may lie past Pillow's own limit
        Image.MAX_IMAGE_PIXELS = max(PILLOW_PIXELS, shape[1] * shape[2])
    try:
        with open_stored(data, shape, formats) as image:
            yield image
    except (UndecodableError, MemoryError):  # for want of memory nothing is said of the image
        raise
    except Exception as error:  # as in read_image
        raise UndecodableError(reason_of(error)) from None
