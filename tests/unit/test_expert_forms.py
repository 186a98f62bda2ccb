"""What every form of an expert must do, by the registry; and how the forms are special cases of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.forms.registry import FORMS, find_form
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.packed import FEW_TOKENS
from mome_dist.moe.ragged import EVALUATION_ROWS, Groups, by_expert
from mome_dist.moe.routed import RoutedExperts
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import Clip, dispatches, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.preflight import check_experts

HIDDEN, BOTTLENECK, EXPERTS, TOP_K = 20, 3, 6, 2
MOST_TOKENS = 3 * EVALUATION_ROWS
every_form = pytest.mark.parametrize("name", FORMS)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _module(name: str, shared: int = 1) -> LocalMoME:
    module = LocalMoME(HIDDEN, EXPERTS, TOP_K, shared, BOTTLENECK, expert=name)
    module.initialize("mome.0", seed=0)
    return module


@torch.no_grad()
def _awake(name: str, shared: int = 1) -> LocalMoME:
    module = _module(name, shared)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(_random(*parameter.shape, seed=number))
    return module


def _width(name: str) -> int:
    """Values of a row that experts of the form read."""
    return find_form(name).width(HIDDEN, BOTTLENECK)


def _weights(name: str, experts: int, seed: int = 0) -> list[Tensor]:
    shapes = find_form(name).shapes(HIDDEN, BOTTLENECK)
    return [_random(experts, *shape, seed=seed + n, dtype=torch.float64) for n, shape in enumerate(shapes)]


@every_form
def test_it_starts_as_nothing_with_a_gradient_for_what_is_zero_alone(name: str) -> None:
    module, hidden = _module(name), _random(40, HIDDEN)
    for passed in (module.train()(hidden), module.eval()(hidden), torch.no_grad()(module)(hidden.bfloat16())):
        assert not passed.any()
    assert torch.equal(torch.no_grad()(module)(hidden[:1], base=hidden[:1]), hidden[:1])
    stacks = [module.routed, module.shared, module.common]
    weight = _random(40, HIDDEN, seed=1)
    for started in (True, False):
        module.zero_grad()
        (module.train()(hidden) * weight).sum().backward()
        reached = set()
        for stack in stacks:
            assert stack is not None
            for part, parameter in stack.named_parameters():
                assert parameter.grad is not None
                if parameter.grad.any():
                    reached.add(part)
        parts = [*module.routed.form.parts, *module.routed.form.common]
        names = {part.name for part in parts}
        zero = {part.name for part in parts if part.start == "zero"}
        assert reached and reached <= zero if started else reached == names
        with torch.no_grad():  # one step on
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.1)


def _one_at_a_time(name: str, hidden_TH: Tensor, weights: Sequence[Tensor], gates_TE: Tensor) -> Tensor:
    outputs = [find_form(name).one(hidden_TH, *own) for own in zip(*weights, strict=True)]
    return (torch.stack(outputs, dim=2) * gates_TE[:, None]).sum(dim=2)


def _routes(tokens: int) -> tuple[Tensor, Tensor]:
    """Two experts of each token, never the last one: int64 [T, K] and their gates [T, K]."""
    experts_TK = _random(MOST_TOKENS, EXPERTS - 1, seed=4)[:tokens].topk(TOP_K, dim=1).indices
    return experts_TK, _random(MOST_TOKENS, TOP_K, seed=5)[:tokens]


def _ragged(name: str, hidden_TH: Tensor, gates_TK: Tensor, weights: Sequence[Tensor], training: bool) -> Tensor:
    experts_TK, _ = _routes(len(hidden_TH))
    counts = torch.bincount(experts_TK.flatten(), minlength=EXPERTS).tolist()
    order_R, tokens = by_expert(
        experts_TK.flatten(), torch.ones(experts_TK.numel(), dtype=torch.bool), TOP_K, sum(counts)
    )
    groups = Groups.of([counts], training, hidden_TH.device)
    rows, gates_P = groups.placement.after(tokens), groups.gates(gates_TK.flatten()[order_R])
    return rows.collect(_of_groups(name, rows.spread(hidden_TH), gates_P, weights, groups))


def _of_groups(name: str, rows_PH: Tensor, gates_P: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    packed_EP = torch.cat([part.flatten(1) for part in weights], dim=1)
    form, shapes = find_form(name), tuple(tuple(part.shape[1:]) for part in weights)
    laid_out = form.lay_out(packed_EP, shapes, rows_PH.dtype)
    return form.ragged(rows_PH, gates_P, packed_EP, shapes, laid_out, groups)


@pytest.mark.parametrize("training", [True, False])
@every_form
def test_dense_equals_ragged_equals_one_at_a_time(name: str, training: bool) -> None:
    hidden, weights = _random(50, _width(name), dtype=torch.float64), _weights(name, EXPERTS)
    experts_TK, gates_TK = _routes(50)

    def gates_TE(gates: Tensor) -> Tensor:
        return torch.zeros(50, EXPERTS, dtype=gates.dtype).scatter(1, experts_TK, gates)

    forms: dict[str, Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]] = {
        "one at a time": lambda h, g, w: _one_at_a_time(name, h, w, gates_TE(g)),
        "dense": lambda h, g, w: find_form(name).dense(h, w, gates_TE(g)),
        "ragged": lambda h, g, w: _ragged(name, h, g, w, training),
    }
    found: dict[str, list[Tensor]] = {}
    for form, compute in forms.items():
        leaves = [each.clone().requires_grad_() for each in (hidden, gates_TK, *weights)]
        output = compute(leaves[0], leaves[1], leaves[2:])
        weight = _random(50, _width(name), seed=9, dtype=torch.float64)
        found[form] = [output, *torch.autograd.grad(output, leaves, weight)]
    expected = found.pop("one at a time")
    for actual in found.values():
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(actual[1:], expected[1:], strict=True):  # gates, and some sums, are fp32
            assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@every_form
def test_shared_experts_have_a_gate_of_one(name: str) -> None:
    hidden, shared = _random(9, _width(name), dtype=torch.float64), _weights(name, 2, 30)
    weights = _weights(name, EXPERTS)
    gates = _random(9, EXPERTS, seed=3)
    of_shared = _one_at_a_time(name, hidden, shared, torch.ones(9, 2))
    expected = _one_at_a_time(name, hidden, weights, gates) + of_shared
    torch.testing.assert_close(find_form(name).dense(hidden, weights, gates, shared), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(find_form(name).summed(hidden, shared), of_shared, rtol=1e-12, atol=1e-12)


@every_form
def test_ranks_without_rows_have_gradients_of_zero(name: str) -> None:
    weights = [weight.float().requires_grad_() for weight in _weights(name, 2)]
    groups = Groups.of([[0, 0]], True, torch.device("cpu"))
    rows = torch.zeros(0, _width(name), requires_grad=True)
    output = _of_groups(name, rows, torch.zeros(0), weights, groups)
    assert output.shape == (0, _width(name))
    output.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


@pytest.mark.parametrize("training", [True, False])
@every_form
def test_neighbours_change_no_bit(name: str, training: bool) -> None:
    module, hidden = _awake(name).train(training), _random(FEW_TOKENS + 6, HIDDEN)
    others = torch.cat([hidden[:3], _random(FEW_TOKENS + 3, HIDDEN, seed=7)])
    with torch.set_grad_enabled(training):
        assert torch.equal(module(hidden)[:3], module(others)[:3])


@every_form
def test_in_evaluation_more_rows_change_no_bit(name: str) -> None:
    hidden, weights = _random(MOST_TOKENS, _width(name)), [weight.float() for weight in _weights(name, EXPERTS)]
    _, gates_TK = _routes(MOST_TOKENS)
    whole = _ragged(name, hidden, gates_TK, weights, training=False)
    for few in (1, 5):
        alone = _ragged(name, hidden[:few], gates_TK[:few], weights, training=False)
        assert torch.equal(whole[:few], alone)


@pytest.mark.parametrize("shared", [0, 1, 2])
@every_form
def test_what_decodes_is_what_trains(name: str, shared: int) -> None:
    module = _awake(name, shared)
    for tokens in (1, 2, FEW_TOKENS + 1):
        hidden, base = _random(tokens, HIDDEN, seed=tokens), _random(tokens, HIDDEN, seed=1)
        trained = module.train()(hidden, base=base).detach()
        with torch.no_grad():
            decoded = module.eval()(hidden, base=base)
            rounded = module(hidden.bfloat16(), base=base.bfloat16())
        scale = trained.abs().max()
        assert (decoded - trained).abs().max() < 2e-6 * scale
        assert rounded.dtype is torch.bfloat16 and (rounded - trained).abs().max() < 0.03 * scale


@every_form
def test_it_has_as_many_parameters_as_everybody_counts(name: str) -> None:
    form, config = find_form(name), load_config(["experiment=lrs3", f"mome.expert={name}"])
    shape, mome = find_shape("llama-3.2-3b"), config.mome
    with torch.device("meta"):
        module = LocalMoME(shape.hidden_size, mome.routed_experts, mome.top_k, 1, mome.bottleneck, expert=name)
        packed = RoutedExperts(3, shape.hidden_size, mome.bottleneck, "group", name)
    layer = sum(parameter.numel() for parameter in module.parameters())
    assert mome_parameters(config, shape.hidden_size, 28).total == 28 * layer
    job = job_of(config, shape, Clip(), {"audio": 8, "video": 8}, on_gpu=True)
    assert sum(each.parameters for each in job.trained if each.sharing.layer is not None) == layer
    assert packed.packed.numel() == 3 * job.expert_parameters
    numbers = [name for name, _ in ExpertStack(1, 4, 2, name).named_parameters()]
    assert numbers == [part.name for part in form.parts]
    assert [tensor.name for tensor in packed.tensors()][: len(numbers)] == [
        f"deepspeed_experts.0.{part.saved_name}" for part in form.parts
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_form
def test_autograd_keeps_what_the_planner_counts(name: str, dtype: torch.dtype) -> None:
    hidden_size, bottleneck, experts, tokens = 64, 12, 24, 512
    form = find_form(name)
    weights = [_random(experts, *shape).requires_grad_() for shape in form.shapes(hidden_size, bottleneck)]
    hidden = _random(tokens, form.width(hidden_size, bottleneck)).to(dtype).requires_grad_()
    gates = _random(tokens, experts).requires_grad_()
    given = {each.untyped_storage().data_ptr() for each in (hidden, gates, *weights)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = form.dense(hidden, weights, gates)
    expected = experts * (tokens * (form.kept(hidden_size, bottleneck) + 1) + form.joined(hidden_size, bottleneck))
    assert sum(kept.values()) == pytest.approx(expected * dtype.itemsize, rel=0.2), output.shape


def test_ragged_experts_keep_what_the_planner_counts() -> None:
    hidden_size, bottleneck, experts = 64, 12, 4
    form, groups = find_form("bottleneck"), Groups.of([[32] * experts], True, torch.device("cpu"))
    packed_EP = _random(experts, form.parameters(hidden_size, bottleneck)).requires_grad_()
    rows_PH, gates_P = _random(32 * experts, hidden_size).requires_grad_(), _random(32 * experts)
    shapes = form.shapes(hidden_size, bottleneck)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor is not rows_PH else 0
        return tensor

    laid_out = form.lay_out(packed_EP, shapes, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        form.ragged(rows_PH, gates_P, packed_EP, shapes, laid_out, groups)
    rows = len(rows_PH) * (form.kept_of_rows(hidden_size, bottleneck) + 1)
    assert kept == rows + experts * form.joined_of_rows(hidden_size, bottleneck)


def test_a_form_that_needs_a_dispatch_gets_it_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(find_form("linear")), "dispatches", ("local",))
    spread = Layout.for_world(2, ep=2)
    assert dispatches(Layout.for_world(2), EXPERTS, expert="linear") == ("local",)
    assert dispatches(spread, EXPERTS, expert="linear") == ()
    settings = ["experiment=lrs3", "mome=linear", "mome.routed_experts=24"]
    check_experts(load_config(settings), Layout.for_world(2))
    for given, layout in ((["mome.dispatch=alltoall"], Layout.for_world(2)), (["mome.dispatch=auto"], spread)):
        with pytest.raises(UserError, match=r"mome\.expert=linear .*works with mome\.dispatch=local only"):
            check_experts(load_config([*settings, *given]), layout)


def _lora(hidden_TH: Tensor, down_bH: Tensor, up_Hb: Tensor) -> Tensor:
    return hidden_TH @ down_bH.t() @ up_Hb.t()


def test_linear_experts_are_lora() -> None:
    hidden, (down, up) = _random(9, HIDDEN, dtype=torch.float64), _weights("linear", EXPERTS)
    dense, chosen = find_form("linear").dense, torch.zeros(9, EXPERTS)
    chosen[:, :TOP_K] = torch.tensor([0.75, 0.25])
    same = [part[:1].expand_as(part) for part in (down, up)]
    torch.testing.assert_close(dense(hidden, same, chosen), _lora(hidden, down[0], up[0]))
    # Equal gates of all: one of their rank together.
    wide = _lora(hidden, down.flatten(0, 1), up.transpose(0, 1).flatten(1)) / 2
    torch.testing.assert_close(dense(hidden, [down, up], torch.full((9, EXPERTS), 0.5)), wide)


def test_a_bottleneck_far_above_zero_is_linear() -> None:
    """GELU(x) is x there, and the output bias takes off what the input bias adds."""
    hidden, (down, up) = _random(9, HIDDEN, dtype=torch.float64), _weights("linear", 2)
    far = 100.0
    lifted = [down, torch.full(down.shape[:2], far, dtype=torch.float64), up, -far * up.sum(dim=2)]
    gates = torch.tensor([[0.25, 0.75]]).expand(9, 2)
    expected = find_form("linear").dense(hidden, [down, up], gates)
    torch.testing.assert_close(find_form("bottleneck").dense(hidden, lifted, gates), expected, rtol=1e-9, atol=1e-9)


def test_a_gated_expert_whose_gate_sees_a_constant_is_linear() -> None:
    hidden, (down, up) = _random(9, HIDDEN, dtype=torch.float64), _weights("linear", 2)
    hidden[:, -1] = 1
    gate = torch.zeros_like(down)
    gate[:, :, -1] = 2.0
    gates = torch.tensor([[0.25, 0.75]]).expand(9, 2)
    expected = F.silu(torch.tensor(2.0, dtype=torch.float64)) * find_form("linear").dense(hidden, [down, up], gates)
    torch.testing.assert_close(find_form("gated").dense(hidden, [gate, down, up], gates), expected)


def test_a_form_starts_alike_whoever_holds_it() -> None:
    stack = ExpertStack(2, 16, 4, "gated")
    stack.initialize("mome.3.routed", seed=5)
    bound = 1 / math.sqrt(16)
    for part in ("gate_weight", "in_weight"):
        value = stack.get_parameter(part).detach()
        assert 0.9 * bound < value.abs().max() < bound and not torch.equal(value[0], value[1])


def _latent(down_bH: Tensor, up_Hb: Tensor, cores_Ebb: Tensor, hidden_TH: Tensor, gates_TE: Tensor) -> Tensor:
    form = find_form("latent")
    inside_TD = form.enter(hidden_TH, down_bH, up_Hb)
    return form.leave(form.dense(inside_TD, [cores_Ebb], gates_TE), down_bH, up_Hb)


def test_latent_experts_of_one_core_are_a_dense_adapter() -> None:
    hidden, (down, up) = _random(9, HIDDEN, dtype=torch.float64), [part[0] for part in _weights("linear", 1)]
    core, gates = (
        _random(BOTTLENECK, BOTTLENECK, seed=3, dtype=torch.float64),
        _random(9, EXPERTS, dtype=torch.float64).softmax(dim=1),
    )
    found = _latent(down, up, core.expand(EXPERTS, -1, -1), hidden, gates)
    torch.testing.assert_close(found, F.gelu(hidden @ down.t() @ core.t()) @ up.t(), rtol=1e-12, atol=1e-12)


def test_latent_experts_that_choose_units_are_bottlenecks_of_these() -> None:
    hidden, (down, up) = _random(9, HIDDEN, dtype=torch.float64), [part[0] for part in _weights("linear", 1)]
    chosen, gates = [[0, 1], [2, 0], [1, 2]], _random(9, 3, seed=2, dtype=torch.float64)
    cores = torch.stack(
        [torch.eye(BOTTLENECK, dtype=torch.float64)[own].t() @ torch.eye(BOTTLENECK)[own].double() for own in chosen]
    )
    found = _latent(down, up, cores, hidden, gates)
    own = [
        torch.stack([down[units] for units in chosen]),
        torch.zeros(3, 2),
        torch.stack([up[:, units] for units in chosen]),
    ]
    biased = [part.double() for part in (*own, torch.zeros(3, HIDDEN))]
    torch.testing.assert_close(found, find_form("bottleneck").dense(hidden, biased, gates), rtol=1e-12, atol=1e-12)


def test_counts_at_the_size_of_the_paper_s_llm() -> None:
    """Llama 3.2-3B, a layer, from the equations: 2 H b of the layer and b b an expert; u and v of 276 experts."""
    latent, linear = find_form("latent"), find_form("linear")
    assert latent.common_parameters(3072, 48) + 23 * latent.parameters(3072, 48) == 347_904
    for name, experts, count in (("rank_one", 276, 276 * 2 * 3072), ("linear", 23, 276 * 2 * 3072)):
        mome = load_config(["experiment=lrs3", f"mome={name}"]).mome
        assert (mome.expert, mome.routed_experts) == ("linear", experts)
        assert mome.routed_experts * linear.parameters(3072, mome.bottleneck) == count
        assert mome.top_k * mome.bottleneck == 48, "units that a token uses"
    # The router is a third of what trains with experts of rank one: H numbers an expert beside 2 H.
    counted = mome_parameters(load_config(["experiment=lrs3", "mome=rank_one", "mome.shared_experts=0"]), 3072, 1)
    assert counted.total == 276 * 3 * 3072 and counted.active == (48 * 2 + 276) * 3072


def test_what_latent_experts_send_is_their_width() -> None:
    job = job_of(
        load_config(["experiment=lrs3", "mome=latent"]),
        find_shape("llama-3.2-3b"),
        Clip(),
        {"audio": 8, "video": 8},
        on_gpu=True,
    )
    assert job.expert_width == 48 and job.common_parameters == 294_912


def test_a_router_that_reads_experts_refuses_those_that_share_their_first_map() -> None:
    config = load_config(["experiment=tiny", "mome=latent", "mome/router=autonomy"])
    with pytest.raises(UserError, match=r"mome\.router\.name=autonomy .* mome\.expert=latent"):
        check_experts(config, Layout.for_world(1))
