"""What is told of predictions."""

from __future__ import annotations

import pytest
import torch

from mambalens.sweep.prediction import SMALL, top_of


@pytest.mark.parametrize("count", [97, SMALL, SMALL + 1, 32000, 50257, 50280, 128256])
def test_the_top_token_is_the_first_of_the_largest_or_of_what_is_no_number(count: int) -> None:
    """Rounded values have equals in several blocks; the largest may stand at either end, and be infinite."""
    generator = torch.Generator().manual_seed(count)
    for make in (torch.Tensor.double, torch.Tensor.round, torch.Tensor.bfloat16):
        values = make(torch.randn(9, count, generator=generator)).float()
        values[1] = -torch.inf
        values[2, torch.randint(count, (3,), generator=generator)] = torch.nan
        values[3, -1], values[4, 0], values[5, -1] = torch.nan, 99.0, 99.0
        values[6] = 0.0
        values[7, [count // 2, count - 1]] = torch.inf
        assert torch.equal(top_of(values), values.argmax(-1))
