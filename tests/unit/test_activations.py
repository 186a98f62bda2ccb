"""Counting expert choices, against routings made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.evaluation.activations import PADDING, ActivationRecorder, Activations, token_modalities
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routing import Routing
from mome_dist.speech.sequence import AUDIO, VIDEO
from mome_dist.speech.views import View

VIEWS = [View("asr", 4, None), View("avsr", 4, 2)]
BATCH = [[1, AUDIO, VIDEO, 9], [1, AUDIO, AUDIO, VIDEO, 8, 9]]


def routing(experts: list[list[int]], count: int = 4) -> Routing:
    chosen = torch.tensor(experts)
    zeros = torch.zeros(len(experts), count)
    return Routing(chosen, torch.ones(chosen.shape), zeros, zeros, None)


def observe(module: LocalMoME, value: Routing) -> None:
    if module.observer is not None:
        module.observer(value)


def modules(layers: int = 2) -> list[LocalMoME]:
    return [LocalMoME(8, 4, 2, 1, 2) for _ in range(layers)]


def test_modalities_of_a_left_padded_batch() -> None:
    audio, video, text = 0, 1, 2
    assert token_modalities(BATCH).tolist() == [
        [PADDING, PADDING, text, audio, video, text],
        [text, audio, audio, video, text, text],
    ]


def test_counts_of_a_hand_made_routing() -> None:
    layers = modules()
    recorder = ActivationRecorder(layers, VIEWS)
    padded = [[3, 3], [3, 3]]
    first = [[0, 1], [0, 2], [1, 2], [0, 1]]
    second = [[0, 1], [1, 2], [1, 3], [2, 3], [0, 1], [0, 3]]
    with recorder.recording(VIEWS[1], BATCH):
        observe(layers[0], routing(padded + first + second))
        observe(layers[0], routing([[2, 3], [2, 3]]))  # a written token of each clip: not counted
    assert all(layer.observer is None for layer in layers)
    counts = recorder.result().counts
    assert counts[0, 1].tolist() == [
        [1, 2, 2, 1],  # audio: 02, 12, 13
        [0, 1, 2, 1],  # video: 12, 23
        [5, 4, 0, 1],  # text: 01, 01, 01, 01, 03
    ]
    assert counts[1].sum() == 0
    assert counts[:, 0].sum() == 0


def test_beams_count_once() -> None:
    layers = modules(1)
    recorder = ActivationRecorder(layers, VIEWS)
    clips = [[[0, 1], [0, 2]], [[1, 2], [1, 3]]]
    beams = [pair for clip in clips for _ in range(3) for pair in clip]  # generate repeats each clip in place
    with recorder.recording(VIEWS[0], [[1, AUDIO], [1, AUDIO]]):
        observe(layers[0], routing(beams))
    assert recorder.result().counts[0, 0].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 2, 1, 0]]


def test_a_real_module_is_counted_through_its_forward_pass() -> None:
    torch.manual_seed(0)
    module = LocalMoME(8, 4, 2, 1, 2)
    module.initialize("mome.0", 0)
    recorder = ActivationRecorder([module], VIEWS)
    hidden_BSH: Tensor = torch.randn(2, 6, 8)
    with recorder.recording(VIEWS[1], BATCH):
        module(hidden_BSH)
    chosen = (hidden_BSH @ module.router.get_parameter("weight").t()).topk(2).indices
    expected = torch.bincount(chosen[token_modalities(BATCH) == 0].flatten(), minlength=4)
    assert torch.equal(recorder.result().counts[0, 1, 0], expected)


def test_shares_sum_to_top_k_and_absent_modalities_are_not_zero() -> None:
    counts = torch.tensor([[[[3, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]])
    shares = Activations(counts, ("asr(4)",), 2).shares()
    assert shares[0, 0, 0].tolist() == [1.5, 0.5, 0.0, 0.0]
    assert shares[0, 0, 1].isnan().all()
    assert shares[0, 0, 2].sum() == 2


def test_saved_and_loaded(tmp_path: Path) -> None:
    saved = Activations(torch.arange(24).view(1, 2, 3, 4), ("asr(4)", "avsr(4,2)"), 2)
    saved.save(tmp_path / "activations.safetensors")
    loaded = Activations.load(tmp_path / "activations.safetensors")
    assert torch.equal(loaded.counts, saved.counts)
    assert (loaded.views, loaded.top_k) == (saved.views, saved.top_k)
    assert [path.name for path in tmp_path.iterdir()] == ["activations.safetensors"]
    (tmp_path / "activations.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"activations\.safetensors"):
        Activations.load(tmp_path / "activations.safetensors")
