"""How likely texts are that a model has written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View


@torch.no_grad()
def token_log_probs(
    model: MoMESpeechLM,
    prefixes: Sequence[list[int]],
    view: View,
    audio: Sequence[Tensor],
    video: Sequence[Tensor],
    texts: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Log-probability of every token of each text, given the speech and the tokens before it.

    One pass over a batch of clips, whatever search has found the texts. It rounds otherwise than the search did.

    Args:
        prefixes, view, audio, video: as of `mome_dist.speech.reference.MoMESpeechLM.generate`.
        texts: token ids of each clip, without the end token.

    Returns:
        Natural logarithms, one for each token of each text.
    """
    longest = max(map(len, texts), default=0)
    if not longest:
        return [[] for _ in texts]
    embedded_BSH, mask_BS = model.lay_out(prefixes, view, audio, video, texts)
    output = model.llm(
        inputs_embeds=embedded_BSH,
        attention_mask=mask_BS,
        position_ids=(mask_BS.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=longest + 1,  # of the last token of the prefix, which predicts the first of the text, and on
    )
    log_probs_BLV = output.logits[:, :-1].float().log_softmax(dim=-1)
    ids_BL = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=log_probs_BLV.device)
    found = log_probs_BLV.gather(2, ids_BL[..., None])[..., 0].tolist()
    return [row[: len(text)] for row, text in zip(found, texts, strict=True)]
