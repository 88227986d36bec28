"""The bound between a backend and the reference."""

from __future__ import annotations

import pytest
import torch

from scaleprop.errors import MismatchError
from scaleprop.fidelity import FLOOR, SLACK, compare

BASE = torch.arange(1.0, 9.0)
REFERENCE = BASE * 1.02  # the format's own error is 0.02/1.02


def test_a_small_lowering_error_passes_and_is_reported():
    found = compare([REFERENCE * 1.005, 3], [REFERENCE, 3], [BASE, 3], "here")
    assert found.lowering_error == pytest.approx(0.005, rel=1e-3)
    assert found.format_error == pytest.approx(0.02, rel=1e-3)
    assert found.cosine == pytest.approx(1.0)


def test_more_than_the_share_of_the_format_error_fails():
    too_much = 1 + 0.02 * SLACK * 1.1
    with pytest.raises(MismatchError, match="output 0 differs"):
        compare([REFERENCE * too_much], [REFERENCE], [BASE], "here")


def test_an_exact_format_leaves_only_float_noise():
    compare([BASE * (1 + FLOOR / 2)], [BASE], [BASE], "here")
    with pytest.raises(MismatchError):
        compare([BASE * (1 + FLOOR * 2)], [BASE], [BASE], "here")


@pytest.mark.parametrize(
    ("got", "want"), [(BASE[:3], BASE), (BASE.double(), BASE), (1, 2), (None, 2),
                      (BASE * float("nan"), BASE)],
)
def test_another_shape_dtype_constant_or_nan_fails(got, want):
    with pytest.raises(MismatchError):
        compare([got], [want], [want], "here")


def test_masked_positions_stay_out_of_the_norms():
    masked = BASE.clone()
    masked[0] = float("-inf")
    assert compare([masked], [masked], [masked], "here").lowering_error == 0.0


def test_masks_must_agree_where_the_reference_is_infinite():
    masked = BASE.clone()
    masked[0] = float("-inf")
    with pytest.raises(MismatchError):
        compare([BASE], [masked], [masked], "here")
