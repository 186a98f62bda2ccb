"""Compression of many clips at once, and speech tokens put in their places, against one clip and one view at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from mome_dist.speech.matryoshka import compress, compressed_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import Absent, PackedTokens
from mome_dist.speech.views import View
from tests.packed import speech_tokens

WIDTHS, RATES, HIDDEN = {"audio": 6, "video": 5}, {"audio": [2, 4], "video": [1, 3]}, 8
# Two views share an audio rate, two a video rate; one comes twice.
VIEWS = [View("asr", 4, None), View("avsr", 4, 3), View("avsr", 2, 3), View("vsr", None, 1), View("asr", 4, None)]
FRAMES = [(9, 4), (3, 1), (16, 7)]  # of audio and video; the second clip is shorter than some windows


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["pool", "stack"])
@pytest.mark.parametrize("rate", [1, 3, 5, 16])
@pytest.mark.parametrize("lengths", [[10, 6, 15], [3, 10, 1, 7, 2], [1], [2, 2]])
def test_clips_are_compressed_together_as_one_by_one(lengths: list[int], rate: int, method: str) -> None:
    together = _random(sum(lengths), 4).requires_grad_()
    found = compress(together, lengths, rate, method)
    expected, clips = [], [clip.clone().requires_grad_() for clip in together.detach().split(lengths)]
    for clip in clips:
        count = compressed_length(len(clip), rate)
        windows = [clip[number * rate : (number + 1) * rate] for number in range(count)]
        if method == "pool":
            expected += [window.sum(dim=0) / len(window) for window in windows]
        else:
            filled = [torch.cat([window, window.new_zeros(rate - len(window), 4)]) for window in windows]
            expected += [window.flatten() for window in filled]
    torch.testing.assert_close(found, torch.stack(expected))
    weights = _random(*found.shape, seed=1)
    found.backward(weights)
    torch.stack(expected).backward(weights)
    torch.testing.assert_close(together.grad, torch.cat([_gradient(clip) for clip in clips]))


def _gradient(values: Tensor) -> Tensor:
    return torch.zeros_like(values) if values.grad is None else values.grad


def _projectors(per_rate: bool, compression: str) -> Projectors:
    module = Projectors(WIDTHS, RATES, HIDDEN, 16, per_rate, compression)
    module.initialize(0, 0.5)
    return module


def _features() -> dict[str, list[Tensor]]:
    return {
        stream: [_random(frames[number], WIDTHS[stream], seed=10 * clip + number) for clip, frames in enumerate(FRAMES)]
        for number, stream in enumerate(("audio", "video"))
    }


def _tokens(absent: Absent | None) -> PackedTokens:
    return speech_tokens(VIEWS, FRAMES, absent)


def _left_out(view: View, clip: int, stream: str) -> bool:
    """In some views some clips go without a stream; in the last of them the first clip without both."""
    missing = {("avsr", 4): [(0, "audio"), (2, "video")], ("avsr", 2): [(0, "audio"), (0, "video")]}
    return (clip, stream) in missing.get((view.task, view.audio_rate or 0), [])


def _one_by_one(
    projectors: Projectors, embedded_NH: Tensor, features: Mapping[str, Sequence[Tensor]], absent: Absent | None
) -> Tensor:
    """Every clip of every view projected by itself, zeros where it goes without a stream."""
    rows, at = list(embedded_NH), 0
    for view in VIEWS:
        for clip, (audio, video) in enumerate(FRAMES):
            at += 1  # the first token
            for stream, rate, frames in (("audio", view.audio_rate, audio), ("video", view.video_rate, video)):
                if rate is None:
                    continue
                values = features[stream][clip]
                if absent is not None and absent(view, clip, stream):
                    values = torch.zeros_like(values)
                tokens = projectors(stream, [values], rate)
                assert len(tokens) == compressed_length(frames, rate)
                rows[at : at + len(tokens)] = list(tokens)
                at += len(tokens)
            at += 1  # the last one, whose label is no input
    return torch.stack(rows)


@pytest.mark.parametrize("absent", [None, _left_out], ids=["all", "some absent"])
@pytest.mark.parametrize(("per_rate", "compression"), [(False, "pool"), (True, "pool"), (True, "stack")])
def test_clips_are_projected_once_for_all_views(per_rate: bool, compression: str, absent: Absent | None) -> None:
    tokens, found, gradients = _tokens(absent), [], []
    weights_NH = _random(tokens.context.tokens, HIDDEN, seed=7)
    for together in (True, False):
        projectors, features = _projectors(per_rate, compression), _features()
        embedded_NH = _random(tokens.context.tokens, HIDDEN, seed=5).requires_grad_()
        leaves = [clip.requires_grad_() for clips in features.values() for clip in clips]
        if together:
            output_NH = projectors.insert(embedded_NH, tokens.speech, features)
        else:
            output_NH = _one_by_one(projectors, embedded_NH, features, absent)
        output_NH.backward(weights_NH)
        found.append(output_NH.detach())
        parameters = dict(projectors.named_parameters())
        gradients.append([_gradient(each) for each in (embedded_NH, *leaves, *parameters.values())])
    # Sums of some dozen products in another order; the norm divides small deviations by themselves.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(each.any() for each in gradients[0])
    speech_N = tokens.context.modality_N > 0
    assert torch.equal(found[0][~speech_N], _random(tokens.context.tokens, HIDDEN, seed=5)[~speech_N])
    assert not gradients[0][0][speech_N].any()


def test_clips_that_go_without_a_stream_everywhere_have_no_gradient() -> None:
    tokens, features = _tokens(lambda view, clip, stream: clip == 1), _features()
    for clips in features.values():
        for clip in clips:
            clip.requires_grad_()
    projectors = _projectors(False, "pool")
    output_NH = projectors.insert(torch.zeros(tokens.context.tokens, HIDDEN), tokens.speech, features)
    output_NH.backward(_random(*output_NH.shape, seed=7))
    for clips in features.values():
        assert [bool(_gradient(clip).any()) for clip in clips] == [True, False, True]


def test_embeddings_keep_their_precision_and_no_speech_changes_nothing() -> None:
    tokens = _tokens(None)
    embedded_NH = torch.zeros(tokens.context.tokens, HIDDEN, dtype=torch.bfloat16)
    projectors = _projectors(False, "pool")
    assert projectors.insert(embedded_NH, tokens.speech, _features()).dtype is torch.bfloat16
    assert projectors.insert(embedded_NH, [], {}) is embedded_NH
