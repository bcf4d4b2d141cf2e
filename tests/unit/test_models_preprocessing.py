from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.models.preprocessing import Preprocessing
from pipeline.models.spec import PreprocessingSpec


def spec(**changes: object) -> PreprocessingSpec:
    return PreprocessingSpec(**{"size": None, "channels": 1, "mean": (0.0,), "std": (1.0,)} | changes)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_normalisation_is_that_of_the_equation() -> None:
    images = pixels(2, 3, 5, 6)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = Preprocessing(spec(channels=3, mean=mean, std=std))(images)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


def test_float_images_mean_the_same_as_bytes() -> None:
    images = pixels(2, 1, 8, 8)
    module = Preprocessing(spec(size=12, mean=(0.3,)))
    assert torch.equal(module(images), module(images.float()))


@pytest.mark.parametrize(("name", "filter_"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("side", [9, 40])
def test_resizing_agrees_with_pil(name: str, filter_: int, side: int) -> None:
    # Middling greys: where a cubic overshoots the range, PIL clamps after each of its two passes.
    images = pixels(1, 1, 28, 28) // 4 + 90
    expected = np.array(Image.fromarray(images[0, 0].numpy()).resize((side, side), filter_))
    got = Preprocessing(spec(size=side, interpolation=name))(images)[0, 0] * 255
    assert got.shape == (side, side)
    assert np.abs(got.numpy() - expected).max() < 1.01  # PIL also rounds to whole values, twice


def test_a_cubic_does_not_leave_the_range() -> None:
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    got = Preprocessing(spec(size=16, interpolation="bicubic"))(edge)
    assert got.min() == 0 and got.max() == 1


def test_nearest_takes_pixels_that_exist() -> None:
    images = pixels(1, 1, 7, 7)
    expected = np.array(Image.fromarray(images[0, 0].numpy()).resize((14, 14), Image.NEAREST))
    got = Preprocessing(spec(size=14, interpolation="nearest"))(images)[0, 0] * 255
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)


def test_colour_becomes_the_luma_of_pil() -> None:
    images = pixels(1, 3, 9, 9)
    expected = np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L"))
    got = Preprocessing(spec())(images)[0, 0] * 255
    assert np.abs(got.numpy() - expected).max() < 1.01


def test_grey_is_repeated_before_it_is_normalised() -> None:
    images = pixels(2, 1, 6, 6)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    module = Preprocessing(spec(size=8, channels=3, mean=mean, std=std))
    assert torch.equal(module(images), module(images.expand(-1, 3, -1, -1)))


def test_the_crop_is_the_middle_of_a_larger_resize() -> None:
    images = pixels(2, 1, 20, 20)
    whole = Preprocessing(spec(size=16))(images)
    cropped = Preprocessing(spec(size=8, crop=0.5))(images)
    assert torch.equal(cropped, whole[:, :, 4:12, 4:12])


def test_sizes_may_be_oblong() -> None:
    assert Preprocessing(spec(size=(10, 14), crop=0.8))(pixels(2, 1, 20, 20)).shape == (2, 1, 10, 14)


def test_half_precision_is_that_of_the_output_alone() -> None:
    images = pixels(2, 1, 8, 8)
    half = Preprocessing(spec(size=12), dtype=torch.float16)(images)
    assert half.dtype == torch.float16
    assert torch.equal(half, Preprocessing(spec(size=12))(images).half())


def test_it_adds_nothing_to_a_state_dict() -> None:
    assert not Preprocessing(spec()).state_dict()


@pytest.mark.parametrize("images", [pixels(4, 8, 8), pixels(2, 2, 8, 8), pixels(2, 1, 8, 8).int()])
def test_what_is_no_batch_of_images_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must be"):
        Preprocessing(spec())(images)
