"""Which experts the tokens of each rate and modality choose.

One router serves every rate and modality; whether it sends the tokens of a modality to the same experts at any rate is
the question behind the paper's expert-activation maps (MoME, arXiv 2510.04136). Counts are taken while decoding, in the
pass over the prefix (speech and prompt): tokens that the model writes are not counted, padding never.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.files import save_tensors, written_aside
from mome_dist.moe.local import LocalRouted
from mome_dist.moe.routing import Routing
from mome_dist.speech.sequence import AUDIO, VIDEO
from mome_dist.speech.views import View

FORMAT = "mome_dist.activations/1"
MODALITIES = ("audio", "video", "text")
PADDING = -1


def token_modalities(prefixes: Sequence[Sequence[int]]) -> Tensor:
    """The modality of every position of a left-padded batch of prefixes.

    Args:
        prefixes: token ids with the placeholders `AUDIO` and `VIDEO`; everything else is text (tags and prompt).

    Returns:
        int64 [B, S]: index into `MODALITIES`, or `PADDING`.
    """
    kinds = {AUDIO: MODALITIES.index("audio"), VIDEO: MODALITIES.index("video")}
    length = max(map(len, prefixes))
    rows = [
        [PADDING] * (length - len(ids)) + [kinds.get(token, MODALITIES.index("text")) for token in ids]
        for ids in prefixes
    ]
    return torch.tensor(rows, dtype=torch.int64)


@dataclass(frozen=True)
class Activations:
    """Counts of (token, expert) choices.

    Attributes:
        counts: int64 [layers, views, modalities, experts]; a token counts once for each of its top-K experts.
        views: names such as "asr(4)".
        top_k: experts a token, at most.
    """

    counts: Tensor
    views: tuple[str, ...]
    top_k: int

    def shares(self) -> Tensor:
        """fp64, shape of ``counts``: the fraction of tokens that chose an expert; it sums to K over the experts. NaN
        where there was no token (an absent modality). Uniform routing gives K / E everywhere."""
        choices = self.counts.sum(dim=-1, keepdim=True).double()
        return self.top_k * self.counts.double() / torch.where(choices > 0, choices, torch.nan)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the names of all axes in its metadata."""
        metadata = {
            "format": FORMAT,
            "axes": json.dumps(["layers", "views", "modalities", "experts"]),
            "views": json.dumps(self.views),
            "modalities": json.dumps(MODALITIES),
            "top_k": str(self.top_k),
        }
        with written_aside(path) as temporary:
            save_tensors({"counts": self.counts.contiguous()}, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> Activations:
        """Read what `save` wrote. Raises UserError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata, counts = file.metadata() or {}, file.get_tensor("counts")
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format is {metadata.get('format')!r}, not {FORMAT!r}")
            return cls(counts, tuple(json.loads(metadata["views"])), int(metadata["top_k"]))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: no expert activations ({error}); evaluate the run again.") from error


class ActivationRecorder:
    """Counts expert choices through `LocalRouted.observer` while batches are decoded.

    Args:
        modules: the MoME modules, layer by layer.
        views: what will be decoded.

    Attributes:
        counts: int64 [layers, views, modalities, experts] so far.
    """

    def __init__(self, modules: Sequence[LocalRouted], views: Sequence[View]) -> None:
        self._modules, self._views = list(modules), list(views)
        router, device = modules[0].router, next(modules[0].parameters()).device
        self._top_k = router.top_k
        sizes = len(self._modules), len(self._views), len(MODALITIES), router.experts
        self.counts = torch.zeros(sizes, dtype=torch.int64, device=device)

    @contextmanager
    def recording(self, view: View, prefixes: Sequence[Sequence[int]]) -> Iterator[None]:
        """Count the first forward pass of every layer inside the block: the one over the prefixes.

        Later passes (one token a clip) are left alone. Beam search repeats every clip; only its first copy counts.
        """
        column = self._views.index(view)
        kinds_BS = token_modalities(prefixes).to(self.counts.device)
        for layer, module in enumerate(self._modules):
            module.observer = self._observer(module, layer, column, kinds_BS)
        try:
            yield
        finally:
            for module in self._modules:
                module.observer = None

    def _observer(self, module: LocalRouted, layer: int, column: int, kinds_BS: Tensor):  # type: ignore[no-untyped-def]
        def observe(routing: Routing) -> None:
            module.observer = None
            self._count(routing, layer, column, kinds_BS)

        return observe

    @torch.no_grad()
    def _count(self, routing: Routing, layer: int, column: int, kinds_BS: Tensor) -> None:
        experts_BSK, kinds_BS1 = _first_copies(routing.experts_TK, kinds_BS), kinds_BS[..., None]
        counted_BSK = (kinds_BS1 != PADDING).expand_as(experts_BSK)
        if routing.chosen_TK is not None:
            counted_BSK = counted_BSK & _first_copies(routing.chosen_TK, kinds_BS)
        experts = self.counts.shape[-1]
        flat = (kinds_BS1 * experts + experts_BSK)[counted_BSK]
        self.counts[layer, column] += torch.bincount(flat, minlength=len(MODALITIES) * experts).view(-1, experts)

    def result(self) -> Activations:
        """The counts so far, on the CPU."""
        return Activations(self.counts.cpu(), tuple(map(str, self._views)), self._top_k)


def _first_copies(values_TK: Tensor, kinds_BS: Tensor) -> Tensor:
    """[B, S, K] of a batch of which beam search repeats every clip."""
    batch, length = kinds_BS.shape
    return values_TK.view(batch, -1, length, values_TK.shape[-1])[:, 0]
