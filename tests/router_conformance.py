"""What every router of the registry is held to. Nothing here knows any of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import router_of
from mome_dist.config.values import check_values
from mome_dist.engine.deepspeed_names import module_order
from mome_dist.model.distributed import mome_parts
from mome_dist.moe.balance import load_balance_loss, router_z_loss
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routers.build import build_router
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.moe.routing import Routing
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.paths import configs_dir
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.ports import free_port
from mome_dist.token_context import Modality, TokenContext
from mome_dist.verification.compare import TOLERANCE, compare
from mome_dist.verification.probe import Probe, shrunk, wake, wake_reference
from mome_dist.verification.run import Case, Outcome, merged, run_case, run_reference
from mome_dist.verification.verify import OPTIMIZERS
from tests.parallel.resharding import STEPS, train_and_save
from tests.parallel.same_checkpoints import assert_engines_go_on
from tests.parallel.worlds import run_world
from tests.patience import patience
from tests.probes import OVERRIDES

HIDDEN, EXPERTS, TOP_K, BOTTLENECK, SEED = 16, 6, 2, 3, 5
BALANCE, Z_LOSS = 0.3, 0.1
EXPERT_PARALLEL = {"local": 1, "gather": 2, "alltoall": 2}
LAYOUTS = {
    "tp2 ep2 sp": Layout.for_world(4, tp=2, ep=2, sequence_parallel=True),
    "pp2 ep2 recompute": Layout.for_world(4, pp=2, ep=2, recompute="full"),
}
TARGETS = {
    "pp2 ep2 zero0": (Layout.for_world(4, pp=2, ep=2), 0),
    "tp2 sp zero2": (Layout.for_world(2, tp=2, sequence_parallel=True), 2),
}


def forms(name: str) -> Iterator[list[str]]:
    """Overrides that choose a router, with every choice that its settings have."""
    kind = ROUTERS[name].settings
    chosen = [
        [f"mome.router.{field.name}={value}" for value in _values(field)]
        for field in dataclasses.fields(kind)
        if "choices" in field.metadata or isinstance(field.default, bool)
    ]
    common = [f"mome/router={name}", f"mome.score={kind.scores[0]}", f"mome.renormalize={kind.renormalizes[0]}"]
    common += ["mome.dispatch=auto"] + ([f"mome.top_k={kind.only_top_k}"] if kind.only_top_k is not None else [])
    return ([*common, *own] for own in itertools.product(*chosen))


def _values(field: dataclasses.Field[Any]) -> list[str]:
    """All choices; of a list, what it has by itself, and all together."""
    if field.default_factory is dataclasses.MISSING:
        return list(field.metadata.get("choices", ("false", "true")))
    return [f"[{','.join(chosen)}]" for chosen in (field.default_factory(), field.metadata["choices"])]


def saved(form: list[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of what a router of a small run saves.

    No run is composed for it, of which every process of the tests would do dozens before its first test.
    """
    chosen = {key: value for key, _, value in (override.partition("=") for override in form)}
    values = yaml.safe_load((configs_dir() / f"mome/router/{chosen['mome/router']}.yaml").read_text())
    own = {
        key.removeprefix("mome.router."): yaml.safe_load(value) for key, value in chosen.items() if ".router." in key
    }
    config = configured([])
    config.mome.router = values | own
    router = build_router(router_of(config), HIDDEN, EXPERTS, TOP_K)
    return tuple((tensor.name, tensor.shape) for tensor in router.tensors())


ALL = {" ".join([name, *form[4:]]): form for name in ROUTERS for form in forms(name)}


def configured(form: list[str], *more: str) -> RunConfig:
    """A small run with a router, of one view of each task."""
    return copy.deepcopy(_composed(*OVERRIDES, *form, *more))


@functools.cache
def _composed(*overrides: str) -> RunConfig:
    config = load_config(overrides)
    check_values(config)
    return config


def context(lengths: tuple[int, int, int], dead: int) -> TokenContext:
    """One sequence of each of the run's views: speech of its kinds, then text; and dead tokens behind."""
    kinds = ((Modality.AUDIO,), (Modality.VIDEO,), (Modality.AUDIO, Modality.VIDEO))
    modality = [kind for each, length in zip(kinds, lengths, strict=True) for kind in _spoken(each, length)]
    views = zip(("asr(4)", "vsr(2)", "avsr(16,5)"), lengths, strict=True)
    sizes = [(name, [n]) for name, n in views]
    return TokenContext.of(sizes, modality, multiple=1, least=sum(lengths) + dead, draws=lengths)


def _spoken(kinds: tuple[Modality, ...], length: int) -> list[Modality]:
    speech = [kind for kind in kinds for _ in range(length // 2 // len(kinds))]
    return [*speech, *[Modality.TEXT] * (length - len(speech))]


def hidden(tokens: int, seed: int) -> Tensor:
    """fp32 [T, H]."""
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def local_form(form: list[str]) -> LocalMoME:
    """The one-process form with values that carry a signal everywhere."""
    module = LocalMoME(HIDDEN, EXPERTS, TOP_K, 1, BOTTLENECK, router_of(configured(form)))
    module.initialize("mome.0", SEED)
    spread(module.router)
    holder = nn.Module()
    holder.mome = nn.ModuleList([module])
    wake_reference(holder, SEED)
    return module


@torch.no_grad()
def spread(router: Router) -> None:
    """Take tokens' experts apart: the initial values of maps give all nearly the same score, and what starts at zero
    says nothing."""
    for parameter in router.parameters():
        parameter.mul_(10)
        if not parameter.any():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))


def starts_as_a_no_op(form: list[str]) -> None:
    """An untrained module adds nothing, in training and in evaluation."""
    module = LocalMoME(HIDDEN, EXPERTS, TOP_K, 1, BOTTLENECK, router_of(configured(form)))
    module.initialize("mome.0", SEED)
    tokens = context((6, 5, 7), 2)
    assert module(hidden(20, 1), None, tokens).eq(0).all()
    with torch.no_grad():
        assert module.eval()(hidden(20, 1), None, tokens).eq(0).all()


def initial_values_are_those_of_names(form: list[str]) -> None:
    """They depend on the seed and on each tensor's global name, and no name is one that DeepSpeed takes for an
    expert's."""
    spec = router_of(configured(form))
    first, again, other = (build_router(spec, HIDDEN, EXPERTS, TOP_K) for _ in range(3))
    for router, layer in ((first, 0), (again, 0), (other, 1)):
        router.initialize(f"mome.{layer}", SEED)
    names = [name for name, _ in first.named_parameters()]
    in_files = sorted(names, key=lambda name: module_order(f"mome.0.router_{name}"))
    assert names == in_files, "an engine's checkpoint has them in another order"
    for one, two, three in zip(first.trained(), again.trained(), other.trained(), strict=True):
        value = one.of(one.parameter)
        assert value.equal(two.of(two.parameter))
        assert not value.any() or not value.equal(three.of(three.parameter)), f"{one.name} is alike in all layers"
        assert "expert" not in one.name


def shards_add_up(form: list[str]) -> None:
    """Gradients of a router, of gates and of all losses, summed over shards of the tokens, are those of all tokens."""
    router = local_form(form).router
    whole, rows_NH = context((8, 6, 7), 3), hidden(24, 2)
    counts_VE = whole.members_VN @ router(rows_NH, whole).selected_TE().float()
    totals, gradients = [], []
    # Parts of an utterance that need each other's sums have a group of ranks: layouts are about it.
    for ranks in (1, 1 if router.spec.settings.of_utterance else 3):
        losses, sums = list[Tensor](), list[Tensor]()
        for rank, own_TH in enumerate(rows_NH.chunk(ranks)):
            tokens = whole.part(rank, ranks)
            routing = router(own_TH, tokens)
            losses.append((routing.gates_TK * own_TH[:, : routing.gates_TK.shape[1]]).sum())
            losses += _view_losses(router.losses, routing, tokens, counts_VE, whole.sizes_V2[:, 0])
            sums += _own_sums(router, routing, tokens)
        losses += _batch_loss(router, sums, whole.sizes_V2[:, 0])
        totals.append(torch.stack(losses).sum())
        parameters = list(router.parameters())
        gradients.append(torch.autograd.grad(totals[-1], parameters) if parameters else ())
    torch.testing.assert_close(*totals)
    for whole_gradient, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(whole_gradient, summed)


def _view_losses(
    own: Callable[[Routing], Any], routing: Routing, tokens: TokenContext, counts_VE: Tensor, sizes_V: Tensor
) -> list[Tensor]:
    """A rank's parts of the losses, in the mean over views."""
    losses = []
    for members_T, counts_E, size in zip(tokens.members_VN.bool(), counts_VE, sizes_V, strict=True):
        of_view = routing.restricted_to(members_T)
        loss = BALANCE * load_balance_loss(of_view, counts_E, size) + Z_LOSS * router_z_loss(of_view, size)
        loss = loss + sum(each.part(members_T, size) for each in own(routing))
        losses.append(loss / len(sizes_V))
    return losses


def _own_sums(router: Router, routing: Routing, tokens: TokenContext) -> list[Tensor]:
    """The sums over a rank's tokens, fp32 [V, S], of which the router has a loss of the whole batch, if it has one."""
    if not router.has_batch_loss:
        return []
    assert routing.values_TS is not None
    return [tokens.members_VN @ routing.values_TS]


def _batch_loss(router: Router, sums: list[Tensor], sizes_V: Tensor) -> list[Tensor]:
    return [router.batch_loss(torch.stack(sums).sum(0), sizes_V.float())] if sums else []


def evaluation_chooses_what_training_does(form: list[str]) -> None:
    """Packed weights, one token or many, give what the form with gradients gives; that in eval mode where a router has
    other experts in training."""
    module, tokens, rows_NH = local_form(form), context((8, 6, 7), 0), hidden(21, 3)
    same = module.router.spec.settings.evaluates_as_trained
    trained_NH = module.train(same)(rows_NH, None, tokens).detach()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(rows_NH, None, tokens), trained_NH, rtol=1e-5, atol=1e-6)
        # A token alone is another sequence.
        apart = module.router.spec.settings.of_utterance or module.router.spec.settings.whole_sequences
        for number in () if apart else (0, 7, 20):
            own = tokens.part(number, tokens.tokens)
            alone_1H = module(rows_NH[number : number + 1], None, own)
            torch.testing.assert_close(alone_1H, trained_NH[number : number + 1], rtol=1e-5, atol=1e-6)


def _in_world(chosen: list[list[str]]) -> list[dict[str, float]]:
    """On one of two ranks: `_distances` of routers, one after the other in one world."""
    with parallel_world(Layout.for_world(2, ep=2), SEED, 60) as at:
        return [_distances(form, at.dp) for form in chosen]


def _distances(form: list[str], rank: int) -> dict[str, float]:
    """How far every dispatch is from the one-process form on the tokens of both ranks, and in how many numbers the
    output of an utterance changes with all other tokens."""
    from megatron.core import parallel_state

    config, found = configured(form), dict[str, float]()
    kind = router_of(config).settings
    group = parallel_state.get_data_parallel_group()
    contexts, rows = [context((8, 6, 7), 3), context((5, 9, 4), 0)], [hidden(24, 4), hidden(18, 5)]
    local = local_form(form).train()
    outputs = [local(rows_NH, None, tokens) for rows_NH, tokens in zip(rows, contexts, strict=True)]
    routings = [local.router(rows_NH, tokens) for rows_NH, tokens in zip(rows, contexts, strict=True)]
    pairs = list(zip(routings, contexts, strict=True))
    counts_VE = torch.stack([each.members_VN @ routing.selected_TE().float() for routing, each in pairs]).sum(0)
    sizes_V = torch.stack([each.sizes_V2[:, 0] for each in contexts]).sum(0)
    losses = [_alive(output_NH, tokens).square().sum() for output_NH, tokens in zip(outputs, contexts, strict=True)]
    sums = list[Tensor]()
    for routing, tokens in pairs:
        losses += _view_losses(local.router.losses, routing, tokens, counts_VE, sizes_V)
        sums += _own_sums(local.router, routing, tokens)
    losses += _batch_loss(local.router, sums, sizes_V)
    torch.stack(losses).sum().backward()
    tokens, rows_NH = contexts[rank], rows[rank]
    for dispatch in kind.dispatches:
        ep = EXPERT_PARALLEL[dispatch]
        module = ExpertParallelMoME(
            HIDDEN,
            EXPERTS,
            TOP_K,
            1,
            BOTTLENECK,
            router_of(config),
            ep_size=ep,
            dispatch=dispatch,
            balance_loss=BALANCE,
            z_loss=Z_LOSS,
        ).train()
        module.set_deepspeed_parallelism()
        module.set_token_group(group)
        module.initialize("mome.0", SEED)
        spread(module.router)
        wake(mome_parts("mome.0", 0, module), SEED)
        load = PassLoad(tokens.view_names, group)
        output_NH = module(rows_NH, tokens, load)
        load.reduce()
        _alive(output_NH, tokens).square().sum().backward()
        found[f"{dispatch}: output"] = _distance(_alive(output_NH, tokens), _alive(outputs[rank], tokens))
        asked_VE = load.of(0)[:, :EXPERTS]
        found[f"{dispatch}: counts"] = float((asked_VE - counts_VE).abs().max())
        for mine, theirs in zip(module.router.trained(), local.router.trained(), strict=True):
            assert mine.parameter.grad is not None and theirs.parameter.grad is not None
            summed = mine.of(mine.parameter.grad).clone()
            torch.distributed.all_reduce(summed)
            name = f"{dispatch}: gradient of {mine.name}"
            found[name] = _distance(summed, theirs.of(theirs.parameter.grad))
        if kind.batch_invariant:
            found[f"{dispatch}: neighbours"] = _changed(module.eval(), rows_NH, tokens)
    return found


def _alive(rows_NH: Tensor, tokens: TokenContext) -> Tensor:
    return rows_NH[: tokens.alive]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@torch.no_grad()
def _changed(module: ExpertParallelMoME, rows_NH: Tensor, tokens: TokenContext) -> float:
    """In how many numbers the first utterance's output differs when all others, and dead tokens, are something else."""
    own = tokens.lengths[0]
    others_NH = torch.cat([rows_NH[:own], 9 * hidden(len(rows_NH), 6)[own:]])
    return float((module(others_NH, tokens)[:own] != module(rows_NH, tokens)[:own]).sum())


def every_dispatch_is_the_local_form(chosen: list[list[str]]) -> None:
    """Outputs, counts and gradients of every dispatch that a router works with are those of one process; and where
    the router is batch-invariant, neighbours and padding change no bit."""
    for rank in run_world(_in_world, 2, chosen):
        for form, found in zip(chosen, rank, strict=True):
            assert len(found) >= 3
            for name, value in found.items():
                exact = "counts" in name or "neighbours" in name
                assert value == 0 if exact else value < 1e-5, (form, name, value)


def _in_layout(probes: list[Probe], cases: list[Case], optimizer: str, ports: list[int]) -> list[Outcome]:
    outcomes = []
    for probe, case, port in zip(probes, cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # the ranks of the world before may still be closing theirs
        outcomes.append(run_case(probe, case, optimizer, None))
    return outcomes


def _in_one_process(probes: list[Probe], case: Case, optimizer: str) -> list[Outcome]:
    return [run_reference(probe, case, optimizer) for probe in probes]


def layouts_are_one_process(chosen: list[list[str]], folder: Path) -> None:
    """Losses, gradients, their norm and weights of training steps on several layouts, with either optimiser; all
    routers one after the other in the same processes."""
    configs = [configured(form) for form in chosen]
    probes = [Probe(shrunk(config, folder / str(number)), 3) for number, config in enumerate(configs)]
    timeout = patience(60.0 + 10.0 * len(configs))
    for optimizer in OPTIMIZERS:
        references = run_world(_in_one_process, 1, probes, Case("", Layout.for_world(1)), optimizer, timeout=timeout)[0]
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            cases = [_case(name, layout, config, number) for config in configs]
            ports = [free_port() for _ in cases]
            ranks = run_world(_in_layout, layout.world_size, probes, cases, optimizer, ports, timeout=timeout)
            for form, parts, reference in zip(chosen, zip(*ranks, strict=True), references, strict=True):
                comparison = compare(merged(list(parts)), reference, TOLERANCE)
                assert not comparison.mismatches, (form, name, optimizer, comparison)


def _case(name: str, layout: Layout, config: RunConfig, number: int) -> Case:
    """With one of the dispatches of the router that work across ranks; without any, on one expert-parallel rank. No
    sequence is cut where it may not be."""
    settings = router_of(config).settings
    layout = dataclasses.replace(layout, sequence_parallel=layout.sequence_parallel and not settings.whole_sequences)
    across = [each for each in ("alltoall", "gather") if each in settings.dispatches]
    if not across:
        return Case(name, dataclasses.replace(layout, ep=1), dispatch="local")
    return Case(name, layout, dispatch=across[number % len(across)])


def checkpoints_go_anywhere(form: list[str], folder: Path) -> None:
    """A checkpoint of a run is resharded to other layouts and to DeepSpeed's own form, and back, bit for bit; engines
    load it and train on."""
    more = ["llm.precision=fp32", "mome.capacity_factor=null", "optimizer.warmup_steps=0", "training.steps=5"]
    probe = Probe(shrunk(configured(form, *more, "optimizer.epsilon=1e-2"), folder / "llm"), STEPS)
    source = Layout.for_world(2, ep=2), 1
    losses = run_world(train_and_save, 2, probe, *source, folder)[0]
    canonical = folder / f"checkpoints/step-{STEPS:06d}"
    assert_engines_go_on(probe, canonical, folder, source, TARGETS, losses)


def parameters_are_as_planned(form: list[str]) -> None:
    """The planner counts what a module of the sizes of Llama 3.2-3B has (on the meta device)."""
    config = load_config(["experiment=lrs3", *form])
    shape = find_shape("llama-3.2-3b")
    job = job_of(config, shape, Clip(), {"audio": 1024, "video": 1024}, on_gpu=True)
    sizes = job.experts, job.top_k, job.shared, job.bottleneck
    with torch.device("meta"):
        module = LocalMoME(shape.hidden_size, *sizes, router_of(config))
    held = sum(parameter.numel() for parameter in module.parameters())
    assert job.trained_parameters == shape.layers * held + job.projector_parameters
    named = sum(tensor.parameter.numel() if tensor.start == 0 else 0 for tensor in module.router.trained())
    assert named == sum(parameter.numel() for parameter in module.router.parameters())


ALONE = [
    starts_as_a_no_op,
    initial_values_are_those_of_names,
    shards_add_up,
    evaluation_chooses_what_training_does,
    parameters_are_as_planned,
]
"""Checks of a router by itself; beside them, what needs several processes: `every_dispatch_is_the_local_form` and
`layouts_are_one_process`, of any number of routers, and `checkpoints_go_anywhere`."""
