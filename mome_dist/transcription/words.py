"""When each word of a text is said.

Whisper's decoder, which lies beside the encoder in every published Whisper, is given the text that was written down;
where its cross-attention looks for each token is a path through the recording, found by dynamic time warping (as
OpenAI's Whisper finds times of words: Radford et al., 2022, and the reference implementation's ``timing.py``). The
model that transcribes has no such attention: its LLM reads a prefix of pooled frames. Times are those of Whisper's
frames, 20 ms.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mome_dist.data.media import SAMPLE_RATE, Audio
from mome_dist.errors import UserError
from mome_dist.transcription.results import Word

FRAMES_PER_SECOND = 50
_MEDIAN = 7  # frames; OpenAI's width
# Seconds by which attention comes after a word's start: 0.068 with a standard deviation of 0.045, of 70 words of
# synthetic speech, whose times are known, with tiny.en. Left in, words would be no closer than by their letters.
_LAG = 0.06


class WordAligner:
    """Finds the words of a text in a recording of it.

    Args:
        directory: of a Whisper with its decoder, in the form of transformers.
        device: to compute on.

    Raises:
        UserError: there is no decoder.
    """

    def __init__(self, directory: str | Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

        model, found = WhisperForConditionalGeneration.from_pretrained(
            directory,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
        if any("decoder" in name for name in found["missing_keys"]):
            raise UserError(
                f"{directory} holds no decoder of Whisper, which finds when words are said: their times follow their "
                "letters; a whole Whisper directory would do better."
            )
        self._model = model.to(device).eval()
        self._spectrogram = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        settings = self._model.generation_config
        named = getattr(settings, "alignment_heads", None) or self._late_heads()
        self._heads: list[tuple[int, int]] = [(layer, head) for layer, head in named]
        begin = ["<|startoftranscript|>"]
        if getattr(settings, "is_multilingual", False):
            begin += ["<|en|>", "<|transcribe|>"]
        self._begin: list[int] = self._tokenizer.convert_tokens_to_ids([*begin, "<|notimestamps|>"])

    def _late_heads(self) -> list[list[int]]:
        """All heads of the later half of the layers, for a Whisper that does not name those that align."""
        config = self._model.config
        layers = range(config.decoder_layers // 2, config.decoder_layers)
        return [[layer, head] for layer in layers for head in range(config.decoder_attention_heads)]

    @torch.no_grad()
    def __call__(self, audio: Audio, text: str) -> tuple[Word, ...]:
        """The words of ``text`` in ``audio``.

        Args:
            audio: float32 [samples] at 16 kHz, at most 30 s.
            text: what is said in it, words separated by spaces.
        """
        words = text.split()
        if not words:
            return ()
        pieces = [self._tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
        ids = [*self._begin, *(token for piece in pieces for token in piece), self._tokenizer.eos_token_id]
        mel = self._spectrogram(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        device = self._model.device
        given = torch.tensor([ids], device=device)
        attention = self._model(mel.to(device), decoder_input_ids=given, output_attentions=True).cross_attentions
        frames = max(min(round(len(audio) / SAMPLE_RATE * FRAMES_PER_SECOND), attention[0].shape[-1]), 1)
        # The row of a token predicts the next one: from the last special token on, these are the text and its end.
        looks_HTF = torch.stack(
            [attention[layer][0, head, len(self._begin) - 1 : -1, :frames] for layer, head in self._heads]
        )
        starts = (warped(_cost(looks_HTF)) / FRAMES_PER_SECOND - _LAG).clip(min=0)
        edges = [0, *accumulate(len(piece) for piece in pieces)]
        return tuple(
            Word(word, float(starts[first]), float(starts[last]) if last < len(starts) else frames / FRAMES_PER_SECOND)
            for word, (first, last) in zip(words, pairwise(edges), strict=True)
        )


def _cost(looks_HTF: Tensor) -> NDArray[np.float64]:
    """What it costs a token to lie at a frame: attention, compared over tokens, smoothed over frames, over heads."""
    weights = looks_HTF.double()
    spread, mean = torch.std_mean(weights, dim=1, keepdim=True, correction=0)
    compared = (weights - mean) / spread.clamp(min=1e-12)
    padded = F.pad(compared, (_MEDIAN // 2, _MEDIAN // 2), mode="replicate")
    smooth = padded.unfold(-1, _MEDIAN, 1).median(-1).values.mean(0)
    return -np.asarray(smooth.cpu().numpy())


def warped(cost_TF: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first frame of each token on the cheapest monotone path through all tokens and frames.

    Dynamic time warping with steps of one token, one frame or both (Sakoe and Chiba, 1978).
    """
    tokens, frames = cost_TF.shape
    total = np.full((tokens + 1, frames + 1), np.inf)
    total[0, 0] = 0.0
    for token in range(1, tokens + 1):
        row, above = total[token], total[token - 1]
        for frame in range(1, frames + 1):
            row[frame] = cost_TF[token - 1, frame - 1] + min(above[frame - 1], above[frame], row[frame - 1])
    first = np.zeros(tokens, np.int64)
    token, frame = tokens, frames
    while token > 0:
        first[token - 1] = frame - 1
        ways = (total[token - 1, frame - 1], total[token - 1, frame], total[token, frame - 1])
        step = int(np.argmin(ways))
        token -= step in (0, 1)
        frame -= step in (0, 2)
    return first
