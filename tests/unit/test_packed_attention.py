"""Attention over packed sequences: each sequence by itself, and none sees another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mome_dist.llm.attention import CausalAttention
from mome_dist.token_context import TokenContext

KERNELS = ("eager", "sdpa")
GROUPS, QUERIES, HEAD = 2, 3, 8
SEQUENCES = [("asr(4)", [5, 3, 1]), ("vsr(2)", [2, 9, 6]), ("avsr(4,2)", [7])]  # 33 tokens of 40
CONTEXT = TokenContext.of(SEQUENCES)


def _qkv(seed: int = 0) -> Tensor:
    """[N, G, Q + 2, d]; what dead tokens hold must reach nothing."""
    generator = torch.Generator().manual_seed(seed)
    qkv_NGXd = torch.randn(CONTEXT.tokens, GROUPS, QUERIES + 2, HEAD, generator=generator)
    qkv_NGXd[CONTEXT.alive :] = torch.nan
    return qkv_NGXd


def _weights() -> Tensor:
    """The gradient of the output, [N, G * Q * d]; dead tokens have one, too."""
    return torch.randn(CONTEXT.tokens, GROUPS * QUERIES * HEAD, generator=torch.Generator().manual_seed(9))


def _attended(kernel: str, qkv_NGXd: Tensor) -> tuple[Tensor, Tensor]:
    qkv_NGXd = qkv_NGXd.clone().requires_grad_()
    output_NZ = CausalAttention(kernel, HEAD)(qkv_NGXd, CONTEXT)
    (gradient,) = torch.autograd.grad(output_NZ, qkv_NGXd, _weights())
    return output_NZ.detach(), gradient


def _alone(qkv_SGXd: Tensor) -> Tensor:
    """One sequence, query by query: [S, G, Q + 2, d] -> [S, G * Q * d]."""
    rows = []
    for place in range(len(qkv_SGXd)):
        query_GQd, seen_SGXd = qkv_SGXd[place, :, :-2], qkv_SGXd[: place + 1]
        scores_GQS = torch.einsum("gqd,sgd->gqs", query_GQd, seen_SGXd[:, :, -2]) / math.sqrt(HEAD)
        rows.append(torch.einsum("gqs,sgd->gqd", scores_GQS.softmax(dim=-1), seen_SGXd[:, :, -1]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_sequences_are_attended_to_each_alone(kernel: str) -> None:
    output_NZ, gradient_NGXd = _attended(kernel, _qkv())
    start = 0
    for length in CONTEXT.lengths:
        own = slice(start, start + length)
        qkv_SGXd = _qkv()[own].double().requires_grad_()
        expected_SZ = _alone(qkv_SGXd)
        (expected,) = torch.autograd.grad(expected_SZ, qkv_SGXd, _weights()[own].double())
        torch.testing.assert_close(output_NZ[own], expected_SZ.float())
        torch.testing.assert_close(gradient_NGXd[own], expected.float())
        start += length
    assert start == CONTEXT.alive < CONTEXT.tokens
    assert not output_NZ[start:].any() and not gradient_NGXd[start:].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_changed_neighbour_changes_no_bit_of_others(kernel: str) -> None:
    before, after = _qkv(), _qkv()
    changed = torch.zeros(CONTEXT.tokens, dtype=torch.bool)
    changed[5:8] = changed[11:20] = True  # the second sequences of the first two views
    after[changed] = _qkv(seed=1)[changed]
    for one, other in zip(_attended(kernel, before), _attended(kernel, after), strict=True):
        assert torch.equal(one[~changed], other[~changed])
        assert (one[changed] != other[changed]).flatten(1).any(dim=1).all()
