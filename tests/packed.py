"""Sequences as the library packs them, and layers alone on the tokens of one view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.speech.matryoshka import compressed_length
from mome_dist.speech.sequence import AUDIO, VIDEO, Absent, Example, PackedTokens, pack
from mome_dist.speech.views import View
from mome_dist.token_context import ALIGNMENT, TokenContext

VIEW = "text"


def pack_rows(ids_BS: Tensor) -> tuple[Tensor, TokenContext]:
    """The rows of a batch as the sequences of one view: ids int64 [N], dead tokens at the end, and their context."""
    rows, length = ids_BS.shape
    context = TokenContext.of([(VIEW, [length] * rows)])
    return F.pad(ids_BS.flatten(), (0, context.tokens - context.alive)), context.to(ids_BS.device)


def unpack_rows(values_NX: Tensor, ids_BS: Tensor) -> Tensor:
    """What a pass gives for the tokens of `pack_rows`: [N, X] -> [B, S, X], without dead tokens."""
    return values_NX[: ids_BS.numel()].unflatten(0, ids_BS.shape)


def one_view(tokens: int, device: torch.device | str = "cpu", dead: int = 0, multiple: int = ALIGNMENT) -> TokenContext:
    """The context of ``tokens`` tokens of one sequence, and at least ``dead`` dead ones behind it."""
    return TokenContext.of([(VIEW, [tokens])], multiple=multiple, least=tokens + dead).to(torch.device(device))


def counted(module: ExpertParallelMoME, hidden_TH: Tensor, context: TokenContext) -> tuple[Tensor, PassLoad]:
    """A layer's output as a pass of training has it, and what was counted, over the ranks that it was told of."""
    load = PassLoad(context.view_names, module.deepspeed_moe.token_group)
    output_TH: Tensor = module(hidden_TH, context, load)
    load.reduce()
    return output_TH, load


def speech_tokens(views: Sequence[View], frames: Sequence[tuple[int, int]], absent: Absent | None) -> PackedTokens:
    """Some clips in some views, each a start, its speech and two tokens of text.

    Args:
        frames: of audio and of video in each clip.
        absent: as `pack` takes it.
    """

    def example(view: View, audio: int, video: int) -> Example:
        ids = [1]
        ids += [AUDIO] * (0 if view.audio_rate is None else compressed_length(audio, view.audio_rate))
        ids += [VIDEO] * (0 if view.video_rate is None else compressed_length(video, view.video_rate))
        return Example([*ids, 2, 3], len(ids) + 1)

    return pack([(view, [example(view, *lengths) for lengths in frames]) for view in views], absent)
