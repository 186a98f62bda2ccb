"""The two kernels: what lies between the products of a MoME layer, forward and backward.

A program has a few rows, and of each row everything: all experts' logits, and their units a few at a time. It writes to
rows of its own and to a partial sum of its own, so nothing is atomic and the same inputs give the same bits. Arithmetic
is fp32, and results are rounded once, as they are stored.

This file needs Triton. Shape suffixes: R rows of a program, of T tokens; C columns: E routed experts, then the shared
ones, X together, then nothing up to a power of two; U units of an expert at a time, of b. N = X b, M = N + X, V views.
Matrices in memory are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softmax(values_RC):
    """Softmax of rows, where -inf counts for nothing, and the logarithm of its denominator: [R, C], [R]."""
    largest_R = tl.max(values_RC, axis=1)
    powers_RC = tl.exp(values_RC - largest_R[:, None])
    sum_R = tl.sum(powers_RC, axis=1)
    return powers_RC / sum_R[:, None], largest_R + tl.log(sum_R)


@triton.jit
def _strength(logits_RC, is_routed_RC, sigmoid: tl.constexpr):
    """The logarithm of the scores up to a constant of the row; -inf where there is no routed expert."""
    if sigmoid:
        # log(sigmoid(x)) without overflow.
        logits_RC = tl.minimum(logits_RC, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits_RC)))
    return tl.where(is_routed_RC, logits_RC, float("-inf"))


@triton.jit
def _gates(strength_RC, scores_RC, chosen_RC, renormalize: tl.constexpr):
    """Gates of the chosen experts, zero for others; those of padding are not zero yet."""
    if renormalize:
        gates_RC, _ = _softmax(tl.where(chosen_RC, strength_RC, float("-inf")))
    else:
        gates_RC = tl.where(chosen_RC, scores_RC, 0.0)
    return gates_RC


@triton.jit
def _normal_cdf(values):
    return 0.5 * (1.0 + tl.erf(values * 0.7071067811865476))


@triton.jit
def forward_kernel(
    logits_TE,
    narrow_TN,  # without the biases of the down-projections; they are added here
    routed_bias_Eb,  # its rows may lie apart
    shared_bias_Sb,  # anything if no expert is shared
    choice_bias_E,  # None for no bias
    alive_T,  # None if no token is dead
    members_VT,
    inputs_TM,  # written: inputs of the up-projection
    experts_TK,  # written
    partial_PVX,  # written: sums over a program's tokens of each view, of probabilities and of squares for the z-loss
    tokens,
    routed_bias_stride,
    views: tl.constexpr,
    routed: tl.constexpr,
    shared: tl.constexpr,
    units: tl.constexpr,
    top_k: tl.constexpr,
    sigmoid: tl.constexpr,
    renormalize: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
):
    experts: tl.constexpr = routed + shared
    program = tl.program_id(0)
    row_R = program.to(tl.int64) * rows + tl.arange(0, rows)
    column_C = tl.arange(0, columns)
    is_row_R = row_R < tokens
    is_routed_RC = is_row_R[:, None] & (column_C < routed)[None, :]
    # Rows behind the last one compute something finite, which nobody stores.
    logits_RC = tl.load(logits_TE + row_R[:, None] * routed + column_C[None, :], mask=is_routed_RC, other=0.0)
    is_expert_RC = (tl.zeros([rows, 1], tl.int32) + column_C[None, :]) < routed
    strength_RC = _strength(logits_RC, is_expert_RC, sigmoid)
    probs_RC, scale_R = _softmax(strength_RC)
    scores_RC = probs_RC
    if sigmoid:
        scores_RC = tl.sigmoid(logits_RC)
        _, scale_R = _softmax(tl.where(is_expert_RC, logits_RC, float("-inf")))

    # Scores rise with logits, which do not saturate. What is not a number is taken first, as by `torch.topk`, so that
    # it reaches the output; among equals the lowest number is.
    order_RC = logits_RC
    if choice_bias_E is not None:
        order_RC = scores_RC + tl.load(choice_bias_E + column_C, mask=column_C < routed, other=0.0)[None, :]
    order_RC = tl.where(order_RC == order_RC, order_RC, float("inf"))
    taken_RC = is_expert_RC == 0
    for place in range(top_k):
        best_R = tl.max(tl.where(taken_RC, float("-inf"), order_RC), axis=1)
        is_best_RC = (order_RC == best_R[:, None]) & (taken_RC == 0)
        expert_R = tl.min(tl.where(is_best_RC, column_C[None, :], columns), axis=1)
        taken_RC = taken_RC | (column_C[None, :] == expert_R[:, None])
        tl.store(experts_TK + row_R * top_k + place, expert_R.to(tl.int64), mask=is_row_R)
    gates_RC = _gates(strength_RC, scores_RC, taken_RC & is_expert_RC, renormalize)
    if alive_T is not None:
        gates_RC *= tl.load(alive_T + row_R, mask=is_row_R, other=0).to(tl.float32)[:, None]
    gates_RC = tl.where(is_expert_RC, gates_RC, 1.0)

    width: tl.constexpr = experts * (units + 1)
    for start in range(0, units, step):
        unit_U = start + tl.arange(0, step)
        is_unit_CU = (column_C < experts)[:, None] & (unit_U < units)[None, :]
        is_routed_CU = is_unit_CU & (column_C < routed)[:, None]
        bias_CU = tl.load(
            routed_bias_Eb + column_C[:, None] * routed_bias_stride + unit_U[None, :], mask=is_routed_CU, other=0.0
        ).to(tl.float32)
        if shared > 0:
            place_CU = (column_C - routed)[:, None] * units + unit_U[None, :]
            is_shared_CU = is_unit_CU & (column_C >= routed)[:, None]
            bias_CU += tl.load(shared_bias_Sb + place_CU, mask=is_shared_CU, other=0.0).to(tl.float32)
        mask_RCU = is_row_R[:, None, None] & is_unit_CU[None, :, :]
        column_CU = column_C[:, None] * units + unit_U[None, :]
        narrow_RCU = narrow_TN + row_R[:, None, None] * (experts * units) + column_CU[None, :, :]
        value_RCU = tl.load(narrow_RCU, mask=mask_RCU, other=0.0).to(tl.float32) + bias_CU[None, :, :]
        # The backward pass starts from what is kept here: this one does, too.
        value_RCU = value_RCU.to(narrow_TN.dtype.element_ty)
        tl.store(narrow_RCU, value_RCU, mask=mask_RCU)
        value_RCU = value_RCU.to(tl.float32)
        gated_RCU = value_RCU * _normal_cdf(value_RCU) * gates_RC[:, :, None]
        tl.store(inputs_TM + row_R[:, None, None] * width + column_CU[None, :, :], gated_RCU, mask=mask_RCU)
    is_used_RC = is_row_R[:, None] & (column_C < experts)[None, :]
    gate_RC = inputs_TM + row_R[:, None] * width + (experts * units + column_C)[None, :]
    tl.store(gate_RC, gates_RC, mask=is_used_RC)

    for view in range(views):
        member_R = tl.load(members_VT + view * tokens + row_R, mask=is_row_R, other=0.0)
        sums_V = partial_PVX + (program * views + view) * (routed + 1)
        tl.store(sums_V + column_C, tl.sum(member_R[:, None] * probs_RC, axis=0), mask=column_C < routed)
        tl.store(sums_V + routed, tl.sum(member_R * scale_R * scale_R, axis=0))


@triton.jit
def backward_kernel(
    logits_TE,
    narrow_TN,  # with the biases
    experts_TK,
    alive_T,  # None if no token is dead
    members_VT,
    grad_inputs_TM,
    grad_sums_VX,  # None if nobody used the sums
    inputs_TM,  # written, as the forward pass did
    grad_narrow_TN,  # written
    grad_logits_TE,  # written
    tokens,
    views: tl.constexpr,
    routed: tl.constexpr,
    shared: tl.constexpr,
    units: tl.constexpr,
    top_k: tl.constexpr,
    sigmoid: tl.constexpr,
    renormalize: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
):
    experts: tl.constexpr = routed + shared
    row_R = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column_C = tl.arange(0, columns)
    is_row_R = row_R < tokens
    is_routed_RC = is_row_R[:, None] & (column_C < routed)[None, :]
    logits_RC = tl.load(logits_TE + row_R[:, None] * routed + column_C[None, :], mask=is_routed_RC, other=0.0)
    is_expert_RC = (tl.zeros([rows, 1], tl.int32) + column_C[None, :]) < routed
    strength_RC = _strength(logits_RC, is_expert_RC, sigmoid)
    probs_RC, scale_R = _softmax(strength_RC)
    scores_RC, of_logits_RC = probs_RC, probs_RC
    if sigmoid:
        scores_RC = tl.sigmoid(logits_RC)
        of_logits_RC, scale_R = _softmax(tl.where(is_expert_RC, logits_RC, float("-inf")))
    chosen_RC = is_expert_RC & (is_expert_RC == 0)
    for place in range(top_k):
        # Rows behind the last one choose an expert, too: a softmax of nothing is not a number.
        expert_R = tl.load(experts_TK + row_R * top_k + place, mask=is_row_R, other=0)
        chosen_RC = chosen_RC | (column_C[None, :] == expert_R[:, None])
    raw_RC = _gates(strength_RC, scores_RC, chosen_RC, renormalize)
    alive_R = tl.full([rows], 1.0, tl.float32)
    if alive_T is not None:
        alive_R = tl.load(alive_T + row_R, mask=is_row_R, other=0).to(tl.float32)
    gates_RC = tl.where(is_expert_RC, raw_RC * alive_R[:, None], 1.0)

    width: tl.constexpr = experts * (units + 1)
    is_used_RC = is_row_R[:, None] & (column_C < experts)[None, :]
    gate_RC = row_R[:, None] * width + (experts * units + column_C)[None, :]
    tl.store(inputs_TM + gate_RC, gates_RC, mask=is_used_RC)
    grad_gates_RC = tl.load(grad_inputs_TM + gate_RC, mask=is_routed_RC, other=0.0).to(tl.float32)
    for start in range(0, units, step):
        unit_U = start + tl.arange(0, step)
        column_CU = column_C[:, None] * units + unit_U[None, :]
        is_unit_CU = (column_C < experts)[:, None] & (unit_U < units)[None, :]
        mask_RCU = is_row_R[:, None, None] & is_unit_CU[None, :, :]
        narrow_RCU = row_R[:, None, None] * (experts * units) + column_CU[None, :, :]
        inputs_RCU = row_R[:, None, None] * width + column_CU[None, :, :]
        value_RCU = tl.load(narrow_TN + narrow_RCU, mask=mask_RCU, other=0.0).to(tl.float32)
        grad_RCU = tl.load(grad_inputs_TM + inputs_RCU, mask=mask_RCU, other=0.0).to(tl.float32)
        cdf_RCU = _normal_cdf(value_RCU)
        density_RCU = 0.3989422804014327 * tl.exp(-0.5 * value_RCU * value_RCU)
        grad_gates_RC += tl.sum(grad_RCU * value_RCU * cdf_RCU, axis=2)
        tl.store(inputs_TM + inputs_RCU, value_RCU * cdf_RCU * gates_RC[:, :, None], mask=mask_RCU)
        grad_RCU *= gates_RC[:, :, None] * (cdf_RCU + value_RCU * density_RCU)
        tl.store(grad_narrow_TN + narrow_RCU, grad_RCU, mask=mask_RCU)

    grad_gates_RC = tl.where(chosen_RC, grad_gates_RC * alive_R[:, None], 0.0)
    grad_probs_RC = tl.zeros([rows, columns], tl.float32)
    grad_strength_RC = tl.zeros([rows, columns], tl.float32)
    grad_logits_RC = tl.zeros([rows, columns], tl.float32)
    if renormalize:
        grad_strength_RC = raw_RC * (grad_gates_RC - tl.sum(raw_RC * grad_gates_RC, axis=1)[:, None])
    elif sigmoid:
        grad_logits_RC = grad_gates_RC * scores_RC * (1.0 - scores_RC)
    else:
        grad_probs_RC = grad_gates_RC
    if grad_sums_VX is not None:
        grad_square_R = tl.zeros([rows], tl.float32)
        for view in range(views):
            member_R = tl.load(members_VT + view * tokens + row_R, mask=is_row_R, other=0.0)
            of_view = grad_sums_VX + view * (routed + 1)
            grad_sum_C = tl.load(of_view + column_C, mask=column_C < routed, other=0.0)
            grad_probs_RC += member_R[:, None] * grad_sum_C[None, :]
            grad_square_R += member_R * tl.load(of_view + routed)
        grad_logits_RC += 2.0 * (grad_square_R * scale_R)[:, None] * of_logits_RC
    grad_strength_RC += probs_RC * (grad_probs_RC - tl.sum(probs_RC * grad_probs_RC, axis=1)[:, None])
    if sigmoid:
        grad_strength_RC *= 1.0 - scores_RC
    grad_logits_RC += grad_strength_RC
    tl.store(grad_logits_TE + row_R[:, None] * routed + column_C[None, :], grad_logits_RC, mask=is_routed_RC)
