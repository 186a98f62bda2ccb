"""The token sequence that the LLM sees, and its batches with length masks.

``<bos> <audio> A.. </audio> <video> V.. </video> prompt text <eos>``; streams that a task does not use are left out,
and so is ``<bos>`` where the LLM has none (Qwen2).
The loss is on the text and the final ``<eos>`` only; padding is never a target and never attended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.llm.tokens import TokenTable, check_rows
from mome_dist.speech.views import View

AUDIO, VIDEO = -1, -2  # placeholders of speech tokens in a sequence of token ids


class TextCodec:
    """Text to token ids and back, for one LLM directory.

    Args:
        directory: plain Hugging Face directory with a tokenizer.
        tags: the texts of the four tokens around speech: audio_open, audio_close, video_open, video_close.

    Every id that a codec gives has a row in the LLM's embeddings: layers look ids up unchecked.

    Raises:
        UserError: if the tokenizer is missing or does not fit its model (`mome_dist.llm.tokens`), or a tag is none.
    """

    def __init__(self, directory: str | Path, tags: Mapping[str, str]) -> None:
        from transformers import AutoTokenizer

        table = TokenTable.read(directory)
        self.tags, self.bos, self.eos = table.check_tags(tags), table.bos, table.eos
        self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        check_rows(Path(directory), self._tokenizer.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Ids of a transcript, which follows the prompt after a space; without special tokens."""
        return self.encode_verbatim(" " + text)

    def encode_verbatim(self, text: str) -> list[int]:
        """Ids of exactly this text, without special tokens."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to the first end token; special tokens are left out."""
        ids = list(ids)
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        return " ".join(self._tokenizer.decode(ids, skip_special_tokens=True).split())


@dataclass(frozen=True)
class Example:
    """One sequence: ids with `AUDIO` and `VIDEO` placeholders; labels start at ``prefix_length``."""

    ids: list[int]
    prefix_length: int


class SequenceBuilder:
    """Lays out utterances in any view."""

    def __init__(self, codec: TextCodec, prompts: Mapping[str, str]) -> None:
        self.codec = codec
        self._prompts = {task: codec.encode_verbatim(prompt) for task, prompt in prompts.items()}

    def fixed_ids(self) -> dict[str, Any]:
        """The ids that do not depend on an utterance, as JSON values: special tokens, tags and prompts."""
        return {
            "bos": self.codec.bos,
            "eos": self.codec.eos,
            "tags": dict(self.codec.tags),
            "prompts": {task: list(ids) for task, ids in self._prompts.items()},
        }

    def prefix(self, view: View, audio_tokens: int, video_tokens: int) -> list[int]:
        """Everything before the text; a stream that the view does not use is ignored."""
        tags, ids = self.codec.tags, [] if self.codec.bos is None else [self.codec.bos]
        if view.audio_rate is not None:
            ids += [tags["audio_open"], *[AUDIO] * audio_tokens, tags["audio_close"]]
        if view.video_rate is not None:
            ids += [tags["video_open"], *[VIDEO] * video_tokens, tags["video_close"]]
        return ids + self._prompts[view.task]

    def example(self, view: View, audio_tokens: int, video_tokens: int, text: str) -> Example:
        """A whole training sequence."""
        prefix = self.prefix(view, audio_tokens, video_tokens)
        return Example([*prefix, *self.codec.encode(text), self.codec.eos], len(prefix))

    def overhead(self, view: View) -> int:
        """Tokens before the text that are not speech: the prefix is this plus the audio and video tokens."""
        return len(self.prefix(view, 0, 0))


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of a batch, padded on the right, and where things are in it.

    Flat positions count sequence first, ``s * B + b``, which is the order of the LLM's hidden states [S, B, H].

    Attributes:
        ids_BS: int64 [B, S]; zero at speech tokens and padding.
        padding_BS: bool [B, S], True at padding.
        audio_index, video_index: int64 [N], flat positions of speech tokens, clip by clip.
        label_index: int64 [L], flat positions whose output predicts ``labels``.
        labels: int64 [L], text and end tokens.
    """

    ids_BS: Tensor
    padding_BS: Tensor
    audio_index: Tensor
    video_index: Tensor
    label_index: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """A copy on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def longest_input(examples: Sequence[Example]) -> int:
    """Length to which a batch of examples is padded: the last token of a sequence is only ever a label, no input."""
    return max(len(example.ids) for example in examples) - 1


def collate(examples: Sequence[Example], length: int | None = None, rows: int = 0) -> TokenBatch:
    """Pad a batch of examples on the right, to the longest input or to ``length``, and with empty sequences to at least
    ``rows``."""
    inputs = [example.ids[:-1] for example in examples]
    length, batch = length or longest_input(examples), max(len(inputs), rows)
    ids_BS = torch.zeros(batch, length, dtype=torch.int64)
    padding_BS = torch.ones(batch, length, dtype=torch.bool)
    label_index, labels = [], []
    for row, (example, ids) in enumerate(zip(examples, inputs, strict=True)):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        padding_BS[row, : len(ids)] = False
        label_index += [s * batch + row for s in range(example.prefix_length - 1, len(ids))]
        labels += example.ids[example.prefix_length :]
    return TokenBatch(
        ids_BS=ids_BS.clamp(min=0),
        padding_BS=padding_BS,
        audio_index=_flat_positions(ids_BS, AUDIO),
        video_index=_flat_positions(ids_BS, VIDEO),
        label_index=torch.tensor(label_index),
        labels=torch.tensor(labels),
    )


def _flat_positions(ids_BS: Tensor, placeholder: int) -> Tensor:
    """Positions ``s * B + b`` of a placeholder, row by row."""
    rows, columns = (ids_BS == placeholder).nonzero(as_tuple=True)
    return columns * ids_BS.shape[0] + rows
