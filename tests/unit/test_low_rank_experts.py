"""Routed low-rank experts of queries and values in one process: what they become, and what they go with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mome_dist.adapters.lora import OneProcessLoRA
from mome_dist.adapters.peft import PeftAdapter
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config import load_config
from mome_dist.config.derived import check_llm_terms
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.evaluation.arithmetic import expert_parameters
from mome_dist.model.shared import build_reference
from mome_dist.moe.local_low_rank import LocalLowRank
from mome_dist.moe.low_rank import LowRankExperts
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.moe.routing import Routing
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.flops import step_flops
from mome_dist.planning.job import Clip, dispatches, held_parameters, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.preflight import check_experts
from mome_dist.sharing import Sharing
from mome_dist.speech.views import View
from mome_dist.token_context import OneView
from mome_dist.verification.probe import Probe, shrunk, wake_reference
from tests import tiny_llms

EXPERTS, RANK, SCALE = 5, 3, 0.75
ASR = View("asr", 4, None)
IDS = torch.arange(2, 26).view(2, 12)


def _tokens(hidden_BSH: Tensor) -> OneView:
    return OneView(str(ASR), None, hidden_BSH.shape[0] * hidden_BSH.shape[1])


def _attached(llm: LlamaForCausalLM, experts: int, top_k: int, shared: int = 0, **more: Any) -> list[LocalLowRank]:
    """Experts in every layer of an LLM, all of them awake."""
    sizes = {"routed_experts": experts, "top_k": top_k, "shared_experts": shared, "bottleneck": RANK, "scale": SCALE}
    found = [LocalLowRank(layer.self_attn, _tokens, **sizes | more) for layer in llm.model.layers]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for number, each in enumerate(found):
            each.initialize(f"mome.{number}", seed=0)
            for parameter in each.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return found


@torch.no_grad()
def _logits(llm: nn.Module) -> Tensor:
    return llm(IDS).logits


def _same(one: Tensor, other: Tensor, without: Tensor) -> None:
    assert (one - other).abs().max() < 1e-5 * one.abs().max() < (one - without).abs().max()


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return tiny_llms.llama3().eval()


def _as_lora(modules: list[LocalLowRank], rank: int, scale: float, plain: LlamaForCausalLM, folder: Path) -> list[Any]:
    """This project's LoRA, PEFT's, and plain weights, with the factors of all experts side by side."""
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for number, module in enumerate(modules):
        for name in "qv":
            stacks = module._stacks(name)
            a, b = (torch.cat([getattr(stack, factor) for stack in stacks]).detach() for factor in "ab")
            pairs[number, name] = a.flatten(0, 1)[:rank], b.transpose(0, 1).flatten(1)[:, :rank]
    ours, theirs, merged = (copy.deepcopy(plain) for _ in range(3))
    terms = LowRankTerms(rank, scale, "a_random", ("shared",), (ASR,))
    PeftAdapter(rank, scale, pairs).write(folder, "the-llm")
    with torch.no_grad():
        for number, layer in enumerate(ours.model.layers):
            lora = OneProcessLoRA(terms, layer.self_attn, lambda: ASR)
            for name in "qv":
                (factors,) = lora.factors(name, ["shared"])
                factors.a.copy_(pairs[number, name][0])
                factors.b.copy_(pairs[number, name][1])
                projection = merged.model.layers[number].self_attn.get_submodule(f"{name}_proj")
                projection.weight += scale * pairs[number, name][1] @ pairs[number, name][0]
    return [ours, peft.PeftModel.from_pretrained(theirs, str(folder)).eval(), merged]


def test_one_expert_is_lora_of_its_rank(plain: LlamaForCausalLM, tmp_path: Path) -> None:
    llm = copy.deepcopy(plain)
    modules = _attached(llm, 1, 1)
    for other in _as_lora(modules, RANK, SCALE, plain, tmp_path / "peft"):
        _same(_logits(llm), _logits(other), _logits(plain))


def test_identical_experts_are_lora_of_their_rank(plain: LlamaForCausalLM, tmp_path: Path) -> None:
    llm = copy.deepcopy(plain)
    modules = _attached(llm, EXPERTS, 2)
    with torch.no_grad():
        for module in modules:
            for name in "qv":
                for factor in module.get_submodule(name).parameters():
                    factor.copy_(factor[:1].expand_as(factor))
    for other in _as_lora(modules, RANK, SCALE, plain, tmp_path / "peft"):
        _same(_logits(llm), _logits(other), _logits(plain))


def test_equal_gates_of_all_are_lora_of_all_their_ranks(plain: LlamaForCausalLM, tmp_path: Path) -> None:
    llm = copy.deepcopy(plain)
    modules = _attached(llm, EXPERTS, EXPERTS)
    with torch.no_grad():
        for module in modules:
            for weight in module.router.parameters():
                weight.zero_()
    for other in _as_lora(modules, EXPERTS * RANK, SCALE / EXPERTS, plain, tmp_path / "peft"):
        _same(_logits(llm), _logits(other), _logits(plain))


def test_shared_experts_have_a_gate_of_one(plain: LlamaForCausalLM, tmp_path: Path) -> None:
    llm = copy.deepcopy(plain)
    modules = _attached(llm, 1, 1, shared=2)
    for other in _as_lora(modules, 3 * RANK, SCALE, plain, tmp_path / "peft"):
        _same(_logits(llm), _logits(other), _logits(plain))


def test_gates_are_the_routers_one_choice_for_both(plain: LlamaForCausalLM) -> None:
    """One at a time, from what the first layer's attention reads."""
    llm = copy.deepcopy(plain)
    module, layer = _attached(llm, EXPERTS, 2, shared=1)[0], llm.model.layers[0]
    seen: dict[str, Tensor] = {}
    for name in "qv":
        projection = layer.self_attn.get_submodule(f"{name}_proj")
        projection.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: out, "h": args[0]}))
    chosen: list[Routing] = []
    module.observer = chosen.append
    _logits(llm)
    (routing,) = chosen
    hidden_TH, gates_TE = seen["h"].flatten(0, 1), routing.gates_TE()
    for name in "qv":
        routed, shared = module._stacks(name)
        outputs = [hidden_TH @ a.t() @ b.t() for a, b in zip(routed.a, routed.b, strict=True)]
        expected = sum(gates_TE[:, n, None] * each for n, each in enumerate(outputs))
        expected = expected + hidden_TH @ shared.a[0].t() @ shared.b[0].t()
        frozen = hidden_TH @ layer.self_attn.get_submodule(f"{name}_proj").weight.t()
        torch.testing.assert_close(seen[name].flatten(0, 1), frozen + SCALE * expected, rtol=1e-5, atol=1e-5)
    assert torch.equal((gates_TE > 0).sum(dim=1), torch.full((len(gates_TE),), 2))


def test_it_starts_as_nothing_with_a_gradient_for_what_is_zero_alone(plain: LlamaForCausalLM) -> None:
    llm = copy.deepcopy(plain).requires_grad_(False)
    modules = _attached(llm, EXPERTS, 2, shared=1)
    for number, module in enumerate(modules):
        module.initialize(f"mome.{number}", seed=0)
    assert torch.equal(_logits(llm), _logits(plain))
    llm(IDS).logits.square().sum().backward()
    for module in modules:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == name.endswith(".b"), name


@pytest.mark.parametrize("router", [name for name, kind in ROUTERS.items() if kind.settings().evaluates_as_trained])
def test_what_decodes_is_what_trains_with_every_router(plain: LlamaForCausalLM, router: str) -> None:
    settings = ROUTERS[router].settings()
    spec = RouterSpec(router, settings, settings.scores[0], settings.renormalizes[0], 0.0, (ASR, View("vsr", None, 2)))
    llm = copy.deepcopy(plain)
    modules = _attached(llm, 8, 3, shared=1, router=spec)
    for module in modules:
        module.train()
    trained = llm(IDS).logits.detach()
    for module in modules:
        assert module.last_routing is not None
        module.eval()
    decoded = _logits(llm)
    assert all(module.last_routing is None for module in modules)
    assert (decoded - trained).abs().max() < 1e-4 * trained.abs().max()


def test_products_have_the_precision_of_the_frozen_weights(plain: LlamaForCausalLM) -> None:
    """All experts for every token: where some are chosen, rounding changes the choice of near ties."""
    llm = copy.deepcopy(plain)
    modules = _attached(llm, EXPERTS, EXPERTS, shared=1)
    expected = _logits(llm)
    llm.bfloat16()
    rounded = _logits(llm)
    assert all(parameter.dtype is torch.float32 for module in modules for parameter in module.parameters())
    assert rounded.dtype is torch.bfloat16 and (rounded - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_cache_changes_nothing_and_neither_do_neighbours(plain: LlamaForCausalLM) -> None:
    llm = copy.deepcopy(plain)
    for module in _attached(llm, EXPERTS, 2, shared=1):
        module.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = llm.generate(IDS, use_cache=True, **settings)
    assert torch.equal(with_cache, llm.generate(IDS, use_cache=False, **settings))
    assert torch.equal(with_cache[:1], llm.generate(IDS[:1], **settings))
    with torch.no_grad():
        one = llm(IDS[:, :7], use_cache=True)
        rest = llm(IDS[:, 7:], past_key_values=one.past_key_values)
        whole = llm(IDS)
    torch.testing.assert_close(torch.cat([one.logits, rest.logits], dim=1), whole.logits, rtol=1e-4, atol=1e-4)


def test_weights_that_change_are_joined_again(plain: LlamaForCausalLM) -> None:
    llm = copy.deepcopy(plain)
    module = _attached(llm, EXPERTS, 2)[0].eval()
    before = _logits(llm)
    assert torch.equal(_logits(llm), before)
    with torch.no_grad():
        module._stacks("v")[0].b.mul_(2)
    assert not torch.equal(_logits(llm), before)


@pytest.mark.parametrize(("bottleneck", "active"), [(12, 19_181_568), (8, 13_447_168)])
def test_everybody_counts_what_is_built(bottleneck: int, active: int) -> None:
    config = load_config(["experiment=lrs3", "method=mome_lora", f"mome.bottleneck={bottleneck}"])
    shape, mome = find_shape("llama-3.2-3b"), config.mome
    sizes = shape.hidden_size, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    with torch.device("meta"):
        layer = LowRankExperts(0, *sizes, mome.routed_experts, mome.top_k, 1, bottleneck)
    held = sum(parameter.numel() for parameter in layer.parameters())
    count = expert_parameters(config, sizes[0], 28, *sizes[1:])
    assert (mome.top_k, count.active, count.total) == (4, active, 28 * held)
    job = job_of(config, shape, Clip(), {"audio": 8, "video": 8}, on_gpu=True)
    assert sum(each.parameters for each in job.trained if each.sharing.layer is not None) == held
    tokens = sum(n * share for n, share in zip(job.lengths, job.shares, strict=True)) * job.batch_size
    assert step_flops(job)["experts"] == pytest.approx(6 * tokens * active)
    layout = Layout.for_world(2, tp=2, sequence_parallel=True)
    kept, routed, partial = held_parameters(job, layout, 28, first_stage=False)
    rows = 28 * 24 * bottleneck * (sizes[1] + sizes[2])
    assert (kept, routed, partial) == (28 * held - rows / 2, 0, 28 * held - rows)
    assert dispatches(layout, job.spread) == ("none",) and not job.pad_heads


def test_ranks_share_them_as_they_say() -> None:
    layer = LowRankExperts(3, 8, 8, 4, EXPERTS, 2, 1, RANK, PLAIN)
    parts = {part.name: part for part in layer.named_parts("mome.3")}
    assert {name: part.shape for name, part in parts.items() if part.name.endswith("a")} == {
        f"mome.3.{name}.{kind}.a": (count, RANK, 8)
        for name in "qv"
        for kind, count in (("routed", EXPERTS), ("shared", 1))
    }
    assert parts["mome.3.v.routed.b"].shape == (EXPERTS, 4, RANK)
    assert parts["mome.3.v.routed.b"].sharing == Sharing(3, sliced=1, packed="mome.3.b")
    assert parts["mome.3.q.shared.a"].sharing == Sharing(3, partial=True, packed="mome.3.a")
    assert parts["mome.3.router_weight"].sharing == Sharing(3, partial=True)
    assert sum(part.value.numel() for part in parts.values()) == sum(p.numel() for p in layer.parameters())
    assert layer.first_part().shape == (EXPERTS, RANK, 8)


def test_a_state_dict_has_the_names_of_checkpoints_and_is_read_again() -> None:
    with parallel_world(Layout.for_world(1), 0, 60):
        spec = RouterSpec(bias_rate=0.1)
        layer, other = (LowRankExperts(3, 8, 8, 4, EXPERTS, 2, 1, RANK, spec) for _ in range(2))
        layer.initialize("mome.3", seed=0)
        names = {part.name.removeprefix("mome.3.") for part in layer.named_parts("mome.3")} | {"router_bias"}
        state = layer.state_dict()
        assert set(state) == names
        other.load_state_dict(state)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
        with pytest.raises(RuntimeError, match=r"Unexpected key.*elsewhere"):
            other.load_state_dict(state | {"elsewhere": state["router_bias"]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mome=mhsa", "mome.scale=2"], r"mome\.scale=2\.0 is of experts in queries and values"),
        (["mome=lora", "mome.scale=0"], r"mome\.scale=0\.0"),
        (["mome.placement=qv"], r"mome\.expert=bottleneck: set mome\.expert=linear"),
        (["mome=lora", "mome.routed_experts=0"], r"plain LoRA of rank 8: set method=lora"),
        (["mome=lora", "mome.routed_experts=1"], r"a plain LoRA of rank 16: set method=lora"),
        (["mome=lora", "mome.dispatch=alltoall"], r"mome\.dispatch=alltoall .*Set mome\.dispatch=local"),
    ],
)
def test_what_does_not_go_together_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_values(load_config(["experiment=lrs3", *given]))


def test_layouts_that_do_not_go_are_refused() -> None:
    config = load_config(["experiment=lrs3", "mome=lora", "mome.routed_experts=24"])
    check_experts(config, Layout.for_world(2))
    with pytest.raises(UserError, match=r"parallel\.ep=2 does not go with mome\.placement=qv.*Set parallel\.ep=1"):
        check_experts(config, Layout.for_world(2, ep=2))
    shape = find_shape("llama-3.2-3b")
    check_llm_terms(config, Layout.for_world(8, tp=8), shape)
    with pytest.raises(UserError, match=r"mome\.placement=qv adds to heads.*or set mome=mhsa"):
        check_llm_terms(config, Layout.for_world(3, tp=3), shape)


def test_a_model_of_speech_has_them(tmp_path: Path) -> None:
    settings = ["experiment=tiny", "llm.precision=fp32", "parallel=single", "method=mome_lora", "task=asr"]
    probe = Probe(shrunk(load_config(settings), tmp_path), steps=1)
    model = build_reference(probe.config, probe.widths).eval()
    wake_reference(model, probe.config.seed)
    batch = probe.microbatch(range(3))
    names = set(model.state_dict())
    assert {"mome.0.q.routed.a", "mome.3.v.shared.b", "mome.1.router_weight"} <= names
    with torch.no_grad():
        decoded = model.label_logits(batch.tokens, batch.features)
    model.train()
    torch.testing.assert_close(model.label_logits(batch.tokens, batch.features), decoded, rtol=1e-4, atol=1e-4)
    assert len(model.momes) == 4 and model.auxiliary_loss(0.1, 0.01) > 0
