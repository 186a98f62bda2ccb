"""A MoME layer on a device, in every form that it has in a world of one rank, and tokens for it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.local import LocalMoME
from tests.packed import counted, one_view

DISPATCHES = ("local", "gather", "alltoall")
SEED = 0
CLEAR = 1e-4  # of logits, whose fp32 error is some 1e-6


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer, and the number of its tokens."""

    hidden: int
    experts: int
    top_k: int
    shared: int
    bottleneck: int
    tokens: int

    def arguments(self) -> tuple[int, int, int, int, int]:
        """The first arguments of both forms of the module."""
        return self.hidden, self.experts, self.top_k, self.shared, self.bottleneck


# On a GPU, of Llama 3.2-3B with the paper's experts; the tokens of four views of a clip of 16 seconds.
SIZES = {"cpu": Sizes(32, 6, 2, 1, 3, 40), "cuda": Sizes(3072, 23, 4, 1, 12, 1024)}


def value_of(name: str, shape: tuple[int, ...], inputs: int) -> Tensor:
    """fp32 values of a tensor by its global name, uniform in +-3 / sqrt(inputs): every path carries a signal."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) * (3 / math.sqrt(inputs))


def one_process_form(sizes: Sizes) -> LocalMoME:
    """The reference, on the CPU."""
    module = LocalMoME(*sizes.arguments())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            stack, _, kind = name.rpartition(".")
            of_router = stack == "router"
            for number, value in enumerate([parameter] if of_router else parameter):
                value.copy_(_value("router" if of_router else f"{stack}.{number}.{kind}", value, sizes))
    return module.train()


def parallel_form(sizes: Sizes, dispatch: str, device: torch.device, **settings: float) -> ExpertParallelMoME:
    """The same layer as training has it; needs a world of one rank."""
    module = ExpertParallelMoME(*sizes.arguments(), dispatch=dispatch, **settings)  # type: ignore[arg-type]
    module.set_deepspeed_parallelism()
    with torch.no_grad():
        for name, value in named_parts(module, {name: p.detach() for name, p in module.named_parameters()}).items():
            value.copy_(_value(name, value, sizes))
    return module.to(device).train()


def passed(module: ExpertParallelMoME, hidden_TH: Tensor) -> Tensor:
    """The output of a pass of training over tokens of one view: its backward pass adds both auxiliary losses."""
    return counted(module, hidden_TH, one_view(len(hidden_TH), hidden_TH.device))[0]


def named_parts(module: ExpertParallelMoME, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of every tensor of the layer by global name, in something that is shaped like its parameters."""
    found = {"router": values["deepspeed_moe.gate.wg.weight"]}
    packed = values["deepspeed_moe.experts.packed"].reshape(-1)
    for part in module.deepspeed_moe.experts.parts():
        stop = part.start + math.prod(part.shape)
        found[f"routed.{part.expert}.{part.part.name}"] = packed[part.start : stop].view(part.shape)
    for name, value in values.items():
        if name.startswith("shared."):
            for number, slice_ in enumerate(value):
                found[f"shared.{number}.{name.removeprefix('shared.')}"] = slice_
    return found


def clear_tokens(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, H] on the CPU, of which no rounding changes the experts: chosen ones are ahead of the next by `CLEAR`."""
    hidden_TH = torch.randn(2 * sizes.tokens, sizes.hidden, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    router_EH = value_of("router", (sizes.experts, sizes.hidden), sizes.hidden)
    best_TK = (hidden_TH.double() @ router_EH.double().t()).topk(sizes.top_k + 1, dim=1).values
    clear = best_TK[:, -2] - best_TK[:, -1] > CLEAR
    assert clear.sum() >= sizes.tokens
    return hidden_TH[clear][: sizes.tokens]


def _value(name: str, like: Tensor, sizes: Sizes) -> Tensor:
    inputs = sizes.bottleneck if "up" in name else sizes.hidden
    return value_of(name, tuple(like.shape), inputs)
