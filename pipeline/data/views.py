"""Views of training images: changes that are a pure function of the image, the view's number and a seed.

An image so looks the same wherever and whenever a view of it is made: in a batch of any size, on any device, by any
worker, today by a teacher and tomorrow by the student.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.data.spec import AugmentSpec

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64, signed
_PLAIN = 0


def view_keys(samples: torch.Tensor, views: torch.Tensor | int, seed: int) -> torch.Tensor:
    """Return what decides how each image of a batch is changed.

    key = mix(mix(mix(seed) + sample) + view), mix one round of splitmix64 [1]_; 0 for view 0, which is the image as it
    is.

    Parameters
    ----------
    samples : (B,) int64 tensor
        A number that stands for the content of an image, see `ImageSplit.numbers`.
    views : (B,) int64 tensor or int
        The views' numbers, ≥ 0.
    seed : int

    Returns
    -------
    keys : (B,) int64 tensor
        On the device of `samples`.

    References
    ----------
    .. [1] Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    numbers = torch.as_tensor(views, device=samples.device)
    keys = _mix(_mix(_mix(samples.new_full((), _signed(seed))) + samples) + numbers)
    return torch.where(numbers == 0, _PLAIN, keys)


def augment(images: torch.Tensor, spec: AugmentSpec, keys: torch.Tensor) -> torch.Tensor:
    """Shift and mirror every image of a batch as its key says.

    With s = `spec.shift`, image b moves by (y_b, x_b), each uniform over the integers −s … s; what moves in is 0. With
    `spec.flip` it is mirrored left to right with probability 1/2. An image with key 0 stays as it is.

    Parameters
    ----------
    images : (B, C, H, W) tensor
        Any dtype, on any device; not changed.
    spec : AugmentSpec
    keys : (B,) int64 tensor
        From `view_keys`.

    Returns
    -------
    views : (B, C, H, W) tensor
        Dtype and device of `images`; may be `images` itself where the settings ask for nothing.

    Raises
    ------
    ValueError
        If `images` has not four dimensions, or there is not one key for each.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    if keys.shape != images.shape[:1]:
        raise ValueError(f"keys must be ({len(images)},), got {tuple(keys.shape)}")
    keys = keys.to(images.device)
    changed = keys != _PLAIN
    views = images
    # Each change has a stream of its own, so that switching one off leaves the others as they were.
    down, right, mirror = _bits(keys, 3)
    if spec.shift:
        _, _, height, width = images.shape
        down, right = (torch.where(changed, _below(bits, 2 * spec.shift + 1), spec.shift) for bits in (down, right))
        padded = functional.pad(images, (spec.shift,) * 4)
        # A view of all windows: (B, C, 2s+1, 2s+1, H, W). Indexing copies one of them an image, rows at a time.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        views = windows[torch.arange(len(images), device=images.device), :, down, right]
    if spec.flip:
        mirrored = changed & (_below(mirror, 2) == 1)
        views = torch.where(mirrored[:, None, None, None], views.flip(-1), views)
    return views


def _bits(keys: torch.Tensor, streams: int) -> torch.Tensor:
    """Return numbers (streams, B) in [0, 2³¹), all streams in one pass: on a CPU each call counts, not each number."""
    numbers = torch.arange(1, streams + 1, device=keys.device)
    return (_mix(keys + numbers[:, None]) >> 33) & 0x7FFFFFFF


def _below(bits: torch.Tensor, bound: int) -> torch.Tensor:
    """Return numbers in [0, bound) from 31 bits: their bias is below bound / 2³¹."""
    return (bits * bound) >> 31


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Do one round of splitmix64; int64 overflows as the unsigned numbers do."""
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _FIRST
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def _signed(number: int) -> int:
    number &= 0xFFFFFFFFFFFFFFFF
    return number - (1 << 64) if number >> 63 else number
