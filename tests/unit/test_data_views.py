import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import AugmentSpec
from pipeline.data.views import augment, view_keys


def pixels(*shape: int, seed: int = 0, lowest: int = 0) -> torch.Tensor:
    return torch.randint(lowest, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def keys_of(n: int, seed: int = 0, view: int = 1) -> torch.Tensor:
    return view_keys(torch.arange(n) * 7919 - 50, view, seed)


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


def splitmix(state: int) -> int:
    """One round in Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


@settings(max_examples=25, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 10**6), st.integers(0, 2**64 - 1))
def test_keys_are_three_rounds_of_splitmix(sample, view, seed):
    expected = splitmix((splitmix((splitmix(seed) + sample) % 2**64) + view) % 2**64)
    [key] = view_keys(torch.tensor([sample]), view, seed).tolist()
    assert key % 2**64 == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.booleans(), st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_every_view_is_a_shifted_and_mirrored_image(shift, flip, channels, seed):
    images = pixels(6, channels, 5, 4, seed=seed, lowest=1)
    before = images.clone()
    views = augment(images, AugmentSpec(shift=shift, flip=flip), keys_of(6, seed))
    assert views.dtype == images.dtype and views.shape == images.shape
    assert torch.equal(images, before)
    for image, view in zip(images, views, strict=True):
        assert any(torch.equal(view, other) for other in all_views(image, shift, flip))


def test_all_views_occur_equally_often():
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 3, 3)
    views = augment(image.expand(9000, 1, 3, 3), AugmentSpec(shift=1, flip=True), keys_of(9000))
    counts = [int((views == view).flatten(1).all(1).sum()) for view in all_views(image, 1, True)]
    assert sum(counts) == 9000  # all 18 differ
    assert 400 < min(counts) and max(counts) < 600  # 500 each, standard deviation 22


def test_a_view_is_decided_by_image_number_and_seed_alone():
    images, spec = pixels(32, 1, 8, 8), AugmentSpec(shift=2, flip=True)
    samples = torch.arange(32) + 100
    views = augment(images, spec, view_keys(samples, 3, 5))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(images[order], spec, view_keys(samples[order], 3, 5)), views[order])
    alone = [augment(images[i : i + 1], spec, view_keys(samples[i : i + 1], 3, 5))[0] for i in range(32)]
    assert torch.equal(torch.stack(alone), views)
    for changed in (view_keys(samples, 4, 5), view_keys(samples, 3, 6), view_keys(samples + 1, 3, 5)):
        assert not torch.equal(augment(images, spec, changed), views)
    mixed = view_keys(samples, torch.arange(32) % 4, 5)
    assert torch.equal(mixed[3::4], view_keys(samples, 3, 5)[3::4])


def test_view_0_is_the_image_as_it_is():
    images, spec = pixels(16, 3, 6, 6), AugmentSpec(shift=2, flip=True)
    keys = keys_of(16, view=0)
    assert not keys.any() and torch.equal(augment(images, spec, keys), images)
    half = torch.where(torch.arange(16) < 8, 0, keys_of(16))
    views = augment(images, spec, half)
    assert torch.equal(views[:8], images[:8]) and not torch.equal(views[8:], images[8:])


def test_floats_take_the_same_views_as_bytes():
    images, spec = pixels(16, 3, 6, 6), AugmentSpec(shift=1, flip=True)
    assert torch.equal(augment(images.float(), spec, keys_of(16)), augment(images, spec, keys_of(16)).float())


def test_flip_off_leaves_the_shifts_as_they_were():
    images = pixels(64, 1, 6, 6, lowest=1)
    plain = augment(images, AugmentSpec(shift=2, flip=False), keys_of(64))
    flipped = augment(images, AugmentSpec(shift=2, flip=True), keys_of(64))
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert (same | mirrored).all() and same.any() and mirrored.any()


def test_a_batch_without_images_and_one_of_wrong_shape():
    none = torch.empty(0, dtype=torch.int64)
    assert augment(torch.empty(0, 1, 4, 4), AugmentSpec(flip=True), none).shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \(1, 4, 4\)"):
        augment(torch.empty(1, 4, 4), AugmentSpec(), none)
    with pytest.raises(ValueError, match=r"keys must be \(2,\), got \(0,\)"):
        augment(torch.empty(2, 1, 4, 4), AugmentSpec(), none)
