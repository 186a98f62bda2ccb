"""The distributed model: this rank's part of the frozen LLM, its MoME modules, and on the first stage the projectors
and the encoders' LoRA.

Parallelism is applied here, from outside: the model code knows hidden states and slots; this module knows process
groups, which ranks hold which experts, and what every local parameter is called in the layout-free model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mome_dist.llm.megatron import FrozenLLM, MoMETransformerLayer
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.moe.statistics import RoutingStatistics
from mome_dist.speech.lora import LoRATerms
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import PackedTokens


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank works on: some clips in all views of the step.

    Attributes:
        tokens: the sequences, on the model's device.
        features: encoder features of each clip by stream, [T_i, d]; empty on later pipeline stages, and without the
            streams that no view uses.
    """

    tokens: PackedTokens
    features: Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class NamedPart:
    """A tensor of the layout-free model, or one expert's slice of it, in a local parameter.

    Attributes:
        name: of the tensor in the layout-free model.
        index: which slice along that tensor's first dimension it is; None for the whole tensor.
        parameter: that holds it, maybe beside others.
        start: its first element in the parameter, in row-major order.
        shape: its own.
    """

    name: str
    index: int | None
    parameter: nn.Parameter
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, parameter: nn.Parameter) -> NamedPart:
        """A parameter that is one tensor of the layout-free model."""
        return cls(name, None, parameter, 0, tuple(parameter.shape))

    @property
    def stop(self) -> int:
        """The element of the parameter after its last one."""
        return self.start + math.prod(self.shape)

    @property
    def label(self) -> str:
        """Name and index in words."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def value(self) -> Tensor:
        """A view of its numbers, without gradient."""
        return self.of(self.parameter.detach())

    def of(self, values: Tensor) -> Tensor:
        """Its part of something shaped like the parameter, such as a gradient or a moment; a view if that is
        contiguous."""
        return values.reshape(-1)[self.start : self.stop].view(self.shape)


def by_parameter(parts: Iterable[NamedPart]) -> dict[nn.Parameter, list[NamedPart]]:
    """The parts that each parameter holds."""
    found: dict[nn.Parameter, list[NamedPart]] = {}
    for part in parts:
        found.setdefault(part.parameter, []).append(part)
    return found


class Chunk(nn.Module):
    """One chunk of a rank's part of the model, in the form that Megatron-Core's pipeline schedules drive.

    Args:
        llm: the chunk's layers of the frozen LLM, MoME modules in their slots.
        projectors: on the first chunk of the pipeline, None on others.
        momes: the MoME modules by global layer number, in the order of the layers.

    Attributes:
        statistics: of their routers.
    """

    def __init__(self, llm: FrozenLLM, projectors: Projectors | None, momes: dict[int, ExpertParallelMoME]) -> None:
        super().__init__()
        self.token_group = token_group(llm.config.sequence_parallel)
        self.statistics = RoutingStatistics()
        for place, mome in enumerate(momes.values()):
            mome.place = place
        self.llm = llm
        self.config, self.model_type = llm.config, llm.model_type  # the schedules look for them here
        self.vp_stage = llm.vp_stage
        self.projectors = projectors
        self.momes = momes  # owned by the LLM's layers, hence a plain dict

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Receive the previous stage's output (called by the schedules)."""
        self.llm.set_input_tensor(input_tensor)

    def embed(self, batch: MicroBatch) -> Tensor:
        """Input embeddings [N, H] with the projected speech tokens in place; first stage only."""
        assert self.projectors is not None
        embedded_NH = self.projectors.insert(self.llm.embed(batch.tokens.ids_N), batch.tokens.speech, batch.features)
        if self.config.recompute_granularity == "full" and not embedded_NH.requires_grad:
            # Nothing below the first layer trains. A recomputed block whose inputs need no gradient would take its
            # parameters for frozen too.
            embedded_NH.requires_grad_()
        return embedded_NH

    def forward(self, batch: MicroBatch, share: float = 1.0) -> Tensor:
        """Hidden states [N, 1, H], or on the last stage the cross-entropy summed over the labels of each view, [V].

        Args:
            share: what the auxiliary losses of this pass count for in the step's, times what the engine divides by.
        """
        context = batch.tokens.context
        embedded_NH = self.embed(batch) if self.llm.pre_process else None
        if not self.training:
            return self.llm(embedded_NH, context, None, batch.tokens.labels)
        load = PassLoad(context.view_names, self.token_group, share)
        output = self.llm(embedded_NH, context, load, batch.tokens.labels)
        if self.momes:
            load.reduce()
            self.statistics.expect(load)
        return output


class DistributedMoME(nn.Module):
    """This rank's part of the model: one chunk, or several under the interleaved pipeline schedule.

    Attributes:
        chunks: in the order of their layers.
        momes: the MoME modules of all chunks by global layer number.
        projectors: None on ranks without the first layers.
        lora: of the encoders; None on ranks without them, and where they stay as they are.
        idle: a MoME module of one unit that no token visits, on a rank whose stages have no layers: the engine wants
            shared and expert parameters on every rank. It is trained by nothing, named by nothing, saved by nothing.
    """

    def __init__(self, chunks: Sequence[Chunk], ep: int, lora: LoRATerms | None = None) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.config = chunks[0].config
        self.momes = {number: mome for chunk in chunks for number, mome in chunk.momes.items()}
        self.projectors = chunks[0].projectors
        self.lora = lora
        self.idle: ExpertParallelMoME | None = None
        if not self.momes:
            self.idle = ExpertParallelMoME(1, ep, 1, 0, 1, ep_size=ep)
            self.idle.set_deepspeed_parallelism()
            self.idle.initialize("idle", 0)
            self.idle.to(next(chunks[0].parameters()).device)

    def parts(self) -> list[Chunk]:
        """The chunks, as a list of their own type."""
        return [cast(Chunk, chunk) for chunk in self.chunks]

    def trainable_modules(self) -> nn.ModuleDict:
        """The modules that train, and nothing else: what the DeepSpeed engine is given."""
        modules: dict[str, nn.Module] = {f"layer_{number}": mome for number, mome in self.momes.items()}
        if self.idle is not None:
            modules["idle"] = self.idle
        if self.projectors is not None and any(p.requires_grad for p in self.projectors.parameters()):
            modules["projectors"] = self.projectors
        if self.lora is not None:
            modules["lora"] = self.lora
        return nn.ModuleDict(modules)

    def trained_parts(self) -> Iterator[NamedPart]:
        """Every tensor of the layout-free model that trains here."""
        return (part for part in self.own_parts() if part.parameter.requires_grad)

    def own_parts(self) -> Iterator[NamedPart]:
        """Every tensor here that is not the LLM's, trained or not: what is saved."""
        if self.projectors is not None:
            for name, parameter in self.projectors.named_parameters():
                yield NamedPart.whole(f"projectors.{name}", parameter)
        if self.lora is not None:
            for name, parameter in self.lora.named_parameters():
                yield NamedPart.whole(f"lora.{name}", parameter)
        for number, mome in self.momes.items():
            prefix = f"mome.{number}"
            yield NamedPart.whole(f"{prefix}.router_weight", mome.deepspeed_moe.gate.wg.weight)
            first, experts = mome.ep_rank * mome.num_local_experts, mome.deepspeed_moe.experts
            for part in experts.parts():
                name = f"{prefix}.routed.{part.kind}"
                yield NamedPart(name, first + part.expert, experts.packed, part.start, part.shape)
            for name, parameter in mome.shared.named_parameters() if mome.shared is not None else ():
                yield NamedPart.whole(f"{prefix}.shared.{name}", parameter)

    def router_biases(self) -> dict[str, Tensor]:
        """The router biases that choose experts beside what trains, fp32 [E] each, by layout-free name."""
        biases = {f"mome.{number}.router_bias": mome.router_bias for number, mome in self.momes.items()}
        return {name: bias for name, bias in biases.items() if bias is not None}


def attach_mome(llm: FrozenLLM, placement: str, seed: int, **mome_arguments: object) -> dict[int, ExpertParallelMoME]:
    """Put an expert-parallel MoME module into every layer of this stage.

    Args:
        placement: "mhsa", "ffn" or "layer".
        mome_arguments: of `ExpertParallelMoME`.

    Returns:
        The modules by global layer number, counted from zero.
    """
    device = next(llm.parameters()).device
    momes: dict[int, ExpertParallelMoME] = {}
    for layer in llm.decoder.layers:
        assert isinstance(layer, MoMETransformerLayer)
        number = layer.layer_number - 1
        mome = ExpertParallelMoME(llm.config.hidden_size, **mome_arguments)  # type: ignore[arg-type]
        mome.set_deepspeed_parallelism()
        mome.set_token_group(token_group(llm.config.sequence_parallel))
        mome.initialize(f"mome.{number}", seed)
        layer.slot(placement).mome = mome.to(device)
        momes[number] = mome
    return momes


def token_group(sequence_parallel: bool) -> dist.ProcessGroup:
    """The ranks that hold different tokens: under sequence parallelism also those of the tensor-parallel group."""
    if sequence_parallel:
        return parallel_state.get_tensor_and_data_parallel_group()
    return parallel_state.get_data_parallel_group()


def rank_writes(parameter: Tensor) -> bool:
    """Whether this rank is the one that saves a parameter or a buffer: the first of the ranks that hold equal copies
    of it."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    if is_moe_param(parameter):
        name = getattr(parameter, "group_name")  # noqa: B009  DeepSpeed adds it
        return torch.distributed.get_rank(groups._get_expert_data_parallel_group(name)) == 0
    return parallel_state.get_data_parallel_rank() == 0
