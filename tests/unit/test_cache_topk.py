"""The k likeliest classes against the softmax itself."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from pipeline.cache.store import compact
from pipeline.cache.topk import compress_logits, compression_error, expand_logits


def some(n=7, C=50, scale=3.0, seed=0, dtype=torch.float32):
    return scale * torch.randn(n, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direct(logits: np.ndarray, k: int) -> np.ndarray:
    """Log-probabilities with the mass of all but k classes spread evenly, class by class."""
    expected = np.empty_like(logits)
    for row, log_p in enumerate(log_softmax(logits, axis=1)):
        order = np.argsort(-log_p, kind="stable")
        expected[row, order[:k]] = log_p[order[:k]]
        expected[row, order[k:]] = logsumexp(log_p[order[k:]]) - math.log(len(log_p) - k)
    return expected


@pytest.mark.parametrize("k", [1, 5, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_direct_computation(k, dtype):
    logits = some(dtype=dtype)
    compressed = compress_logits(logits, k)
    assert compressed["values"].shape == compressed["indices"].shape == (7, k)
    assert compressed["rest"].shape == (7,)
    assert compressed["values"].dtype == compressed["rest"].dtype == dtype
    expanded = expand_logits(**compressed, C=50)
    assert expanded.dtype == dtype
    np.testing.assert_allclose(
        expanded, direct(logits.double().numpy(), k), atol=1e-10 if dtype.itemsize == 8 else 1e-5
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.floats(0, 30), st.integers(0, 1000))
def test_distributions_stay_distributions(C, k, scale, seed):
    logits = some(4, C, scale, seed)
    compressed = compress_logits(logits, k)
    assert (compressed["values"].diff(dim=1) <= 0).all()
    expanded = expand_logits(**compressed, C=C)
    torch.testing.assert_close(expanded.exp().sum(1), torch.ones(4), atol=1e-5, rtol=0)
    assert torch.equal(expanded.argmax(1), logits.argmax(1)) or scale < 1e-3
    if k >= C:
        torch.testing.assert_close(expanded, logits.log_softmax(1), atol=1e-5, rtol=1e-6)
        assert compression_error(logits, k).max() < 1e-12


def test_a_constant_in_the_logits_is_gone():
    logits = some(dtype=torch.float64)
    for name, value in compress_logits(logits + 1234.5, 5).items():
        torch.testing.assert_close(value, compress_logits(logits, 5)[name], atol=1e-10, rtol=0)


def test_the_error_falls_with_k_and_equals_the_divergence():
    logits = some(n=20, C=30, dtype=torch.float64)
    errors = [float(compression_error(logits, k).mean()) for k in range(1, 31)]
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[0] > 0.1 and errors[-1] == pytest.approx(0, abs=1e-12)
    p = logits.softmax(1)
    log_q = torch.from_numpy(direct(logits.numpy(), 3))
    expected = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    assert errors[2] == pytest.approx(float(expected), abs=1e-12)


def test_even_others_are_lost_nothing():
    logits = torch.full((3, 100), -2.0)
    logits[:, :4] = torch.tensor([5.0, 3.0, 1.0, 0.0])
    assert float(compression_error(logits, 4).max()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e4, -1e4, -1e4, 1e4], [1e4, 1e4, 1e4, 1e4]]).to(dtype)
    for k in (1, 2, 4):
        expanded = expand_logits(**compress_logits(logits, k), C=4)
        assert torch.isfinite(expanded).all()
        torch.testing.assert_close(expanded.exp(), logits.float().softmax(1))
        if k < 4:
            np.testing.assert_allclose(expanded, direct(logits.double().numpy(), k), rtol=1e-6, atol=1e-6)
        assert float(compression_error(logits, k).max()) == pytest.approx(0, abs=1e-9)


def test_excluded_classes_have_no_mass():
    logits = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]])
    compressed = compress_logits(logits, 2)
    assert compressed["rest"].item() == -math.inf
    assert expand_logits(**compressed, C=4).exp().tolist()[0][2:] == [0, 0]
    assert float(compression_error(logits, 2).max()) == pytest.approx(0, abs=1e-12)
    assert compression_error(logits, 1).isfinite().all()


def test_tiny_mass_of_the_others_keeps_its_digits():
    logits = torch.tensor([[0.0, -40.0, -41.0]])
    torch.testing.assert_close(compress_logits(logits, 1)["rest"], logits[:, 1:].logsumexp(1))


def test_half_precision_of_what_is_stored_moves_probabilities_little():
    logits = some(n=200, C=1000, scale=4)
    stored = {name: compact(value, "fp16") for name, value in compress_logits(logits, 16).items()}
    assert stored["values"].dtype == stored["rest"].dtype == torch.float16
    p = logits.softmax(1)
    rounded, exact = expand_logits(**stored, C=1000), expand_logits(**compress_logits(logits, 16), C=1000)
    torch.testing.assert_close(rounded.exp().sum(1), torch.ones(200), atol=1e-5, rtol=0)
    assert float((rounded.exp() - exact.exp()).abs().sum(1).max()) < 4e-3
    assert float((rounded.argmax(1) == p.argmax(1)).float().mean()) > 0.98


@pytest.mark.parametrize(("C", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_class_numbers_take_two_bytes_where_they_fit(C, dtype):
    logits = torch.zeros(1, C)
    logits[0, C - 1] = 5
    compressed = compress_logits(logits, 1)
    assert compressed["indices"].dtype == dtype and compressed["indices"].item() == C - 1
    assert expand_logits(**compressed, C=C).argmax().item() == C - 1


def test_no_rows():
    assert expand_logits(**compress_logits(torch.empty(0, 5), 2), C=5).shape == (0, 5)
    assert compression_error(torch.empty(0, 5), 2).shape == (0,)


def test_bad_arguments():
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        compress_logits(some(), 0)
    with pytest.raises(ValueError, match=r"shape \(n, C\), got torch.int64"):
        compress_logits(torch.zeros(2, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3,\)"):
        compress_logits(torch.zeros(3), 1)
    compressed = compress_logits(some(), 5)
    with pytest.raises(ValueError, match="k = 5 and C = 4"):
        expand_logits(**compressed, C=4)
    with pytest.raises(ValueError, match=r"rest \(n,\)"):
        expand_logits(compressed["values"], compressed["indices"], compressed["rest"][:2], 50)
