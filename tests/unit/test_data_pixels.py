import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.pixels import UnreadableImageError, canonical, decode, sample_id
from pipeline.data.spec import ImageSpec
from pipeline.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def raw(image, size=4, channels=3) -> np.ndarray:
    spec = ImageSpec(size=size, channels=channels)
    return np.frombuffer(canonical(image, spec, "here").payload, np.uint8).reshape(spec.shape)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_pixels_are_the_same_raw_or_encoded_and_from_an_array_or_a_file(height, width, channels, seed):
    pixels = noise(height, width, channels, seed=seed)
    image = pixels[:, :, 0] if channels == 1 else pixels
    specs = [ImageSpec(size=(height, width), channels=channels, storage=kind) for kind in ("raw", "encoded")]
    found = [canonical(source, spec, "here") for source in (image, encoded(Image.fromarray(image))) for spec in specs]
    assert {one.sample_id for one in found} == {sample_id(pixels.transpose(2, 0, 1))}
    for one, spec in zip(found, specs * 2, strict=True):
        content = (
            np.frombuffer(one.payload, np.uint8).reshape(spec.shape)
            if spec.storage == "raw"
            else decode(one.payload, spec.shape)
        )
        assert (content == pixels.transpose(2, 0, 1)).all()


def test_the_shape_is_part_of_the_id():
    assert sample_id(np.zeros((1, 2, 8), np.uint8)) != sample_id(np.zeros((1, 4, 4), np.uint8))


def test_a_file_that_already_fits_keeps_its_bytes():
    spec = ImageSpec(size=4, channels=3, storage="encoded")
    jpeg = encoded(Image.fromarray(noise(4, 4, 3)), "JPEG")
    assert canonical(jpeg, spec, "here").payload == jpeg
    larger = encoded(Image.fromarray(noise(5, 5, 3)), "JPEG")
    assert canonical(larger, spec, "here").payload != larger


def test_a_wide_image_is_scaled_and_loses_its_sides():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :4, 0] = 255  # what the cut takes away
    image[:, 4:12, 1] = 200
    assert (raw(image) == np.array([0, 200, 0], np.uint8)[:, None, None])[:, :, 1:-1].all()


def test_scaling_down_averages_rather_than_picks():
    checkerboard = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    small = raw(checkerboard, channels=1)
    assert 120 <= small.min() and small.max() <= 135


def test_modes_are_converted():
    grey = noise(4, 4)
    assert (raw(grey) == grey).all()  # three equal channels
    palette = Image.fromarray(noise(4, 4, 3)).quantize(4)
    assert (raw(encoded(palette)) == np.asarray(palette.convert("RGB")).transpose(2, 0, 1)).all()
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert (raw(red, channels=1) == 76).all()  # 0.299 · 255
    assert raw(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))[0].min() > 200
    assert raw(encoded(Image.new("1", (4, 4), 1))).min() == 255


def test_an_opaque_alpha_channel_is_dropped_and_orientation_applied():
    colours = noise(4, 4, 3)
    opaque = np.concatenate([colours, np.full((4, 4, 1), 255, np.uint8)], axis=2)
    assert (raw(encoded(Image.fromarray(opaque))) == colours.transpose(2, 0, 1)).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    turned = raw(encoded(Image.fromarray(colours), exif=exif))
    assert (turned == colours[::-1, ::-1].transpose(2, 0, 1)).all()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def many_pixels() -> bytes:
    return encoded(Image.new("1", (9000, 8000)))  # over our limit, below the one of which Pillow warns


TRUNCATED = encoded(Image.fromarray(noise(32, 32, 3)))[:-200]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "known format"),
        (b"not an image", "known format"),
        (TRUNCATED, "(?i)truncated"),
        (encoded(Image.fromarray(noise(32, 32, 3)), "JPEG")[:400], "(?i)truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "known format"),
        (bomb(), "DecompressionBomb"),
        (many_pixels(), "9000 x 8000 pixels"),
        (encoded(Image.fromarray(noise(4, 4, 4))), "transparent pixels"),
        (encoded(Image.new("LA", (4, 4), (9, 9))), "transparent pixels"),
        (encoded(Image.fromarray(np.full((4, 4), 1000, np.uint16))), "8 bits a channel"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "8 bits a channel"),
    ],
)
def test_what_cannot_serve_is_unreadable(content, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        canonical(content, ImageSpec(size=4), "here")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]), st.data())
def test_damaged_bytes_never_raise_anything_else(kind, data):
    content = bytearray(encoded(Image.fromarray(noise(8, 8, 3)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        canonical(bytes(content), ImageSpec(size=8), "here")
    except UnreadableImageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise(4, 4, 4), r"row 3: image array has shape \(4, 4, 4\)"),
        (noise(3, 4, 4), r"shape \(3, 4, 4\)"),
        (noise(4), r"shape \(4,\)"),
        (noise(0, 4), r"shape \(0, 4\)"),
        (noise(4, 4).astype(np.float32), "is float32; convert it to uint8"),
        (noise(4, 4) > 9, "is bool"),
    ],
)
def test_an_array_of_the_wrong_kind_is_an_error_of_the_source(array, message):
    with pytest.raises(DataError, match=message):
        canonical(array, ImageSpec(size=4), "row 3")


def test_decoding_to_another_shape_is_an_error():
    with pytest.raises(UnreadableImageError, match=r"\(3, 4, 4\) instead of \(1, 4, 4\)"):
        decode(encoded(Image.fromarray(noise(4, 4, 3))), (1, 4, 4))
