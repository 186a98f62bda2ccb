"""SwiGLU with its own gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mome_dist.llm.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_silu_of_the_gate_times_up(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (3 * torch.randn(5, 1, 24, generator=generator)).to(dtype)
    gradient = torch.randn(5, 1, 12, generator=generator).to(dtype)
    mine, theirs = gate_up.clone().requires_grad_(), gate_up.clone().requires_grad_()
    output, expected = swiglu(mine), F.silu(theirs[..., :12]) * theirs[..., 12:]
    assert output.dtype is dtype
    torch.testing.assert_close(output, expected)
    output.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.equal(gate_up, mine.detach()), "its input is left alone"


def test_its_gradient_is_right() -> None:
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (values,))
