"""From whatever a source holds to the pixels that the table stores, and the id that these pixels have."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.spec import ImageSpec
from pipeline.errors import DataError

# An allow-list: some of Pillow's readers start other programs (EPS) or follow references in the file.
# A camera's MPO is read as its first JPEG.
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]
_MAX_PIXELS = 1 << 26  # 67 million: 200 MB as RGB; more in a small file is a decompression bomb
_EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA"}
_ORIENTATION = 0x0112


class UnreadableImageError(Exception):
    """One image that can't serve; ingest skips, counts and lists it."""


@dataclass(frozen=True)
class Canonical:
    """One image as the table stores it.

    Attributes
    ----------
    sample_id : bytes
        16 bytes, see `sample_id`.
    payload : bytes
        The pixels (C, H, W) for raw storage, an encoded image for encoded storage.
    """

    sample_id: bytes
    payload: bytes


def canonical(image: bytes | np.ndarray | Image.Image, spec: ImageSpec, origin: str) -> Canonical:
    """Bring one image to the table's size, channels and storage.

    Parameters
    ----------
    image : bytes, ndarray or PIL image
        Encoded; or (H, W) or (H, W, C) uint8. Of an animation the first frame counts.
    spec : ImageSpec
    origin : str
        Where it comes from, for errors.

    Raises
    ------
    UnreadableImageError
        If the bytes do not decode, are a decompression bomb, hold transparent pixels or more than 8 bits a channel.
    DataError
        If an array is not an 8-bit image: no matter of one bad file, the whole source is of the wrong kind.
    """
    if isinstance(image, np.ndarray):
        pixels, fits = _from_array(image, spec, origin), False
    else:
        pixels, fits = _from_image(image, spec)
    identity = sample_id(pixels)
    if spec.storage == "raw":
        return Canonical(identity, pixels.tobytes())
    # Bytes that already decode to these pixels are kept: re-encoding a JPEG without loss would only make it larger.
    return Canonical(identity, image if fits and isinstance(image, bytes) else _encode(pixels))


def sample_id(pixels: np.ndarray) -> bytes:
    """Return the 16 bytes that name an image by its content: BLAKE2b of the shape and the pixels (C, H, W)."""
    digest = hashlib.blake2b(repr(tuple(map(int, pixels.shape))).encode(), digest_size=16, person=b"faculty.image")
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def decode(payload: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode one image of an encoded table.

    Returns
    -------
    pixels : (C, H, W) uint8 array

    Raises
    ------
    UnreadableImageError
        If it does not decode to this shape.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
            pixels = _channels_first(np.asarray(image))
    except Exception as error:  # Pillow raises anything on damaged bytes: SyntaxError, struct.error, KeyError, …
        raise UnreadableImageError(_reason(error)) from None
    if pixels.shape != shape:
        raise UnreadableImageError(f"has shape {pixels.shape} instead of {shape}")
    return pixels


def _from_array(array: np.ndarray, spec: ImageSpec, origin: str) -> np.ndarray:
    if array.dtype != np.uint8:
        raise DataError(f"{origin}: image array is {array.dtype}; convert it to uint8 in 0..255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise DataError(f"{origin}: image array has shape {array.shape}; it must be (H, W), (H, W, 1) or (H, W, 3)")
    pixels = _channels_first(array)
    if pixels.shape == spec.shape:
        return pixels
    return _fit(Image.fromarray(np.ascontiguousarray(array)), spec)


def _from_image(source: bytes | Image.Image, spec: ImageSpec) -> tuple[np.ndarray, bool]:
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS) if isinstance(source, bytes) else source
        if image.width * image.height > _MAX_PIXELS:
            raise UnreadableImageError(f"has {image.width} x {image.height} pixels, more than {_MAX_PIXELS}")
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        fits = not turned and image.mode == _mode(spec) and (image.height, image.width) == spec.shape[1:]
        opaque = _opaque(ImageOps.exif_transpose(image) if turned else image)
        return _fit(opaque, spec), fits and opaque is image
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow raises anything on damaged bytes: SyntaxError, struct.error, KeyError, …
        raise UnreadableImageError(_reason(error)) from None


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image without alpha; an alpha channel that hides nothing is dropped."""
    if image.mode not in _EIGHT_BIT:
        raise UnreadableImageError(f"mode {image.mode!r} is not an 8-bit image; convert it to 8 bits a channel")
    if not image.has_transparency_data:
        return image
    with_alpha = image.convert("RGBA")
    lowest = with_alpha.getchannel("A").getextrema()[0]
    if lowest != 255:
        raise UnreadableImageError("has transparent pixels; flatten it onto a background")
    return with_alpha.convert("RGB")


def _fit(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Convert, scale until it covers the size, and cut out the middle; returns (C, H, W)."""
    _, height, width = spec.shape
    # A palette has no order in which colours could be averaged, hence the conversion before the resize.
    converted = image if image.mode == _mode(spec) else image.convert("RGB").convert(_mode(spec))
    if converted.size != (width, height):
        converted = ImageOps.fit(converted, (width, height), method=Image.Resampling.BILINEAR)
    return _channels_first(np.asarray(converted))


def _mode(spec: ImageSpec) -> str:
    return "L" if spec.channels == 1 else "RGB"


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _encode(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message is the address of our buffer
        return f"is no whole image of a known format ({', '.join(FORMATS)})"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
