"""Random views of training images, a batch at a time."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.data.spec import AugmentSpec


def augment(images: torch.Tensor, spec: AugmentSpec, generator: torch.Generator | None) -> torch.Tensor:
    """Shift and mirror every image of a batch by amounts of its own.

    With s = `spec.shift`, image b moves by (y_b, x_b), each uniform over the integers −s … s; what moves in is 0. With
    `spec.flip` it is mirrored left to right with probability 1/2.

    Parameters
    ----------
    images : (B, C, H, W) tensor
        Any dtype, on any device; not changed.
    spec : AugmentSpec
    generator : torch.Generator or None
        Where the random numbers come from. One on the CPU gives the same views whatever the images' device. None:
        torch's own generator.

    Returns
    -------
    views : (B, C, H, W) tensor
        Dtype and device of `images`; may be `images` itself where the settings ask for nothing.

    Raises
    ------
    ValueError
        If `images` has not four dimensions.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    source = torch.device("cpu") if generator is None else generator.device
    # Both are always drawn, so that switching one change off leaves the other as it was.
    offsets = torch.randint(0, 2 * spec.shift + 1, (2, batch), generator=generator, device=source).to(images.device)
    mirrored = torch.rand(batch, generator=generator, device=source).to(images.device) < 0.5
    views = images
    if spec.shift:
        padded = functional.pad(images, (spec.shift,) * 4)
        # A view of all windows: (B, C, 2s+1, 2s+1, H, W). Indexing copies one of them an image, rows at a time.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        views = windows[torch.arange(batch, device=images.device), :, offsets[0], offsets[1]]
    if spec.flip:
        chosen = mirrored.nonzero()[:, 0]
        if views is images:
            views = images.clone()
        views[chosen] = views[chosen].flip(-1)
    return views
