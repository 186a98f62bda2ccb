"""A MoME layer in bf16 on the device against float64 on the CPU, within what its roundings can add up to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.routing import route
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.gpu.conftest import Record
from tests.gpu.layers import DISPATCHES, SIZES, Sizes, clear_tokens, one_process_form, parallel_form, passed
from tests.gpu.worlds import run_alone

pytestmark = pytest.mark.gpu

# The variance of a rounding to bf16, relative: uniform within half the distance of neighbours, 2**-8, at most.
VARIANCE = (2.0**-8) ** 2 / 3
STEEPEST = 1.13  # slope of GELU


def exact_and_deviation(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The output in float64 [T, H], and the standard deviation of what bf16 arithmetic makes of each of its elements.

    Roundings are independent of each other, so variances add up: of x * y that of x times y squared, that of y times x
    squared, and that of the product's own rounding; of a product of matrices the sum of those, with squares in the
    place of values. Inputs are bf16 already; weights, biases and gates are rounded to it, and so is every result.
    Sums inside a product, the softmax and the router are fp32, which is 65,000 times as exact.
    """
    module, hidden_TH = one_process_form(sizes).double(), clear_tokens(sizes, torch.bfloat16).double()
    logits_TE = hidden_TH @ module.router.get_parameter("weight").detach().t()
    routing = route(logits_TE.float(), sizes.top_k, renormalize=True)  # `clear_tokens` makes the choice sure
    gates_TE = logits_TE.masked_fill(~routing.selected_TE(), -torch.inf).softmax(dim=1)
    assert module.shared is not None
    ones_TS = torch.ones(sizes.tokens, sizes.shared, dtype=torch.float64)
    output_TH, squares_TH, variance_TH = (torch.zeros_like(hidden_TH) for _ in range(3))
    for stack, gate_TE in ((module.routed, gates_TE), (module.shared, ones_TS)):
        down_EbH, down_bias_Eb, up_EHb, up_bias_EH = (part.detach() for part in stack.weights())
        down_NH, down_bias_N = down_EbH.flatten(0, 1), down_bias_Eb.flatten()
        up_NH = up_EHb.transpose(1, 2).flatten(0, 1)
        narrow_TN = hidden_TH @ down_NH.t() + down_bias_N
        active_TN = F.gelu(narrow_TN)
        gate_TN = gate_TE.repeat_interleave(sizes.bottleneck, dim=1)
        gated_TN = gate_TN * active_TN
        output_TH += gated_TN @ up_NH + gate_TE @ up_bias_EH
        squares_TH += (part_TH := gated_TN.square() @ up_NH.square() + gate_TE.square() @ up_bias_EH.square())
        # Weights, bias, and the result: twice, where the bias is added to what is rounded already.
        of_narrow_TN = hidden_TH.square() @ down_NH.square().t() + down_bias_N.square() + 2 * narrow_TN.square()
        of_active_TN = STEEPEST**2 * of_narrow_TN + active_TN.square()
        of_gated_TN = gate_TN.square() * of_active_TN + 2 * gated_TN.square()  # the gate, and the product
        variance_TH += of_gated_TN @ up_NH.square() + 2 * part_TH  # weights; gates and biases
    # The sum over the chosen and the shared experts may be rounded at each of them, and is at the end.
    variance_TH += (sizes.top_k + sizes.shared) * squares_TH + output_TH.square()
    return output_TH, (VARIANCE * variance_TH).sqrt()


def _expected(size: str) -> tuple[np.ndarray, np.ndarray]:
    output_TH, deviation_TH = exact_and_deviation(SIZES[size])
    return output_TH.numpy(), deviation_TH.numpy()


def _found(size: str, device: torch.device) -> dict[str, np.ndarray]:
    hidden_TH, found = clear_tokens(SIZES[size], torch.bfloat16).to(device), {}
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60), torch.no_grad():
        for dispatch in DISPATCHES:
            output_TH = passed(parallel_form(SIZES[size], dispatch, device), hidden_TH)
            assert output_TH.dtype is torch.bfloat16
            found[dispatch] = output_TH.double().cpu().numpy()
    return found


def test_bf16_is_off_by_its_roundings_and_no_more(device: torch.device, record: Record) -> None:
    exact, deviation = run_alone(device, _expected, device.type)
    errors = {name: output - exact for name, output in run_alone(device, _found, device.type, device).items()}
    together = {name: float(np.linalg.norm(error) / np.linalg.norm(deviation)) for name, error in errors.items()}
    farthest = {name: float(np.abs(error / deviation).max()) for name, error in errors.items()}
    relative = {name: float(np.linalg.norm(error) / np.linalg.norm(exact)) for name, error in errors.items()}
    record(error_by_deviation=together, farthest_element=farthest, relative_error=relative)
    assert all(0.2 < each < 1 for each in together.values()), together  # far less would be another precision
    # Three million values of a normal distribution are within 5.1 deviations.
    assert all(each < 6 for each in farthest.values()), farthest
