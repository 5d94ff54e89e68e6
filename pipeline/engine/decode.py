"""Decoding: any file that Pillow opens becomes uint8 pixels of the run's mode and size.

How every image becomes what `preprocess.mode` says:

    EXIF          the orientation is applied first
    16-bit gray   divided by 257, so that 65,535 becomes 255 (Pillow alone would clip at 255); 12-bit alike
    alpha         dropped, as torchvision's and `datasets`' loaders do; hidden colours show
    palette, CMYK, 1-bit, YCbCr   Pillow's conversion, ICC profiles ignored
    RGB to L      0.299 R + 0.587 G + 0.114 B (ITU-R 601-2); L to RGB repeats the channel
    animations    the first frame
    float pixels  refused: their range is not known; the same for 32-bit integers and signed ones

A header is believed before a pixel is decoded: what claims more than `runtime.max_pixels` is refused.

Then torchvision's resize (antialiased) and centre crop. A JPEG is decoded at its full size: decoding it at
half the size and resizing the rest (Pillow's draft mode) saves 6 ms on 900 pixels a side, and moved real
images by 1 to 3 grey levels on average and by up to 96.
"""

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor

from pipeline.config.schema import PreprocessConfig
from pipeline.core.errors import PipelineError, shortened
from pipeline.core.images import PILLOW_PIXELS, Opener, UndecodableError, is_of_the_machine, reason_of, to_tensor


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
            if isinstance(preprocess.resize, int):  # a thin strip is small until its shorter side is resized to 256
                scale = preprocess.resize / min(image.width, image.height)
                _check_pixels(round(image.width * scale), round(image.height * scale), max_pixels)
            pixels = _convert(_gray_to_8_bits(_upright(image), image), preprocess.mode)
            return _resize(pixels, preprocess)
    except UndecodableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UndecodableError(f"its pixels are more than runtime.max_pixels = {max_pixels}") from None
    except Exception as error:  # a broken file can raise anything from Pillow's parsers
        if not is_of_the_machine(error):
            raise UndecodableError(reason_of(error)) from None
        what = shortened(str(getattr(error, "filename", None) or "an image"))
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise PipelineError(
                f"source: {what} is missing, and missing files are not skipped; restore the file or its disk, then "
                "run the same command again (without the file it is a different source)."
            ) from None
        reason = "out of memory" if isinstance(error, MemoryError) else reason_of(error)
        raise PipelineError(
            f"source: {what} cannot be read ({reason}). The machine is at fault and not the image, so it is not "
            "skipped; fix that, then run the same command again."
        ) from None


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UndecodableError(f"{width}x{height} pixels are more than runtime.max_pixels = {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that cannot be parsed says nothing of the orientation; the pixels may be fine
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _gray_to_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Gray of 16 or 12 bits as 8 bits; any other image as it is. `opened` is the image before it was turned."""
    # Pillow has 16 bits of PNG and PPM as mode I too, whose values are then 0 to 65,535.
    if image.mode == "F" or (image.mode == "I" and opened.format not in ("PNG", "PPM")):
        # Nobody knows which value is white.
        raise UndecodableError(
            f"{'floating-point' if image.mode == 'F' else '32-bit or signed'} pixels have no fixed range"
        )
    if not image.mode.startswith("I"):
        return image
    # Turned upright, it no longer knows what it was read from.
    tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65_535
    values = np.clip(np.asarray(image).astype(np.int64), 0, white)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = white - values  # 0 is white, which Pillow heeds in 8 bits only
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where this step is left out
    # To the mode that it has, Pillow would copy it.
    return image if image.mode == mode else image.convert(mode)


def _resize(image: Image.Image, preprocess: PreprocessConfig) -> Tensor:
    if preprocess.resize is None and preprocess.crop is None:
        return to_tensor(image)
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
    return to_tensor(image)
