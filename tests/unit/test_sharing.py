"""The description of how ranks share a tensor: its arithmetic, and what is read of checkpoints that lack it."""

from __future__ import annotations

import math

import pytest
import torch

from mome_dist.checkpoint.format import sharing_of
from mome_dist.config import load_config
from mome_dist.engine.deepspeed_names import Cut, StateTensor
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import Clip, Trained, held_parameters, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.sharing import Sharing, from_json, of_format_2


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranges_of_a_slice_are_those_of_torch(dim: int, tp: int) -> None:
    whole = torch.arange(4 * 8 * 12).view(4, 8, 12)
    sharing = Sharing(sliced=dim)
    for rank, expected in enumerate(whole.chunk(tp, dim=dim)):
        shape = sharing.local_shape(whole.shape, tp)
        assert shape == tuple(expected.shape) and sharing.whole_shape(shape, tp) == tuple(whole.shape)
        held = StateTensor("x", shape, "x", cut=Cut(dim, rank, tp))
        for first, last in ((0, held.count), (5, held.count - 3), (7, 8), (3, 3)):
            found = [whole.flatten()[start:stop] for start, stop in held.ranges(first, last)]
            assert torch.equal(torch.cat([whole.new_empty(0), *found]), expected.flatten()[first:last])


def test_ranges_of_what_is_no_slice_are_one() -> None:
    assert list(StateTensor("x", (3, 4), "x").ranges(2, 9)) == [(2, 9)]
    assert list(StateTensor("x", (3, 4), "x", index=2).ranges(2, 9)) == [(26, 33)]


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"partial": True}, {"experts": 4}):
        with pytest.raises(ValueError, match="a slice has a gradient of its own"):
            Sharing(sliced=0, **wrong)
    with pytest.raises(UserError, match=r"parallel\.tp=3 does not divide .*\[8, 6\] along dimension 0"):
        Sharing(sliced=0).local_shape((8, 6), 3)


def test_checkpoints_without_descriptions_are_read_as_before() -> None:
    assert of_format_2("mome.3.routed.up_bias", (8, 6)) == Sharing(3, experts=8, partial=True)
    assert of_format_2("mome.12.shared.up_bias", (1, 6)) == Sharing(12, partial=True)
    assert of_format_2("mome.0.router_weight", (8, 6)) == Sharing(0, partial=True)
    assert of_format_2("mome.0.router_bias", (8,)) == Sharing(0)
    assert of_format_2("projectors.streams.audio.all.0.weight", (5, 7)) == Sharing()
    assert of_format_2("lora.video.encoder.layers.0.lora_a", (2, 7)) == Sharing()
    for unknown in ("adapter.0.weight", "mome.x.routed.up_bias", "loras.0"):
        with pytest.raises(UserError, match="does not say how ranks share it"):
            of_format_2(unknown, (2, 2))


def test_an_index_says_it_or_its_parts_do() -> None:
    sharing = Sharing(2, sliced=1)
    assert from_json(sharing.as_json()) == sharing and "packed" not in sharing.as_json()
    packed = Sharing(2, sliced=0, packed="llm_lora.2.b")
    assert from_json(packed.as_json()) == packed
    whole = {"shape": [8, 6], "parts": [{"file": "a", "start": None, "rows": None}]}
    rows = {"shape": [8, 6], "parts": [{"file": "a", "start": 0, "rows": 4}, {"file": "b", "start": 4, "rows": 4}]}
    assert sharing_of("model/x", {**whole, "sharing": sharing.as_json()}) == sharing
    assert sharing_of("optimizer/exp_avg/mome.1.routed.up_bias", rows) == Sharing(1, experts=8, partial=True)
    assert sharing_of("model/mome.1.routed.up_bias", whole) == Sharing(1, partial=True)
    assert sharing_of("rng/0/torch", whole) is None


def test_a_plan_counts_what_a_rank_holds() -> None:
    layout = Layout(tp=2, pp=2, ep=4, dp=4)
    assert Trained(60, Sharing(0, sliced=0)).held(layout, layers=3, first_stage=False) == 90
    assert Trained(60, Sharing(0, experts=8)).held(layout, layers=3, first_stage=False) == 45
    assert [Trained(60, Sharing()).held(layout, 3, first) for first in (True, False)] == [60, 0]


@pytest.mark.parametrize("experts", [True, False])
def test_a_job_counts_what_trains(experts: bool) -> None:
    config = load_config(["experiment=tiny", *([] if experts else ["mome=none"])])
    job = job_of(config, find_shape("llama-3.1-8b"), Clip(), {"audio": 384, "video": 128}, on_gpu=True)
    shared, routed, partial = held_parameters(job, Layout(1, 1, 1, 1), job.shape.layers, first_stage=True)
    assert shared + routed == job.trained_parameters
    assert (routed > 0) == (partial > 0) == experts
    assert math.isclose(shared + routed - partial, job.projector_parameters)
