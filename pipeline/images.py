"""Images on their way in and out: any file Pillow opens to uint8 pixels, and pixels to lossless bytes.

How every image becomes what `preprocess.mode` says:

    EXIF          the orientation is applied first
    16-bit gray   divided by 257, so that 65,535 becomes 255 (Pillow alone would clip at 255); 12-bit alike
    alpha         dropped, as torchvision's and `datasets`' loaders do; hidden colours show
    palette, CMYK, 1-bit, YCbCr   Pillow's conversion, ICC profiles ignored
    RGB to L      0.299 R + 0.587 G + 0.114 B (ITU-R 601-2); L to RGB repeats the channel
    animations    the first frame
    float pixels  refused: their range is not known; the same for 32-bit integers and signed ones

Only formats of FORMATS are opened, whatever else Pillow could: PostScript would run Ghostscript, and formats that
nobody keeps photographs in are parsers that nobody has attacked yet. A header is believed before a pixel is decoded:
what claims more than `runtime.max_pixels` is refused.

Then torchvision's resize (antialiased) and centre crop. A JPEG is decoded at its full size: decoding it at
half the size and resizing the rest (Pillow's draft mode) saves 6 ms on 900 pixels a side, and moved real
images by 1 to 3 grey levels on average and by up to 96.
"""

import errno
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import IO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from pipeline.config import PreprocessConfig
from pipeline.errors import PipelineError, first_line, shortened
from pipeline.guard import redact

# The largest side of a WebP image: its header holds 14 bits.
WEBP_MAX_SIDE = 16_383

# What the operating system says of a broken file, or of a path in a row that can be none. Whatever else it says passes
# or is mended, and a row that is skipped is so for ever.
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
    """Open an image of one of FORMATS; its pixels are decoded later.

    Raises:
        OSError, ValueError, SyntaxError: as Pillow, for what is none.
    """
    return Image.open(file, formats=FORMATS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings of names of images, in lower case: those of FORMATS, as Pillow has them."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in NAMED_FORMATS)


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as that of an image does, in letters of either case."""
    return PurePath(name).suffix.lower() in image_suffixes()


def read_image(opener: Opener, preprocess: PreprocessConfig, max_pixels: int) -> Tensor:
    """Open, decode, convert, resize and crop one image.

    Args:
        opener: opens the image; decoding may be left to us.
        preprocess: mode, size and interpolation.
        max_pixels: larger images, before or after resizing, are refused unread.

    Returns:
        (C, H, W) uint8.

    Raises:
        UndecodableError: the file is broken, too large, or of a kind that has no 8-bit meaning.
        PipelineError: the machine failed and not the file.
    """
    # Pillow's own limit would stand in the way of a max_pixels that was raised on purpose. It is not taken away: a
    # dataset of torchvision decodes before it is asked for the size.
    Image.MAX_IMAGE_PIXELS = max(PILLOW_PIXELS, max_pixels)
    try:
        with opener() as image:
            _check_pixels(image.width, image.height, max_pixels)
            _check_resized(image.width, image.height, preprocess, max_pixels)
            pixels = _convert(_gray_to_8_bits(_upright(image), image), preprocess.mode)
        return _resize(pixels, preprocess)
    except UndecodableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UndecodableError(f"its pixels are more than runtime.max_pixels = {max_pixels}") from None
    except Exception as error:  # a broken file can raise anything from Pillow's parsers
        if not is_of_the_machine(error):
            raise UndecodableError(_reason(error)) from None
        what = shortened(str(getattr(error, "filename", None) or "an image"))
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise PipelineError(
                f"source: {what} is not there, which is no fault of the image, so it is not skipped; bring the file or "
                "its disk back, then run the same command again (without the file the source is another one)."
            ) from None
        reason = "out of memory" if isinstance(error, MemoryError) else _reason(error)
        raise PipelineError(
            f"source: {what} cannot be read ({reason}), which is the machine's failure and not the image's, so it is "
            "not skipped; mend that, then run the same command again."
        ) from None


def is_of_the_machine(error: Exception) -> bool:
    """Whether memory, a disk or the network failed, or a file is gone: the same image may be read the next time."""
    # Pillow's own errors have no number.
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None and error.errno not in IMAGE_ERRORS
    )


def _reason(error: Exception) -> str:
    """Why an image could not be read, in words that are the same on every read."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of the stream
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"  # without the path, which is the machine's own
    return redact(f"{type(error).__name__}: {first_line(error)}")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UndecodableError(f"{width}x{height} pixels are more than runtime.max_pixels = {max_pixels}")


def _check_resized(width: int, height: int, preprocess: PreprocessConfig, max_pixels: int) -> None:
    """A thin strip is small until its shorter side is resized to 256."""
    if isinstance(preprocess.resize, int):
        scale = preprocess.resize / min(width, height)
        _check_pixels(round(width * scale), round(height * scale), max_pixels)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that cannot be parsed says nothing of the orientation; the pixels may be fine
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _gray_to_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Gray of 16 or 12 bits as 8 bits; any other image as it is.

    Args:
        image: the pixels.
        opened: the same image as it was opened: turned upright, it no longer knows what it was read from.

    Raises:
        UndecodableError: nobody knows which value is white.
    """
    # Pillow has 16 bits of PNG and PPM as mode I too, whose values are then 0 to 65,535.
    if image.mode == "F" or (image.mode == "I" and opened.format not in ("PNG", "PPM")):
        raise UndecodableError(
            f"{'floating-point' if image.mode == 'F' else '32-bit or signed'} pixels have no fixed range"
        )
    if not image.mode.startswith("I"):
        return image
    tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65_535
    values = np.clip(np.asarray(image).astype(np.int64), 0, white)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = white - values  # 0 is white, which Pillow heeds in 8 bits only
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where this step is left out
    return image.convert(mode)


def _resize(image: Image.Image, preprocess: PreprocessConfig) -> Tensor:
    if preprocess.resize is None and preprocess.crop is None:
        return _to_tensor(image)
    # Imported where it is needed: torchvision takes as long to import as torch itself.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    if preprocess.resize is not None:
        size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
        image = transforms.resize(image, size, InterpolationMode(preprocess.interpolation), antialias=True)
    if preprocess.crop is not None:
        image = transforms.center_crop(
            image, preprocess.crop if isinstance(preprocess.crop, int) else list(preprocess.crop)
        )
    return _to_tensor(image)


def _to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8, a view of pixels that lie channels last, as Pillow and the victims have them."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def choose_format(channels: int, height: int, width: int) -> ImageFormat:
    """What `image_format: auto` means: WebP is smaller and 3 to 9 times faster, but has limits."""
    return "webp" if channels == 3 and max(height, width) <= WEBP_MAX_SIDE else "png"


def encode_images(images_u8: Tensor, image_format: ImageFormat) -> list[bytes]:
    """Encode images losslessly.

    Args:
        images_u8: (N, C, H, W) uint8 on the CPU, C 1 or 3; WebP takes 3 only. Channels last in memory, there is
            nothing to copy.
        image_format: measured on 224-px images: WebP at its fastest takes 1.5 to 3.6 ms, PNG 5.

    Returns:
        N encoded images.
    """
    return [_encode(pixels, image_format) for pixels in images_u8.permute(0, 2, 3, 1).numpy()]


def _encode(pixels: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]))
    buffer = io.BytesIO()
    if image_format == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        # Level 1: attacked pixels are close to noise, and more effort buys 9% at twice the time.
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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


def decode_image(data: bytes, shape: Sequence[int] | None = None) -> Tensor:
    """Read a stored image back, exactly.

    Args:
        data: the encoded image.
        shape: (C, H, W) that it must have, checked before anything is decoded; None takes any.

    Returns:
        (C, H, W) uint8.

    Raises:
        UndecodableError: the bytes are no image, or one of another shape.
    """
    _admit(shape)
    try:
        with open_stored(data, shape) as image:
            return _to_tensor(image)
    except (UndecodableError, MemoryError):  # for want of memory nothing is said of the image
        raise
    except Exception as error:  # as in read_image
        raise UndecodableError(_reason(error)) from None


def decode_images(data: Sequence[bytes], image_format: ImageFormat, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Read stored images of one shape back, exactly.

    Args:
        data: N encoded images.
        image_format: theirs. Left to find out, Pillow tries one after the other: at 32 px as long as decoding takes.
        shape: (C, H, W) of each.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        UndecodableError: one is no image of that format and shape.
    """
    _admit(shape)
    channels, height, width = shape
    pixels = []
    for encoded in data:
        try:
            with open_stored(encoded, shape, (image_format,)) as image:
                pixels.append(image.tobytes())
        except (UndecodableError, MemoryError):
            raise
        except Exception as error:  # as in read_image
            raise UndecodableError(_reason(error)) from None
    # All at once: an array of its own for every image would cost a tenth of its decoding.
    return np.frombuffer(bytearray().join(pixels), dtype=np.uint8).reshape(-1, height, width, channels)


def _admit(shape: Sequence[int] | None) -> None:
    """Let Pillow open images of a shape, which may lie past its own limit."""
    if shape is not None:
        Image.MAX_IMAGE_PIXELS = max(PILLOW_PIXELS, shape[1] * shape[2])
