"""Rounded weights: the scale is the best there is, what is stored is what is read, and decoding finds the same."""

import pytest
import torch
from torch import Tensor

from swamla.ops.int8 import Int8Matrix
from swamla.ops.rounding import FORMATS, GROUP, Rounded, least_squares_scale, rounded_bytes


def error_of(w_NG: Tensor, scale_N: Tensor) -> Tensor:
    """Σ (w − s q)² with the nearest q in [−8, 7]."""
    divisor_N1 = torch.where(scale_N == 0, 1.0, scale_N)[:, None]
    q_NG = (w_NG / divisor_N1).round().clamp(-8, 7)
    return (w_NG - q_NG * scale_N[:, None]).square().sum(dim=1)


def groups() -> Tensor:
    """Groups of normal weights, of long tails, with one outlier, of one sign, of few values, of zeros."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(120, GROUP, generator=generator, dtype=torch.float64)
    w[20:40] = w[20:40] ** 3
    w[40:50, 5] *= 20
    w[50:60] = w[50:60].abs()
    w[60:70] = w[60:70].sign()
    w[70:80] = w[70:80].round()
    w[80, :] = 0
    w[81, 1:] = 0
    w[90:100] *= 1e-6
    return w


def test_no_scale_has_a_smaller_error_than_that_of_least_squares() -> None:
    w_NG = groups()
    found_N = error_of(w_NG, least_squares_scale(w_NG))
    largest_N = w_NG.abs().amax(dim=1)
    for factor in torch.linspace(0.02, 1.3, 3000, dtype=torch.float64):
        for sign in (1, -1):
            tried_N = error_of(w_NG, sign * factor * largest_N)
            assert (found_N <= tried_N + 1e-12 * largest_N**2).all(), factor


def test_the_scale_is_stationary_for_its_own_integers() -> None:
    w_NG = groups()
    scale_N = least_squares_scale(w_NG)
    q_NG = (w_NG / torch.where(scale_N == 0, 1.0, scale_N)[:, None]).round().clamp(-8, 7)
    best_N = (w_NG * q_NG).sum(1) / (q_NG * q_NG).sum(1).clamp(min=1)
    torch.testing.assert_close(scale_N, best_N, rtol=1e-9, atol=0)


def test_scales_follow_the_weights() -> None:
    w_NG = groups()
    torch.testing.assert_close(least_squares_scale(-4 * w_NG).abs(), 4 * least_squares_scale(w_NG).abs())


@pytest.mark.parametrize("shape", [(3, 32), (5, 40), (2, 3, 33), (4, 1), (2, 2, 2, 64)])
@pytest.mark.parametrize("format", FORMATS)
def test_integers_times_scales_by_hand_are_the_weight(format: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rounded = Rounded.of(weight, format).checked()
    found = rounded.weight()
    assert found.shape == shape
    assert rounded.integers.nbytes + rounded.scale.nbytes == rounded_bytes(shape, format)
    rows, stored, scales = (part.reshape(-1, part.shape[-1]) for part in (found, rounded.integers, rounded.scale))
    scales = rounded.scale.reshape(len(rows), -1)
    for row in range(len(rows)):
        for column in range(shape[-1]):
            if format == "int8":
                expected = stored[row, column].item() * scales[row, 0].item()
            else:
                byte = stored[row, column // 2].item()
                expected = ((byte >> 4 if column % 2 else byte & 15) - 8) * scales[row, column // GROUP].item()
            assert rows[row, column].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("format", "steps"), [("int8", 127), ("int4", 7)])
def test_a_weight_is_off_by_half_a_step_at_most_unless_it_was_clamped(format: str, steps: int) -> None:
    weight = torch.rand(50, 64, generator=torch.Generator().manual_seed(2)) - 0.5
    error = (Rounded.of(weight, format).weight() - weight).abs().amax()
    assert error <= 0.5 / steps  # the largest weight is .5, and at most one step outside the integers


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_what_was_rounded_changes_nothing(format: str) -> None:
    once = Rounded.of(torch.randn(20, 64, generator=torch.Generator().manual_seed(3)), format).weight()
    again = Rounded.of(once, format).weight()
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


def test_decoding_in_int8_multiplies_the_stored_integers() -> None:
    rounded = Rounded.of(torch.randn(20, 64, generator=torch.Generator().manual_seed(4)), "int8")
    decoded = Int8Matrix.of(rounded.weight())
    assert torch.equal(decoded.integers_FD, rounded.integers)
    assert torch.equal(decoded.scale_F, rounded.scale)


@pytest.mark.parametrize("format", FORMATS)
def test_integers_of_another_type_or_shape_are_refused(format: str) -> None:
    whole = Rounded.of(torch.randn(4, 64), format)
    for damaged in (
        Rounded(format, whole.integers[:, 1:], whole.scale, whole.shape),
        Rounded(format, whole.integers.float(), whole.scale, whole.shape),
        Rounded(format, whole.integers, whole.scale.float(), whole.shape),
        Rounded(format, whole.integers, whole.scale, (4, 65 if format == "int8" else 97)),
    ):
        with pytest.raises(ValueError, match=f"{format} weights of .* are stored as"):
            damaged.checked()
