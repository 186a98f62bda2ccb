"""The distributed model: this rank's part of the frozen LLM, what trains in its layers, and on the first stage the
projectors and the encoders' LoRA.

Parallelism is applied here, from outside: the model code knows hidden states and slots; this module knows process
groups, which ranks hold which experts, what every local parameter is called in the layout-free model, and how ranks
share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from mome_dist.parallel.parts import Described, NamedPart, whole_parts
from mome_dist.sharing import Sharing
from mome_dist.speech.balance import ProjectorBalance
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


class Chunk(nn.Module):
    """One chunk of a rank's part of the model, in the form that Megatron-Core's pipeline schedules drive.

    Args:
        llm: the chunk's layers of the frozen LLM, MoME modules in their slots.
        projectors: on the first chunk of the pipeline, None on others.
        momes: the MoME modules by global layer number, in the order of the layers; none in a run without experts.
        adapters: what else trains in the layers (`Described`), by layout-free prefix, in the order of the layers.
        sink_loss: coefficient of the sink loss (`mome_dist.llm.sinks`).

    Attributes:
        statistics: of the routers of the MoME modules.
        projector_balance: of the projectors' own routers; None without any.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        projectors: Projectors | None,
        momes: dict[int, ExpertParallelMoME],
        adapters: Mapping[str, nn.Module] | None = None,
        sink_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_group = token_group(llm.config.sequence_parallel)
        self.statistics = RoutingStatistics()
        for place, mome in enumerate(momes.values()):
            mome.place = place
        self.llm = llm
        self.config, self.model_type = llm.config, llm.model_type  # the schedules look for them here
        self.vp_stage = llm.vp_stage
        self.sink_loss = sink_loss
        self._sink_terms: list[Tensor] = []
        self.projectors = projectors
        self.projector_balance: ProjectorBalance | None = None
        if projectors is not None and projectors.mixture is not None:
            group = parallel_state.get_data_parallel_group()
            self.projector_balance = ProjectorBalance(projectors.mixture, group)
        # Owned by the LLM's layers, hence plain dicts.
        self.momes, self.adapters = momes, dict(adapters or {})

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Receive the previous stage's output (called by the schedules)."""
        self.llm.set_input_tensor(input_tensor)

    def embed(self, batch: MicroBatch, share: float | None = None) -> Tensor:
        """Input embeddings [N, H] with the projected speech tokens in place; first stage only.

        Args:
            share: in training, as in `forward`; None counts and balances nothing.
        """
        assert self.projectors is not None
        tokens, balance = batch.tokens, None
        if self.projector_balance is not None and share is not None:
            balance = self.projector_balance.of_pass(tokens.context.view_names, share)
        embedded_NH = self.projectors.insert(self.llm.embed(tokens.ids_N), tokens.speech, batch.features, balance)
        if self.config.recompute_granularity == "full" and not embedded_NH.requires_grad:
            # Nothing below the first layer trains. A recomputed block whose inputs need no gradient would take its
            # parameters for frozen too.
            embedded_NH.requires_grad_()
        return embedded_NH

    def forward(self, batch: MicroBatch, share: float = 1.0, sequence_share: float = 1.0) -> Tensor:
        """Hidden states [N, 1, H], or on the last stage the cross-entropy summed over the labels of each view, [V].

        Args:
            share: what the auxiliary losses of this pass count for in the step's, times what the engine divides by.
            sequence_share: the same of those of one sequence.
        """
        context = batch.tokens.context
        embedded_NH = self.embed(batch, share if self.training else None) if self.llm.pre_process else None
        if not self.training:
            return self.llm(embedded_NH, context, None, batch.tokens.labels)
        load = PassLoad(context.view_names, self.token_group, share)
        output = self.llm(
            embedded_NH, context, load, batch.tokens.labels, self.sink_loss * sequence_share, self._sink_terms
        )
        if self.momes:
            load.reduce()
            self.statistics.expect(load)
        return output

    def settle(self) -> None:
        """Add up the counts of a step's passes, after the backward passes."""
        self.statistics.settle()
        if self.projector_balance is not None:
            self.projector_balance.settle()

    def take_sink_loss(self) -> Tensor | None:
        """The weighted sink loss of the rank's tokens in the chunk's layers, over the backward passes since the last
        call, fp32 scalar on the device; None without any. Tensor-parallel ranks have the same."""
        terms, self._sink_terms = self._sink_terms, []
        return torch.stack(terms).sum() if terms else None


class DistributedMoME(nn.Module):
    """This rank's part of the model: one chunk, or several under the interleaved pipeline schedule.

    Args:
        chunks: in the order of their layers.
        ep: expert-parallel ranks; None in a run without experts.
        lora: of the encoders; None on ranks without them, and where they stay as they are.

    Attributes:
        chunks, lora: as given.
        momes: the MoME modules of all chunks by global layer number.
        adapters: what else trains in the layers of all chunks, by layout-free prefix.
        projectors: None on ranks without the first layers.
        idle: on a rank where nothing else of a kind trains that the engine wants on every rank: a MoME module of one
            unit that no token visits, or in a run without experts one number. It is trained by nothing, named by
            nothing, saved by nothing.
    """

    def __init__(self, chunks: Sequence[Chunk], ep: int | None, lora: LoRATerms | None = None) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.config = chunks[0].config
        self.momes = {number: mome for chunk in chunks for number, mome in chunk.momes.items()}
        self.adapters = {prefix: adapter for chunk in chunks for prefix, adapter in chunk.adapters.items()}
        self.projectors = chunks[0].projectors
        self.lora = lora
        self.idle: nn.Module | None = None
        if ep is not None and not self.momes:
            self.idle = idle_experts(ep)
        elif ep is None and not any(True for _ in self.trained_parts()):
            self.idle = nn.ParameterDict({"weight": torch.zeros(1)})
        if self.idle is not None:
            self.idle.to(next(chunks[0].parameters()).device)

    def parts(self) -> list[Chunk]:
        """The chunks, as a list of their own type."""
        return [cast(Chunk, chunk) for chunk in self.chunks]

    def trainable_modules(self) -> nn.ModuleDict:
        """The modules that train, and nothing else: what the DeepSpeed engine is given. Those beside the MoME modules
        lie where their layout-free names say."""
        modules: dict[str, nn.Module] = {f"layer_{number}": mome for number, mome in self.momes.items()}
        if self.idle is not None:
            modules["idle"] = self.idle
        if self.projectors is not None and any(p.requires_grad for p in self.projectors.parameters()):
            modules["projectors"] = self.projectors
        if self.lora is not None:
            modules["lora"] = self.lora
        found = nn.ModuleDict(modules)
        for prefix, adapter in self.adapters.items():
            *folders, last = prefix.split(".")
            place = found
            for folder in folders:
                if folder not in place:
                    place[folder] = nn.ModuleDict()
                place = cast(nn.ModuleDict, place[folder])
            place[last] = adapter
        return found

    def trained_parts(self) -> Iterator[NamedPart]:
        """Every tensor of the layout-free model that trains here."""
        return (part for part in self.own_parts() if part.parameter.requires_grad)

    def own_parts(self) -> Iterator[NamedPart]:
        """Every parameter here that is not the LLM's, trained or not: what is saved, beside `router_states`."""
        # Projectors and encoders see whole sequences on every tensor-parallel rank, also under sequence parallelism.
        if self.projectors is not None:
            yield from whole_parts("projectors", self.projectors, Sharing())
        if self.lora is not None:
            yield from whole_parts("lora", self.lora, Sharing())
        for number, mome in self.momes.items():
            yield from mome_parts(f"mome.{number}", number, mome)
        for prefix, adapter in self.adapters.items():
            yield from cast(Described, adapter).named_parts(prefix)

    def router_states(self) -> list[NamedPart]:
        """What the routers have that no gradient trains, such as the biases that choose experts; equal on all ranks."""
        return [
            NamedPart.whole(f"mome.{number}.router_{name}", buffer, Sharing(number))
            for number, mome in self.momes.items()
            for name, buffer, *_ in mome.router.states()
        ]


def mome_parts(prefix: str, layer: int, mome: ExpertParallelMoME) -> Iterator[NamedPart]:
    """The tensors of a MoME module, which sees a rank's own tokens under sequence parallelism."""
    shared = Sharing(layer, partial=True)
    names: dict[Tensor, str] = {parameter: name for name, parameter in mome.router.named_parameters()}
    for name, parameter, start, shape in mome.router.trained():
        alone = name == names[parameter]
        packed = None if alone else f"{prefix}.router_{names[parameter]}"
        sharing = Sharing(layer, partial=True, packed=packed)
        yield NamedPart(f"{prefix}.router_{name}", None, parameter, start, shape, sharing)
    first, experts = mome.ep_rank * mome.num_local_experts, mome.deepspeed_moe.experts
    routed = Sharing(layer, experts=mome.num_experts, partial=True)
    for expert, part, start, shape in experts.parts():
        yield NamedPart(f"{prefix}.routed.{part.name}", first + expert, experts.packed, start, shape, routed)
    if mome.shared is not None:
        yield from whole_parts(f"{prefix}.shared", mome.shared, shared)
    yield from whole_parts(f"{prefix}.common", mome.common, shared)


def idle_experts(ep: int) -> ExpertParallelMoME:
    """A MoME module of one unit for a rank without layers."""
    idle = ExpertParallelMoME(1, ep, 1, 0, 1, ep_size=ep)
    idle.set_deepspeed_parallelism()
    idle.initialize("idle", 0)
    return idle


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
