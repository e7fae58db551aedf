"""Decoding of good, odd and hostile files; the crop, the resize and the grid."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e2h.data.images import CorruptImage, decode, encode_png, fit, grid, upscale, write_png
from e2h.errors import InputError


def save(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_is_lossless(rng: np.random.Generator, channels: int) -> None:
    image = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode_png(image)), image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM"])
def test_every_lossless_format_is_read(rng: np.random.Generator, form: str) -> None:
    colours = np.array([[[250, 10, 20], [0, 200, 90]], [[7, 8, 9], [255, 255, 255]]], dtype=np.uint8)
    content = save(Image.fromarray(colours), form, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(decode(content), colours)


def test_jpeg_is_read(rng: np.random.Generator) -> None:
    assert decode(save(Image.new("RGB", (9, 4), (200, 0, 0)), "JPEG")).shape == (4, 9, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255]),
        ("L", 77, [77]),
        ("LA", (77, 0), [77]),
        ("RGBA", (1, 2, 3, 0), [1, 2, 3]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_modes_become_grey_or_rgb(mode: str, colour: int | tuple[int, ...], expected: list[int]) -> None:
    image = decode(save(Image.new(mode, (2, 3), colour), "TIFF"))
    assert image.shape == (3, 2, len(expected))
    assert image[0, 0].tolist() == expected


def test_palette_becomes_rgb() -> None:
    image = Image.new("RGB", (2, 2), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode(save(image, transparency=0))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    values = np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)
    assert decode(save(Image.fromarray(values), form))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_floating_point_pixels_are_corrupt() -> None:
    with pytest.raises(CorruptImage, match="floating-point"):
        decode(save(Image.new("F", (2, 2)), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    assert decode(save(image, exif=exif))[:, 0, 0].tolist() == [0, 255]


def test_unreadable_bytes_are_corrupt(rng: np.random.Generator) -> None:
    whole = encode_png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    jpeg = save(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    for content in (
        b"",
        b"just a text",
        whole[: len(whole) // 2],
        jpeg[: len(jpeg) // 2],
        whole[:20],
        png_header(4, 4),
    ):
        with pytest.raises(CorruptImage):
            decode(content)


def test_an_interpreted_format_is_not_tried() -> None:
    with pytest.raises(CorruptImage, match="known format"):
        decode(save(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.parametrize("side", [8001, 10_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(side: int) -> None:
    with pytest.raises(InputError, match="at most 64000000 pixels"):
        decode(png_header(side, side))


def test_largest_allowed_size_is_only_corrupt() -> None:
    with pytest.raises(CorruptImage):
        decode(png_header(8000, 8000))


def test_fit_keeps_an_image_of_the_right_size(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(image, 8, 3), image)


def test_fit_crops_the_centre(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (8, 14, 1), dtype=np.uint8)
    np.testing.assert_array_equal(fit(image, 8, 1), image[:, 3:11])
    np.testing.assert_array_equal(fit(image.transpose(1, 0, 2), 8, 1), image[:, 3:11].transpose(1, 0, 2))


def test_fit_by_a_whole_factor_is_area_pooling(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    means = image.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    assert np.abs(fit(image, 4, 3) - means).max() < 1  # rounded once an axis


def test_fit_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (30, 15))[:, :, None]
    assert np.abs(fit(stripes, 20, 1)[5:-5, 5:-5].astype(int) - 128).max() < 64  # nearest would give 0 and 255


@pytest.mark.parametrize("size", [4, 11, 16])
def test_fit_converts_channels(rng: np.random.Generator, size: int) -> None:
    grey = rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
    rgb = fit(grey, size, 3)
    assert rgb.shape == (size, size, 3)
    np.testing.assert_array_equal(rgb[:, :, :1], fit(grey, size, 1))
    np.testing.assert_array_equal(fit(rgb, size, 1), rgb[:, :, :1])  # grey survives the way through RGB
    luma = fit(np.full((8, 8, 3), [255, 0, 0], dtype=np.uint8), size, 1)
    assert luma.shape == (size, size, 1)
    assert np.all(luma == round(0.299 * 255))


def test_grid_places_images_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(3, 2)
    sheet = grid(images, columns=2, padding=1)
    assert sheet.shape == (3 * 3 + 1, 2 * 4 + 1, 1)
    assert [int(sheet[1 + 3 * (i // 2), 1 + 4 * (i % 2), 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert np.all(sheet[0] == 255)
    assert np.all(sheet[7:9, 5:8] == 255)  # the missing sixth


def test_upscale_repeats_pixels() -> None:
    image = np.array([[[1], [2]]], dtype=np.uint8)
    np.testing.assert_array_equal(upscale(image, 3)[:, :, 0], [[1, 1, 1, 2, 2, 2]] * 3)
    np.testing.assert_array_equal(upscale(image, 1), image)


def test_write_png(tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    write_png(tmp_path / "grid.png", image)
    np.testing.assert_array_equal(decode((tmp_path / "grid.png").read_bytes()), image)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
