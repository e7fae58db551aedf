from __future__ import annotations

import math

import pytest
import torch
from gradient_cases import length

from e2h.privacy import clipped_sum
from e2h.privacy.clipped_sum import CLIPPINGS, GRID_BITS, clip_and_sum


def random_gradients(num_examples: int, widths=(1000, 7, 5000), spread: float = 3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    scale = (spread * torch.randn(num_examples, 1, generator=generator)).exp()
    return [(torch.randn(num_examples, width, generator=generator) * scale).to(dtype) for width in widths]


def ending(gradients, weights=None, max_grad_norm=50.0, **clip):
    count = len(gradients[0])
    weights = torch.ones(count) if weights is None else weights
    copies = [gradient.clone() for gradient in gradients]
    return clip_and_sum(copies, weights, torch.zeros(count), max_grad_norm, **clip)


def test_the_sum_is_exact_in_any_order_and_any_cut():
    gradients = random_gradients(200)
    whole = ending(gradients).vector
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, ending([gradient[order] for gradient in gradients]).vector)
    for size in (1, 64, 77):
        cuts = [[gradient[i : i + size] for gradient in gradients] for i in range(0, 200, size)]
        assert torch.equal(whole, sum(ending(cut).vector for cut in cuts))


def test_removing_an_example_removes_exactly_its_own_bounded_integers():
    gradients = random_gradients(64)
    whole = ending(gradients).vector
    for i in range(64):
        alone = ending([gradient[i : i + 1] for gradient in gradients])
        without = ending([torch.cat([gradient[:i], gradient[i + 1 :]]) for gradient in gradients])
        assert torch.equal(whole - without.vector, alone.vector)
        assert length(alone.vector) <= 1.0
    assert length(ending(gradients).vector) > 5  # the bound is one example's, not the sum's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.3, 1.0, 1e4])
def test_the_clip_scales_the_whole_gradient(dtype, max_grad_norm):
    gradients = random_gradients(30, dtype=dtype)
    result = ending(gradients, max_grad_norm=max_grad_norm)
    flat = torch.cat(gradients, dim=1).double()
    norms = flat.norm(dim=1)
    factors = ((1 - 2.0**-10) * max_grad_norm / norms).clamp(max=1)
    expected = (factors[:, None] * flat).sum(0) / max_grad_norm * 2.0**GRID_BITS
    assert torch.allclose(result.norms, norms, rtol=1e-12)
    assert float((result.vector - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e-3, 1.0, 1e10, 3e38])
def test_the_bound_holds_for_gradients_of_any_size(size):
    # Equal coordinates: every rounding goes the same way.
    for width in (1, 3, 1000, 2**20):
        result = ending([torch.full((1, width), size)], max_grad_norm=1.0)
        assert length(result.vector) <= 1.0
        assert length(result.vector) == pytest.approx(min(1.0, size * math.sqrt(width)), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_non_finite_coordinate_drops_its_example_alone(value):
    gradients = random_gradients(5)
    expected = ending([gradient[[0, 1, 2, 4]] for gradient in gradients])
    gradients[1][3, 2] = value
    assert torch.equal(ending(gradients).vector, expected.vector)
    assert not ending(gradients, torch.tensor([0, 0, 0, 1, 0])).vector.any()


def test_weights_choose_examples():
    gradients, weights = random_gradients(6), torch.tensor([1, 0, 1, 0, 0, 1])
    result = ending(gradients, weights)
    assert result.count == 3
    assert torch.equal(result.vector, ending([gradient[weights == 1] for gradient in gradients]).vector)


def test_a_zero_gradient_adds_zero():
    assert not ending([torch.zeros(3, 10)]).vector.any()


def expected_length(norm: float, clipping: str, bound: float, threshold: float) -> float:
    """What one example contributes, in units of the bound."""
    share = 1 - 2.0**-10
    if clipping == "flat":
        return min(share, norm / bound)
    if clipping == "normalized":
        return share * norm / (norm + 0.01)
    return share * norm / threshold if norm <= threshold else 0.0


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("norm", [0.0, 1e-6, 0.005, 0.7, 2.99, 3.01, 1e3, 1e30])
def test_each_clip_gives_its_length_and_never_more_than_the_bound(clipping, norm):
    for bound in (1e-3, 1.0, 1e3):
        direction = torch.randn(1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradient = (direction / direction.norm() * norm).float()
        result = ending([gradient], max_grad_norm=bound, clipping=clipping, norm_threshold=3.0)
        assert length(result.vector) <= 1.0
        assert length(result.vector) == pytest.approx(expected_length(norm, clipping, bound, 3.0), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_example_is_dropped_alone_under_every_clip(clipping, value):
    gradients = random_gradients(5)
    clip = {"clipping": clipping, "norm_threshold": 100.0}
    expected = ending([gradient[[0, 1, 2, 4]] for gradient in gradients], **clip)
    assert expected.vector.any()
    gradients[1][3, 2] = value
    assert torch.equal(ending(gradients, **clip).vector, expected.vector)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("bound", [1e-38, 1e-30, 1e30])
def test_the_bound_holds_for_clip_norms_of_any_size(clipping, bound):
    # 2^30 / C is beyond float32 for a tiny C; infinity times a zero gradient would be an integer without bound.
    for size in (0.0, 1e-40, 1e-30, 1.0):
        gradient = torch.full((1, 4), size)
        result = ending([gradient], max_grad_norm=bound, clipping=clipping, norm_threshold=bound)
        assert length(result.vector) <= 1.0
        assert bool(result.vector.any()) or size < 1e-20 or clipping == "global" or bound > 1


def test_narrow_and_wide_gradients_keep_their_order(monkeypatch):
    widths = (1, 3, 900, 2, 5000, 8, 8, 8, 64, 1, 2000, 7)
    gradients = random_gradients(4, widths)
    whole = ending(gradients).vector
    for elements in (4, 300, 4096, 10**6):
        monkeypatch.setattr(clipped_sum, "BLOCK_ELEMENTS", elements)
        assert torch.equal(ending(gradients).vector, whole)
    alone = torch.cat(gradients, dim=1)
    assert torch.equal(ending([alone]).vector, whole)


def test_no_examples_sum_to_zero():
    result = ending([torch.zeros(0, 3), torch.zeros(0, 5000)])
    assert result.vector.shape == (5003,)
    assert not result.vector.any()
    assert result.count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="expected float32 or float64"):
        ending([torch.zeros(2, 3), torch.zeros(2, 3, dtype=dtype)])
