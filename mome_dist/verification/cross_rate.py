"""What fine views teach coarse ones, in one process and token by token, as a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mome_dist.model.distributed import MicroBatch
from mome_dist.moe.routing import Routing
from mome_dist.speech.views import View
from mome_dist.token_context import Modality
from mome_dist.training.batches import Step

MODALITIES = {"audio": Modality.AUDIO, "video": Modality.VIDEO}


def divergences(
    step: Step, batch: MicroBatch, routings: Sequence[Sequence[Routing]], logits_LV: Tensor
) -> dict[str, Tensor]:
    """A microbatch's part of the step's "route_kl" (in a model with routers) and "logit_kl", fp32 scalars with
    gradients, without coefficients.

    Args:
        routings: by view and layer, of sequences that are padded beside the others of their view.
        logits_LV: of the labels of all views.
    """
    found = {"logit_kl": _of_logits(step, logits_LV)}
    if routings[0]:
        found["route_kl"] = _of_routes(step, batch, routings)
    return found


def _of_logits(step: Step, logits_LV: Tensor) -> Tensor:
    logs = logits_LV.log_softmax(dim=1).chunk(len(step.views))
    taught = [(logs[fine].detach(), logs[coarse]) for fine, coarse in step.pairs]
    sums = torch.stack([(fine_CV.exp() * (fine_CV - coarse_CV)).sum() for fine_CV, coarse_CV in taught])
    return sums.sum() / (step.label_tokens * len(step.pairs))


def _of_routes(step: Step, batch: MicroBatch, routings: Sequence[Sequence[Routing]]) -> Tensor:
    total = torch.zeros(())
    for layer in range(len(routings[0])):
        for pair in step.pairs:
            tokens = sum(_coarse_tokens(each, step.views, pair) for each in step.microbatches)
            total = total + _of_pair(batch, step.views, pair, routings, layer) / tokens
    return total / (len(routings[0]) * len(step.pairs))


def _coarse_tokens(batch: MicroBatch, views: Sequence[View], pair: tuple[int, int]) -> int:
    """Speech tokens of the coarse view in the streams that it has coarser."""
    context = batch.tokens.context
    members_N = context.members_VN[pair[1]] > 0
    rates = {stream: [getattr(views[place], f"{stream}_rate") for place in pair] for stream in MODALITIES}
    coarser = [MODALITIES[stream] for stream, (fine, coarse) in rates.items() if fine != coarse]
    return sum(int((members_N & (context.modality_N == kind)).sum()) for kind in coarser)


def _of_pair(
    batch: MicroBatch, views: Sequence[View], pair: tuple[int, int], routings: Sequence[Sequence[Routing]], layer: int
) -> Tensor:
    fine, coarse = (_speech_probs(batch, place, routings[place][layer]) for place in pair)
    divergence = torch.zeros(())
    for stream in MODALITIES:
        rates = [getattr(views[place], f"{stream}_rate") for place in pair]
        if None in rates or rates[0] == rates[1]:
            continue
        for fine_TE, coarse_TE in zip(fine[stream], coarse[stream], strict=True):
            for number, probs_E in enumerate(coarse_TE):
                frames = range(number * rates[1], (number + 1) * rates[1])
                # Every frame brings the route of the token that covers it, as far as there is one.
                covering = [frame // rates[0] for frame in frames if frame // rates[0] < len(fine_TE)]
                target_E = fine_TE[covering].mean(dim=0).detach()
                target_E, probs_E = target_E / target_E.sum(), probs_E / probs_E.sum()
                divergence = divergence + (target_E * (target_E.log() - probs_E.log())).sum()
    return divergence


def _speech_probs(batch: MicroBatch, place: int, routing: Routing) -> Mapping[str, list[Tensor]]:
    """The routers' probabilities of the speech tokens of each clip in a view, [T, E], by stream."""
    context = batch.tokens.context
    clips = context.view_sequences[place]
    first = sum(context.view_sequences[:place])
    lengths = context.lengths[first : first + clips]
    modalities = context.modality_N[sum(context.lengths[:first]) :][: sum(lengths)].split(lengths)
    probs_BSE = routing.probs_TE.unflatten(0, (clips, max(lengths)))
    return {
        stream: [row_SE[: len(own)][own == kind] for row_SE, own in zip(probs_BSE, modalities, strict=True)]
        for stream, kind in MODALITIES.items()
    }
