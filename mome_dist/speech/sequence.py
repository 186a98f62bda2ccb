"""The token sequence that the LLM sees, and how those of a pass are packed one after another.

``<bos> <audio> A.. </audio> <video> V.. </video> prompt text <eos>``; streams that a task does not use are left out,
and so is ``<bos>`` where the LLM has none (Qwen2).
The loss is on the text and the final ``<eos>`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.draws import draw_of
from mome_dist.llm.tokens import TokenTable, check_rows
from mome_dist.speech.views import View
from mome_dist.token_context import ALIGNMENT, Labels, Modality, TokenContext
from mome_dist.transfer import sent_to

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
        self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
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

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; a part of a character is U+FFFD."""
        return [self._tokenizer.decode([number]) for number in ids]


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
class SpeechPlaces:
    """Where a view has the tokens of a stream.

    Attributes:
        stream: "audio" or "video".
        rate: frames a token.
        index_T: int64 [T], positions in the pass, clip by clip.
        absent_T: bool [T], tokens of clips that go without this stream in this view; None if there are none.
        view: which view of the pass it is, from zero.
    """

    stream: str
    rate: int
    index_T: Tensor
    absent_T: Tensor | None
    view: int = 0

    def to(self, device: torch.device) -> SpeechPlaces:
        """A copy on a device; the host does not wait for it."""
        absent_T = None if self.absent_T is None else sent_to(self.absent_T, device)
        return replace(self, index_T=sent_to(self.index_T, device), absent_T=absent_T)


@dataclass(frozen=True)
class PackedTokens:
    """The sequences of a pass: the same clips in one view after another.

    Attributes:
        views: in order.
        ids_N: int64 [N]; zero at speech tokens and dead ones.
        context: lengths, views and modalities.
        speech: of every view, the streams that it reads.
        labels: text and end tokens.
    """

    views: tuple[View, ...]
    ids_N: Tensor
    context: TokenContext
    speech: tuple[SpeechPlaces, ...]
    labels: Labels

    def to(self, device: torch.device) -> PackedTokens:
        """A copy on a device; the host does not wait for it."""
        return replace(
            self,
            ids_N=sent_to(self.ids_N, device),
            context=self.context.to(device),
            speech=tuple(each.to(device) for each in self.speech),
            labels=self.labels.to(device),
        )


Absent = Callable[[View, int, str], bool]
"""Whether a clip, by its place in the pass, goes without a stream in a view."""


def pack(
    sequences: Sequence[tuple[View, Sequence[Example]]],
    absent: Absent | None = None,
    multiple: int = ALIGNMENT,
    least: int = 0,
    draws: Sequence[int] | None = None,
) -> PackedTokens:
    """Lay out the sequences of the same clips in one view after another; the last token of a sequence is only ever a
    label, no input.

    Args:
        sequences: of each view, clip by clip; a view may come twice.
        absent: which clips go without a stream; None if none does.
        multiple, least: of N, see `TokenContext.of`.
        draws: of each clip, a number that no other clip of the run has in any step (`mome_dist.draws.draw_of`); None
            where nothing is drawn. The same clip has others in another view.
    """
    ids: list[int] = []
    index: list[int] = []
    labels: list[int] = []
    speech: list[SpeechPlaces] = []
    for number, (view, examples) in enumerate(sequences):
        begin = len(ids)
        for example in examples:
            index += range(len(ids) + example.prefix_length - 1, len(ids) + len(example.ids) - 1)
            labels += example.ids[example.prefix_length :]
            ids += example.ids[:-1]
        ids_T = torch.tensor(ids[begin:])
        for stream, placeholder, rate in (("audio", AUDIO, view.audio_rate), ("video", VIDEO, view.video_rate)):
            if rate is not None:
                index_T = (ids_T == placeholder).nonzero()[:, 0]
                absent_T = _absent(view, stream, placeholder, examples, absent)
                speech.append(SpeechPlaces(stream, rate, begin + index_T, absent_T, number))
    ids_N = torch.tensor(ids)
    modality_N = int(Modality.AUDIO) * (ids_N == AUDIO) + int(Modality.VIDEO) * (ids_N == VIDEO)
    lengths = [(str(view), [len(example.ids) - 1 for example in examples]) for view, examples in sequences]
    prefixes = [example.prefix_length for _, examples in sequences for example in examples]
    of_views = None if draws is None else [draw_of(each, number) for number in range(len(sequences)) for each in draws]
    context = TokenContext.of(lengths, modality_N, multiple, least, prefixes, of_views)
    return PackedTokens(
        views=tuple(view for view, _ in sequences),
        ids_N=F.pad(ids_N.clamp(min=0), (0, context.tokens - len(ids))),
        context=context,
        speech=tuple(speech),
        labels=Labels(torch.tensor(index), torch.tensor(labels)),
    )


def _absent(
    view: View, stream: str, placeholder: int, examples: Sequence[Example], absent: Absent | None
) -> Tensor | None:
    if absent is None:
        return None
    clips = [absent(view, clip, stream) for clip in range(len(examples))]
    if not any(clips):
        return None
    tokens = torch.tensor([example.ids.count(placeholder) for example in examples])
    return torch.tensor(clips).repeat_interleave(tokens)
