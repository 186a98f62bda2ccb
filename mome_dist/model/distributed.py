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

from mome_dist.aligned_tokens import Aligned
from mome_dist.config.schema import CrossRateConfig
from mome_dist.llm.megatron import FrozenLLM, MoMETransformerLayer
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.moe.low_rank import LowRankExperts
from mome_dist.moe.route_distillation import RouteDistillation
from mome_dist.moe.routers.parts import router_parts
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
        aligned: tokens of fine and coarse views that say the same; None where nobody compares them.
    """

    tokens: PackedTokens
    features: Mapping[str, Sequence[Tensor]]
    aligned: Aligned | None = None


class Chunk(nn.Module):
    """One chunk of a rank's part of the model, in the form that Megatron-Core's pipeline schedules drive.

    Args:
        llm: the chunk's layers of the frozen LLM, MoME modules in their slots.
        projectors: on the first chunk of the pipeline, None on others.
        momes: the modules with a router by global layer number, in the order of the layers; none in a run without
            routed experts.
        adapters: what trains in the layers (`Described`) beside those of them that are spread over ranks, by
            layout-free prefix, in the order of the layers.
        sink_loss: coefficient of the sink loss (`mome_dist.llm.sinks`).
        cross_rate: coefficients of what coarse views learn from fine ones.

    Attributes:
        statistics: of the routers of the MoME modules.
        projector_balance: of the projectors' own routers; None without any.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        projectors: Projectors | None,
        momes: Mapping[int, ExpertParallelMoME | LowRankExperts],
        adapters: Mapping[str, nn.Module] | None = None,
        sink_loss: float = 0.0,
        cross_rate: CrossRateConfig | None = None,
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
        self.cross_rate = cross_rate or CrossRateConfig()
        self._route_terms: list[Tensor] = []
        self.projectors = projectors
        self.projector_balance: ProjectorBalance | None = None
        if projectors is not None and projectors.mixture is not None:
            group = parallel_state.get_data_parallel_group()
            self.projector_balance = ProjectorBalance(projectors.mixture, group)
        # Owned by the LLM's layers, hence plain dicts.
        self.momes, self.adapters = dict(momes), dict(adapters or {})

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
        """Hidden states [N, 1, H], or on the last stage the cross-entropy summed over the labels of each view, [V], and
        in training what logits of coarse views diverge from those of fine ones, summed over the labels of each pair:
        [V + Q].

        Args:
            share: what the auxiliary losses of this pass count for in the step's, times what the engine divides by.
            sequence_share: the same of those of one sequence.
        """
        context = batch.tokens.context
        embedded_NH = self.embed(batch, share if self.training else None) if self.llm.pre_process else None
        if not self.training:
            return self.llm(embedded_NH, context, None, batch.tokens.labels)
        load = PassLoad(context.view_names, self.token_group, share, self._distillation(batch))
        sinks = self.sink_loss * sequence_share, self._sink_terms
        pairs = batch.aligned.pairs if batch.aligned is not None and self.cross_rate.logit_kl else ()
        output = self.llm(embedded_NH, context, load, batch.tokens.labels, *sinks, pairs)
        if self.momes:
            load.reduce()
            self.statistics.expect(load)
        return output

    def _distillation(self, batch: MicroBatch) -> RouteDistillation | None:
        """The route distillation of a pass, on the tokens that this rank holds between layers."""
        aligned, group = batch.aligned, None
        if aligned is None or not self.cross_rate.route_kl or not self.momes:
            return None
        if self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            aligned = aligned.part(dist.get_rank(group), batch.tokens.context.tokens // dist.get_world_size(group))
        # What the engine divides by; the weights of the tokens are those of the global batch.
        weight = self.cross_rate.route_kl * parallel_state.get_data_parallel_world_size() / self.config.num_layers
        return RouteDistillation(aligned, weight, group, self._route_terms)

    def settle(self) -> None:
        """Add up the counts of a step's passes, after the backward passes."""
        self.statistics.settle()
        if self.projector_balance is not None:
            self.projector_balance.settle()

    def set_counts_aside(self) -> tuple[RoutingStatistics, ProjectorBalance | None]:
        """Count from zero from now on; `take_counts_back` takes what was counted before."""
        kept = self.statistics, self.projector_balance
        self.statistics = RoutingStatistics()
        if self.projector_balance is not None:
            self.projector_balance = self.projector_balance.anew()
        return kept

    def take_counts_back(self, kept: tuple[RoutingStatistics, ProjectorBalance | None]) -> None:
        """Forget what was counted since `set_counts_aside`, which gave these."""
        self.statistics, self.projector_balance = kept

    def take_sink_loss(self) -> Tensor | None:
        """The weighted sink loss of the rank's tokens in the chunk's layers, over the backward passes since the last
        call, fp32 scalar on the device; None without any. Tensor-parallel ranks have the same."""
        terms, self._sink_terms = self._sink_terms, []
        return torch.stack(terms).sum() if terms else None

    def take_route_divergence(self) -> Tensor | None:
        """The mean over the model's layers of the route distillation's divergence in the chunk's layers, of each pair,
        over the backward passes since the last call: fp32 [Q], this data-parallel rank's part; None without any.
        Tensor-parallel ranks have the same."""
        terms, self._route_terms = self._route_terms, []
        if not terms:
            return None
        sums_Q = torch.stack(terms).sum(dim=0) / self.config.num_layers
        if self.config.sequence_parallel:
            dist.all_reduce(sums_Q, group=parallel_state.get_tensor_model_parallel_group())
        return sums_Q


class DistributedMoME(nn.Module):
    """This rank's part of the model: one chunk, or several under the interleaved pipeline schedule.

    Args:
        chunks: in the order of their layers.
        ep: expert-parallel ranks; None in a run without experts that could be spread over them.
        lora: of the encoders; None on ranks without them, and where they stay as they are.

    Attributes:
        chunks, lora: as given.
        momes: the modules with a router of all chunks by global layer number.
        spread: those of them whose experts may be spread over ranks.
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
        self.spread = {number: mome for number, mome in self.momes.items() if isinstance(mome, ExpertParallelMoME)}
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
        modules: dict[str, nn.Module] = {f"layer_{number}": mome for number, mome in self.spread.items()}
        if self.idle is not None:
            modules["idle"] = self.idle
        if self.projectors is not None and any(p.requires_grad for p in self.projectors.parameters()):
            modules["projectors"] = self.projectors
        if self.lora is not None:
            modules["lora"] = self.lora
        found = nn.ModuleDict(modules)
        # An engine's checkpoints have them by name, and of a kind in the order of the layers.
        for prefix, adapter in sorted(self.adapters.items(), key=lambda item: item[0].partition(".")[0]):
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
        for number, mome in self.spread.items():
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
    yield from router_parts(prefix, layer, mome.router)
    first, experts = mome.ep_rank * mome.num_local_experts, mome.deepspeed_moe.experts
    routed = Sharing(layer, experts=mome.num_experts, partial=True)
    for expert, part, start, shape in experts.parts():
        yield NamedPart(f"{prefix}.routed.{part.name}", first + expert, experts.packed, start, shape, routed)
    if mome.shared is not None:
        yield from whole_parts(f"{prefix}.shared", mome.shared, shared)


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
