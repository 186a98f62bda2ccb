"""A chain of passes through the same experts: one pass is MoME, two are what the equation says."""

from __future__ import annotations

import torch
from torch import Tensor

from mome_dist.config import load_config
from mome_dist.evaluation.arithmetic import mome_parameters
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.registry import ChainSettings
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.planning.flops import step_flops
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape

HIDDEN, EXPERTS, TOP_K = 16, 6, 2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _awake(spec: RouterSpec) -> LocalMoME:
    module = LocalMoME(HIDDEN, EXPERTS, TOP_K, 1, 3, spec)
    assert module.shared is not None
    for number, parameter in enumerate([*module.routed.parameters(), *module.shared.parameters()]):
        parameter.copy_(_random(*parameter.shape, seed=number) / 3)
    return module


def test_one_pass_is_mome_bit_by_bit() -> None:
    chain, plain = _awake(RouterSpec("chain", ChainSettings(1))), _awake(PLAIN)
    map_EH, hidden = _random(EXPERTS, HIDDEN, seed=9), _random(40, HIDDEN, seed=10)
    for module in (chain, plain):
        (tensor,) = module.router.trained()
        tensor.of(tensor.parameter.detach()).copy_(map_EH)
    outputs = [module.train()(hidden) for module in (chain, plain)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(chain.routed.parameters(), plain.routed.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(*(module.eval()(hidden, base=hidden) for module in (chain, plain)))


def test_later_passes_read_what_earlier_ones_added() -> None:
    chain, plain, hidden = _awake(RouterSpec("chain", ChainSettings(3))), _awake(PLAIN), _random(40, HIDDEN, seed=10)
    maps = [_random(EXPERTS, HIDDEN, seed=20 + number) for number in range(3)]
    for tensor, map_EH in zip(chain.router.trained(), maps, strict=True):
        tensor.of(tensor.parameter.detach()).copy_(map_EH)
    x_NH = hidden
    (tensor,) = plain.router.trained()
    for map_EH in maps:
        tensor.of(tensor.parameter.detach()).copy_(map_EH)
        x_NH = x_NH + plain(x_NH).detach()
    torch.testing.assert_close(chain(hidden), x_NH - hidden, rtol=1e-5, atol=1e-5)
    assert chain.last_routing is not None and len(chain.last_routing.experts_TK) == 3 * 40


def test_what_two_passes_cost() -> None:
    """Two passes of two experts: as many experts' work as one of four, one more map, and the shared expert twice."""
    chain = load_config(["experiment=lrs3", "mome/router=chain", "mome.top_k=2"])
    plain = load_config(["experiment=lrs3"])
    counts = [mome_parameters(config, 3072, 1) for config in (chain, plain)]
    assert counts[0].total - counts[1].total == counts[0].active - counts[1].active == 23 * 3072
    flops = []
    for config in (chain, plain):
        job = job_of(config, find_shape("llama-3.2-3b"), Clip(), {"audio": 8, "video": 8}, on_gpu=True)
        flops.append(step_flops(job)["experts"])
    shared, routed, router = 2 * 3072 * 12, 4 * 2 * 3072 * 12, 23 * 3072
    assert flops[0] / flops[1] == (2 * shared + routed + 2 * router) / (shared + routed + router)
