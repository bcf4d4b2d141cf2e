import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import AugmentSpec
from pipeline.data.views import augment


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_views(image: torch.Tensor, shift: int, flip: bool) -> list[torch.Tensor]:
    """Every view of one image (C, H, W) that the settings allow, one loop turn each."""
    _, height, width = image.shape
    found = []
    for dy in range(-shift, shift + 1):
        for dx in range(-shift, shift + 1):
            view = torch.zeros_like(image)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        view[:, y, x] = image[:, y + dy, x + dx]
            found += [view, view.flip(-1)] if flip else [view]
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.booleans(), st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_every_view_is_a_shifted_and_mirrored_image(shift, flip, channels, seed):
    images = torch.randint(1, 256, (6, channels, 5, 4), generator=seeded(seed), dtype=torch.uint8)
    before = images.clone()
    views = augment(images, AugmentSpec(shift=shift, flip=flip), seeded(seed))
    assert views.dtype == images.dtype and views.shape == images.shape
    assert torch.equal(images, before)
    for image, view in zip(images, views, strict=True):
        assert any(torch.equal(view, other) for other in all_views(image, shift, flip))


def test_all_views_occur_equally_often():
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 3, 3)
    images = image.expand(9000, 1, 3, 3)
    views = augment(images, AugmentSpec(shift=1, flip=True), seeded(0))
    expected = all_views(image, 1, True)
    counts = [int((views == view).flatten(1).all(1).sum()) for view in expected]
    assert sum(counts) == 9000  # all 18 differ
    assert 400 < min(counts) and max(counts) < 600  # 500 each, standard deviation 22


def test_the_generator_decides():
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=seeded(0), dtype=torch.uint8)
    spec = AugmentSpec(shift=2, flip=True)
    assert torch.equal(augment(images, spec, seeded(5)), augment(images, spec, seeded(5)))
    assert not torch.equal(augment(images, spec, seeded(5)), augment(images, spec, seeded(6)))


def test_floats_take_the_same_views_as_bytes():
    images = torch.randint(0, 256, (16, 3, 6, 6), generator=seeded(0), dtype=torch.uint8)
    spec = AugmentSpec(shift=1, flip=True)
    assert torch.equal(augment(images.float(), spec, seeded(1)), augment(images, spec, seeded(1)).float())


def test_flip_off_leaves_the_shifts_as_they_were():
    images = torch.randint(1, 256, (64, 1, 6, 6), generator=seeded(0), dtype=torch.uint8)
    plain = augment(images, AugmentSpec(shift=2, flip=False), seeded(1))
    flipped = augment(images, AugmentSpec(shift=2, flip=True), seeded(1))
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same | mirrored).all() and same.any() and mirrored.any()


def test_a_batch_without_images_and_one_of_wrong_shape():
    assert augment(torch.empty(0, 1, 4, 4), AugmentSpec(flip=True), None).shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \(1, 4, 4\)"):
        augment(torch.empty(1, 4, 4), AugmentSpec(), None)
