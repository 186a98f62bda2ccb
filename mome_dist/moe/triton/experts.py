"""A MoME layer between its two products as one kernel forward and one backward, on CUDA.

Scores, top-K, gates, GELU, the gates as a mask, and the sums of the balance losses are some twenty small operations in
PyTorch's form (`mome_dist.moe.routing`, `mome_dist.moe.fused_bottleneck`), each of which the host has to ask
for. That form is the reference, and what other devices run; it computes the same, but for roundings: here everything
between the products is fp32, which PyTorch's form rounds to the products' precision at each step. Where scores are
equal, `torch.topk` promises no order; here the expert with the lowest number comes first.

**The kernels have never run on a GPU.** They pass their tests in Triton's interpreter on a CPU, and the compiler makes
machine code for compute capabilities 8.0 and 9.0 of them.

Shape suffixes: as in `mome_dist.moe.triton.kernels`; H hidden size, P numbers of an expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mome_dist.moe.columns import Shapes, columns, packed_gradient
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.fused_bottleneck import ExpertWeights, joined_maps, weight_gradients
from mome_dist.token_context import TokenContext

MOST_EXPERTS = 256  # routed and shared ones; of more, a program's row would not stay in registers
LEAST_CAPABILITY = (8, 0)  # that Triton has a compiler for
_PROGRAM_SIZE = 2048  # units of a program at a time: 16 in each of 128 threads
_MOST_ROWS, _MOST_UNITS = 64, 16
# Products and sums may become one instruction; Triton's own default changes with its versions.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


class LayerForm(NamedTuple):
    """What a kernel is compiled for: numbers of routed and shared experts, units of each, experts that a token chooses,
    and whether scores are sigmoids (else a softmax) and gates add up to one."""

    routed: int
    shared: int
    units: int
    top_k: int
    sigmoid: bool
    renormalize: bool

    @property
    def experts(self) -> int:
        """All of them."""
        return self.routed + self.shared

    def blocks(self) -> dict[str, int]:
        """How much a program works on at once: powers of two."""
        width = _power_of_two(self.experts)
        step = min(_power_of_two(self.units), _MOST_UNITS, _PROGRAM_SIZE // width)
        return {"rows": min(_PROGRAM_SIZE // (width * step), _MOST_ROWS), "columns": width, "step": step}


@dataclass(frozen=True)
class KernelRouting:
    """A `mome_dist.moe.routing.Routed`; every token has K experts.

    Attributes:
        experts_TK: int64 [T, K], highest score (plus bias) first.
        sums_VX: fp32 [V, E + 1], with gradients, of the views that the kernel was given.
    """

    experts_TK: Tensor
    sums_VX: Tensor

    @property
    def chosen_TK(self) -> None:
        """All count."""
        return None

    def balance_sums(self, _members_VT: Tensor, _squares: bool) -> Tensor:
        """Return the sums of the views that the kernel was given, with the squares in the last column."""
        return self.sums_VX


def runs_as_one_kernel(hidden_TH: Tensor, experts: int) -> bool:
    """Whether `kernel_experts` takes hidden states like these, and as many routed and shared experts."""
    return (
        hidden_TH.device.type == "cuda"
        and hidden_TH.dtype in (torch.float32, torch.bfloat16)
        and experts <= MOST_EXPERTS
        and _has_triton()
        and torch.cuda.get_device_capability(hidden_TH.device) >= LEAST_CAPABILITY
    )


def kernel_experts(
    hidden_TH: Tensor,
    logits_TE: Tensor,
    packed_EP: Tensor,
    shapes: Shapes,
    shared: ExpertStack | None,
    context: TokenContext,
    *,
    top_k: int,
    renormalize: bool,
    score: str,
    bias_E: Tensor | None,
) -> tuple[Tensor, KernelRouting]:
    """`mome_dist.moe.routing.route` and `mome_dist.moe.fused_bottleneck.dense_experts` together.

    Args:
        hidden_TH: fp32 or bf16 [T, H], which is also the precision of the products.
        logits_TE: fp32 [T, E].
        packed_EP: weights of the routed experts, in any precision (`mome_dist.moe.routed.RoutedExperts`).
        shapes: of an expert's parts.
        shared: experts that every token uses with a gate of one.
        context: of the tokens.
        top_k, renormalize, score, bias_E: as of `route`.

    Returns:
        [T, H] in the dtype of ``hidden_TH``, and the routes.
    """
    parts = tuple(shared.weights()) if shared is not None else ()
    form = LayerForm(
        routed=len(packed_EP),
        shared=len(parts[0]) if parts else 0,
        units=shapes[0][0],
        top_k=top_k,
        sigmoid=score == "sigmoid",
        renormalize=renormalize,
    )
    output_TH, experts_TK, sums_VX = _KernelExperts.apply(
        hidden_TH, logits_TE, packed_EP, form, shapes, context.members_VN, context.alive_N, bias_E, *parts
    )
    return output_TH, KernelRouting(experts_TK, sums_VX)


class _KernelExperts(torch.autograd.Function):
    """Keeps the products' inputs, the logits, what GELU is taken of, and the choice; all else is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        logits_TE: Tensor,
        packed_EP: Tensor,
        form: LayerForm,
        shapes: Shapes,
        members_VT: Tensor,
        alive_T: Tensor | None,
        bias_E: Tensor | None,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stacks = [ExpertWeights(*columns(packed_EP, shapes)), *([ExpertWeights(*shared)] if shared else [])]
        down_NH, up_HM = joined_maps(stacks, hidden_TH.dtype)
        logits_TE, members_VT = logits_TE.contiguous(), members_VT.contiguous()
        narrow_TN = hidden_TH @ down_NH.t()
        biases = [stack.down_bias for stack in stacks]
        inputs_TM, experts_TK, partial_PVX = launch_forward(
            form, logits_TE, narrow_TN, biases, bias_E, alive_T, members_VT
        )
        ctx.save_for_backward(hidden_TH, logits_TE, narrow_TN, experts_TK, members_VT, alive_T, down_NH, up_HM)
        ctx.form, ctx.shapes, ctx.dtype, ctx.shared = form, shapes, packed_EP.dtype, [part.dtype for part in shared]
        ctx.mark_non_differentiable(experts_TK)
        ctx.set_materialize_grads(False)
        return F.linear(inputs_TM, up_HM), experts_TK, partial_PVX.sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, logits_TE, narrow_TN, experts_TK, members_VT, alive_T, down_NH, up_HM = ctx.saved_tensors
        grad_TH, _, grad_sums_VX = output_gradients
        if grad_sums_VX is not None:
            grad_sums_VX = grad_sums_VX.contiguous()
        if grad_TH is None:  # only the losses were used
            grad_TH = torch.zeros_like(hidden_TH)
        inputs_TM, grad_narrow_TN, grad_logits_TE = launch_backward(
            ctx.form, logits_TE, narrow_TN, experts_TK, alive_T, members_VT, grad_TH @ up_HM, grad_sums_VX
        )
        experts = [ctx.form.routed, ctx.form.shared] if ctx.shared else [ctx.form.routed]
        routed, *shared = weight_gradients(grad_TH, inputs_TM, grad_narrow_TN, hidden_TH, experts)
        parts = [part.to(dtype) for stack in shared for part, dtype in zip(stack, ctx.shared, strict=True)]
        packed_EP = packed_gradient(routed, ctx.shapes, ctx.dtype)
        return grad_narrow_TN @ down_NH, grad_logits_TE, packed_EP, None, None, None, None, None, *parts


def launch_forward(
    form: LayerForm,
    logits_TE: Tensor,
    narrow_TN: Tensor,
    biases: list[Tensor],
    bias_E: Tensor | None,
    alive_T: Tensor | None,
    members_VT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask for the forward kernel, which also adds the biases [X, b] to ``narrow_TN``.

    Returns:
        Inputs of the up-projection [T, M] in the dtype of ``narrow_TN``; int64 [T, K], the chosen experts; and fp32
        [programs, V, E + 1], what each program adds to the sums of `KernelRouting`.
    """
    from mome_dist.moe.triton.kernels import forward_kernel

    tokens, views, blocks = len(logits_TE), len(members_VT), form.blocks()
    programs = -(-tokens // blocks["rows"])
    inputs_TM = narrow_TN.new_empty(tokens, form.experts * (form.units + 1))
    experts_TK = logits_TE.new_empty(tokens, form.top_k, dtype=torch.int64)
    partial_PVX = logits_TE.new_empty(programs, views, form.routed + 1)
    with torch.cuda.device_of(narrow_TN):
        forward_kernel[(programs,)](
            logits_TE,
            narrow_TN,
            biases[0],
            biases[-1],
            bias_E,
            alive_T,
            members_VT,
            inputs_TM,
            experts_TK,
            partial_PVX,
            tokens,
            biases[0].stride(0),
            views=views,
            **form._asdict(),
            **blocks,
            **_OPTIONS,
        )
    return inputs_TM, experts_TK, partial_PVX


def launch_backward(
    form: LayerForm,
    logits_TE: Tensor,
    narrow_TN: Tensor,
    experts_TK: Tensor,
    alive_T: Tensor | None,
    members_VT: Tensor,
    grad_inputs_TM: Tensor,
    grad_sums_VX: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask for the backward kernel.

    Returns:
        Inputs of the up-projection once more; gradients of ``narrow_TN`` and of ``logits_TE``, in their dtypes.
    """
    from mome_dist.moe.triton.kernels import backward_kernel

    tokens, views, blocks = len(logits_TE), len(members_VT), form.blocks()
    inputs_TM, grad_narrow_TN = torch.empty_like(grad_inputs_TM), torch.empty_like(narrow_TN)
    grad_logits_TE = torch.empty_like(logits_TE)
    with torch.cuda.device_of(narrow_TN):
        backward_kernel[(-(-tokens // blocks["rows"]),)](
            logits_TE,
            narrow_TN,
            experts_TK,
            alive_T,
            members_VT,
            grad_inputs_TM,
            grad_sums_VX,
            inputs_TM,
            grad_narrow_TN,
            grad_logits_TE,
            tokens,
            views=views,
            **form._asdict(),
            **blocks,
            **_OPTIONS,
        )
    return inputs_TM, grad_narrow_TN, grad_logits_TE


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
