"""Images as bytes and as arrays: uint8 HWC, one channel (grey) or three (RGB)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from e2h.data import filesystem
from e2h.errors import InputError

MAX_PIXELS = 64_000_000
# Named one by one: what is not listed (EPS calls an interpreter, ...) is never tried on untrusted bytes.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


class CorruptImage(ValueError):  # noqa: N818 - a finding about a record, counted and named
    """Bytes that are no readable image; the record can be skipped and named."""


def decode(content: bytes) -> np.ndarray:
    """Decodes one image file.

    Grey stays grey (16 bits are scaled to 8), everything else becomes RGB; transparency is dropped; the EXIF
    orientation is applied; of an animation the first frame counts.

    Args:
      content: a PNG, JPEG, BMP, GIF, WebP, TIFF or PPM/PGM file.

    Returns:
      uint8 [H, W, 1] or [H, W, 3].

    Raises:
      CorruptImage: if the bytes can't be decoded.
      InputError: if the header declares more than 64 million pixels (a decompression bomb): refused, never skipped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files are no news to the user
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _refuse_bomb(image.size)
                return _to_array(ImageOps.exif_transpose(image))
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError(f"image=?: expected at most {MAX_PIXELS} pixels; remove or shrink it ({error})") from error
        except Exception as error:  # hostile bytes make decoders raise almost anything
            raise CorruptImage(_reason(content, error)) from error


def _refuse_bomb(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(f"image={width}x{height}: expected at most {MAX_PIXELS} pixels; remove or shrink it")


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "no content"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    return f"{type(error).__name__}: {error}"


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return _scale_16_bits(np.asarray(image))
    if image.mode == "F":
        raise CorruptImage("floating-point pixels have no known range")
    target = "L" if image.mode in ("1", "L", "LA") else "RGB"
    pixels = np.asarray(image.convert(target), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _scale_16_bits(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise CorruptImage("whole-number pixels outside [0, 65535]")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)[:, :, None]


def fit(image: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """Centre crop to a square, antialiased resize, channel conversion; a fixed public map of one record.

    Args:
      image: uint8 [H, W, 1 or 3].
      image_size: side of the result in pixels.
      channels: 1 (grey: the ITU-R 601 luma of a colour image) or 3 (grey is repeated).

    Returns:
      uint8 [image_size, image_size, channels]; the input's pixels where nothing has to change.
    """
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return _resize(_convert(image[top : top + side, left : left + side], channels), image_size)


def _convert(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(_pillow(image).convert("L"))[:, :, None]


def _resize(image: np.ndarray, image_size: int) -> np.ndarray:
    side = image.shape[0]
    if side == image_size:
        return image
    # A whole factor is plain area pooling; otherwise a windowed sinc.
    method = Image.Resampling.BOX if side % image_size == 0 else Image.Resampling.LANCZOS
    resized = np.asarray(_pillow(image).resize((image_size, image_size), method))
    return resized.reshape(image_size, image_size, image.shape[2])


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def encode_png(image: np.ndarray, notes: Mapping[str, str] | None = None) -> bytes:
    """PNG file of a uint8 [H, W, 1 or 3] image; lossless. `notes` become its text entries."""
    buffer, texts = io.BytesIO(), PngInfo()
    for name, value in (notes or {}).items():
        texts.add_text(name, value)
    _pillow(image).save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def grid(images: np.ndarray, columns: int, padding: int = 2) -> np.ndarray:
    """Lays images out row by row on a white ground.

    Args:
      images: uint8 [N, H, W, C], N >= 1.
      columns: images a row, >= 1; the last row may stay incomplete.
      padding: pixels between images and at the border.

    Returns:
      uint8 [rows * (H + padding) + padding, columns * (W + padding) + padding, C].
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    step_y, step_x = height + padding, width + padding
    sheet = np.full((rows * step_y + padding, columns * step_x + padding, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = padding + index // columns * step_y, padding + index % columns * step_x
        sheet[top : top + height, left : left + width] = image
    return sheet


def upscale(image: np.ndarray, min_side: int) -> np.ndarray:
    """Repeats pixels by the smallest whole factor that makes both sides of [H, W, C] at least `min_side`."""
    factor = max(1, -(-min_side // min(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def write_png(path: filesystem.Location, image: np.ndarray, notes: Mapping[str, str] | None = None) -> None:
    """Writes a uint8 [H, W, 1 or 3] image atomically with ordinary permissions (grids of releasable images)."""
    filesystem.write_bytes(path, encode_png(image, notes), filesystem.PUBLIC)
