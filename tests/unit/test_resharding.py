"""The arithmetic of resharding, compared with DeepSpeed's own functions, torch's and safetensors' readers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.utils import align_dense_tensors
from safetensors.torch import load_file
from torch import nn

from mome_dist.checkpoint.deepspeed.plan import Plan, Stored
from mome_dist.checkpoint.deepspeed.torch_file import write_torch_file
from mome_dist.checkpoint.deepspeed.write import check_target
from mome_dist.checkpoint.deepspeed.zero import ALIGNMENT, fragments, partition
from mome_dist.checkpoint.format import merge_parts
from mome_dist.checkpoint.hashes import StreamedHash, raw_bytes, tensor_hash
from mome_dist.checkpoint.parts import parts_of, write_part
from mome_dist.checkpoint.pieces import Constant, Piece, Range, TensorFacts
from mome_dist.checkpoint.source import OpenFiles, Source
from mome_dist.engine.deepspeed_names import (
    LARGEST_EXPERT_GROUP,
    ModelTensors,
    engine_parameters,
    largest_group,
    optimizer_groups,
)
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.sharing import Sharing, of_format_2
from mome_dist.speech.projector import Projectors


def model_tensors(layers: int = 4, experts: int = 8, bias: bool = True) -> ModelTensors:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        prefix = f"mome.{number}"
        shapes[f"{prefix}.router_weight"] = (experts, 6)
        if bias:
            shapes[f"{prefix}.router_bias"] = (experts,)
        for kind, count in (("routed", experts), ("shared", 1)):
            shapes[f"{prefix}.{kind}.down_weight"], shapes[f"{prefix}.{kind}.down_bias"] = (count, 3, 6), (count, 3)
            shapes[f"{prefix}.{kind}.up_weight"], shapes[f"{prefix}.{kind}.up_bias"] = (count, 6, 3), (count, 6)
    shapes |= {"projectors.streams.audio.all.0.weight": (5, 7), "projectors.streams.audio.all.0.bias": (5,)}
    return ModelTensors(shapes)


@pytest.mark.parametrize(("elements", "ranks"), itertools.product([1, 2, 7, 64, 97], [1, 2, 3, 8]))
def test_partitions_are_deepspeeds(elements: int, ranks: int) -> None:
    flat = torch.cat(align_dense_tensors([torch.arange(1.0, elements + 1)], ALIGNMENT * ranks))
    for rank, theirs in enumerate(flat.chunk(ranks)):
        mine = partition(elements, ranks, rank)
        assert (mine.start, mine.size) == (rank * len(theirs), len(theirs))
        assert mine.padding == int((theirs == 0).sum())


def test_fragments_put_every_element_into_one_partition() -> None:
    counts = [5, 1, 12, 3, 40]
    values = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    for ranks in (1, 2, 4, 7):
        rebuilt: list[int] = []
        for rank in range(ranks):
            part = partition(sum(counts), ranks, rank)
            held = np.full(part.size, -1)
            for piece in fragments(counts, part):
                held[piece.offset : piece.offset + piece.stop - piece.start] = values[piece.number][
                    piece.start : piece.stop
                ]
            assert (held[part.size - part.padding :] == -1).all()
            rebuilt += held[: part.size - part.padding].tolist()
        assert rebuilt == list(range(sum(counts)))


def test_groups_of_experts_are_split_as_deepspeed_splits_them() -> None:
    parameters = engine_parameters(model_tensors(), [0, 1, 2], 2, 1, first_stage=True)
    theirs, names = [], {}
    for parameter in parameters:
        held = nn.Parameter(torch.empty(parameter.shape, device="meta"))
        names[id(held)] = parameter.local
        if parameter.is_expert:
            held.allreduce, held.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
        theirs.append(held)
    experts = [parameter.count for parameter in parameters if parameter.is_expert]
    for largest in (1, 2 * experts[0], 10**6):
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"name": "shared", "params": theirs}, largest_group(experts, largest)
        )
        expected = [[names[id(held)] for held in group["params"]] for group in groups]
        assert [[p.local for p in group] for group in optimizer_groups(parameters, largest)] == expected
        assert len(groups) > 2 or largest == 10**6
    default = split_params_into_different_moe_groups_for_optimizer.__defaults__
    assert default == (LARGEST_EXPERT_GROUP,)


@pytest.mark.parametrize("form", [None, "jejr", "dejr", "dedr"])
def test_projectors_are_in_the_order_of_the_module(form: str | None) -> None:
    rates = {"audio": [2, 4, 16], "video": [1, 10]}
    if form is None:
        projectors = Projectors({"audio": 4, "video": 3}, rates, 8, 5, True, "stack")
    else:
        mixture = {"form": form, "experts": 3, "top_k": 2, "balance_loss": 0.0, "z_loss": 0.0}
        projectors = Projectors({"audio": 4, "video": 4}, rates, 8, 5, False, "pool", mixture=mixture)
    named = {f"projectors.{name}": tuple(p.shape) for name, p in projectors.named_parameters()}
    model = ModelTensors({"mome.0.router_weight": (2, 8), **dict(sorted(named.items()))})
    assert [parameter.local for parameter in model.whole_modules()] == list(named)


def test_layers_of_chunks() -> None:
    layout = Layout(1, 2, 1, 1, virtual=2)
    assert [layout.layers_of(rank, 8) for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [Layout(1, 2, 1, 1, stage_layers=(4, 0)).layers_of(rank, 4) for rank in range(2)] == [[0, 1, 2, 3], []]


def ranges(plan: Plan, kinds: set[str]) -> Counter[tuple[str, int]]:
    """How often each element of each tensor is in files of some kinds, of the first tensor-parallel ranks."""
    found: Counter[tuple[str, int]] = Counter()
    for file in plan.files():
        for place, stored in file.tensors.items():
            in_kind = file.kind in kinds and file.tp == 0 and "optimizer" not in place
            for piece in stored.pieces if in_kind else ():
                if isinstance(piece, Range):
                    found.update((piece.tensor, element) for element in range(piece.start, piece.stop))
    return found


@pytest.mark.parametrize("stage_layers", [None, (2, 0, 1, 1)])
def test_sixty_four_ranks_hold_every_number_once(stage_layers: tuple[int, ...] | None) -> None:
    layout, model = Layout(2, 4, 4, 8, stage_layers=stage_layers), model_tensors()
    assert layout.world_size == 64
    stages = [layout.layers_of(pp, model.layers) for pp in range(layout.pp)]
    plan = Plan(model, layout, stages, 2, ("exp_avg",), 3)
    elements = {(name, i) for name, shape in model.shapes.items() for i in range(int(np.prod(shape)))}
    weights = {(f"model/{name}", i) for name, i in elements}
    trained = {(name, i) for name, i in elements if not name.endswith("router_bias")}
    assert ranges(plan, {"model", "expert"}) == Counter(weights)
    partitions = {(f"{kind}/{name}", i) for kind in ("model", "optimizer/exp_avg") for name, i in trained}
    assert ranges(plan, {"zero"}) == Counter(partitions)
    names = [file.name for file in plan.files()]
    assert len(names) == len(set(names))


def test_more_model_parallel_ranks_than_deepspeed_can_sort_are_refused() -> None:
    check_target(Layout(10, 10, 1, 1))
    with pytest.raises(UserError, match="more than 100 model-parallel ranks"):
        check_target(Layout(8, 16, 1, 1))


def test_a_model_with_missing_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"of layers \[1\]"):
        ModelTensors({"mome.1.router_weight": (2, 8), "mome.1.routed.down_weight": (2, 3, 8)})


def test_experts_of_a_group_are_whole() -> None:
    parameters = engine_parameters(model_tensors(), [0], 2, 1, first_stage=True)
    (packed,) = [parameter for parameter in parameters if parameter.is_expert]
    assert packed.shape[0] * packed.shape[1] == packed.count == sum(tensor.count for tensor in packed.tensors)
    held = model_tensors().routed_experts // 2
    assert sorted({tensor.index for tensor in packed.tensors}, key=str) == list(range(held, 2 * held))


def test_a_streamed_torch_file_is_a_torch_file(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5), "b": torch.randn(1000)}

    def read(piece: Piece) -> list[memoryview]:
        if isinstance(piece, Constant):
            return [memoryview(np.tile(np.array(piece.values, np.float32), piece.times).tobytes())]
        data = raw_bytes(values[piece.tensor])[4 * piece.start : 4 * piece.stop]
        return [data[:7], data[7:]]

    content = {
        "whole": Stored((3, 5), (Range("a", 0, 15),)),
        "joined": Stored((12,), (Range("b", 990, 1000), Constant((0.0,), 2))),
        "step": Stored((), (Constant((3.0,)),)),
        "rest": [1, "two", None, {"three": (4, 5.0)}],
    }
    path = tmp_path / "file.pt"
    assert write_torch_file(path, content, lambda piece: iter(read(piece))) == path.stat().st_size
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(loaded["whole"], values["a"])
        assert torch.equal(loaded["joined"], torch.cat([values["b"][990:], torch.zeros(2)]))
        assert loaded["step"].shape == () and loaded["step"].item() == 3
        assert loaded["rest"] == content["rest"]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (loaded["whole"], loaded["joined"]))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def _sharing(name: str, tensor: torch.Tensor) -> Sharing | None:
    return None if name.startswith("rng/") else of_format_2(name.removeprefix("model/"), tuple(tensor.shape))


class InMemory(Source):
    """Tensors in memory, in chunks of a few bytes."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        facts = {
            name: TensorFacts(tuple(t.shape), str(t.dtype).removeprefix("torch."), _sharing(name, t))
            for name, t in tensors.items()
        }
        super().__init__(facts, {}, {}, None, None, {name: bytes(raw_bytes(t)) for name, t in tensors.items()})


def test_a_streamed_part_is_a_safetensors_file(tmp_path: Path) -> None:
    model = model_tensors()
    tensors = {f"model/{name}": torch.randn(shape) for name, shape in model.shapes.items()}
    tensors |= {f"rng/{rank}/torch": torch.randint(256, (5,), dtype=torch.uint8) for rank in range(6)}
    source, layout = InMemory(tensors), Layout(2, 2, 2, 2)
    described = []
    rebuilt: dict[str, list[torch.Tensor]] = {}
    for rank, rows in parts_of(source.facts, layout, model.layers):
        path = tmp_path / f"part-{rank:05d}.safetensors"
        described.append(write_part(path, rows, source, lambda written: None)[1])
        for name, value in load_file(path).items():
            rebuilt.setdefault(name, []).append(value)
    for name, pieces in rebuilt.items():
        assert torch.equal(pieces[0] if len(pieces) == 1 else torch.cat(pieces), tensors[name])
    merged = merge_parts(described)
    assert merged.keys() == tensors.keys()
    for name, facts in merged.items():
        assert facts["sha256"] == tensor_hash(tensors[name], ".routed." in name)
    files = {part["file"] for part in merged["model/mome.3.routed.up_bias"]["parts"]}
    assert files == {"part-00004.safetensors", "part-00006.safetensors"}  # of the second stage, tp 0, dp 0 and 1


@pytest.mark.parametrize("by_row", [True, False])
def test_the_hash_of_a_stream_is_that_of_the_tensor(by_row: bool) -> None:
    tensor = torch.randn(6, 10)
    streamed = StreamedHash(40 if by_row else None)
    data = raw_bytes(tensor)
    for begin in range(0, len(data), 23):
        streamed.update(data[begin : begin + 23])
    digests = streamed.finish()
    assert (len(digests) == 6) == by_row
    whole = InMemory({"model/mome.0.routed.up_weight" if by_row else "rng/0/x": tensor})
    assert whole.digests(next(iter(whole.facts))) == digests


def test_threads_that_read_many_files_read_the_right_ones(tmp_path: Path) -> None:
    """More files than stay open: a descriptor that one thread closes is the next one's that another opens."""
    paths = [tmp_path / str(number) for number in range(200)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(8, "little"))
    files = OpenFiles()

    def wrong(seed: int) -> int:
        chosen = np.random.default_rng(seed).integers(len(paths), size=20_000)
        read = (int.from_bytes(os.pread(files.descriptor(paths[n]), 8, 0), "little") for n in chosen)
        return sum(found != number for found, number in zip(read, chosen, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(wrong, range(4))) == 0
    files.close()


def test_the_tool_imports_neither_megatron_nor_a_process_group() -> None:
    code = "import sys, mome_dist.checkpoint.reshard; assert 'megatron' not in sys.modules, 'Megatron-Core is imported'"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
