"""The published checkpoints: every name accounted for, nothing of the file run, the shape read from the tensors."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.speech.avhubert import AVHubertConfig
from mome_dist.speech.avhubert.conversion import DROPPED, convert, names_of, shape_of
from mome_dist.speech.avhubert.fairseq_file import read_fairseq
from mome_dist.speech.geometry import AVHUBERT
from mome_dist.speech.video_encoders import load_video_encoder
from tests.avhubert_checkpoint import Published, fine_tuned, small
from tools.convert_avhubert import main

# Names as they stand in the published files (from printed models and the conversions that others wrote).
KNOWN = {
    "feature_extractor_video.resnet.frontend3D.0.weight": (64, 1, 5, 7, 7),
    "feature_extractor_video.resnet.frontend3D.1.running_var": (64,),
    "feature_extractor_video.resnet.frontend3D.2.weight": (64,),
    "feature_extractor_video.resnet.trunk.layer1.0.relu1.weight": (64,),
    "feature_extractor_video.resnet.trunk.layer2.0.downsample.0.weight": (128, 64, 1, 1),
    "feature_extractor_video.resnet.trunk.layer4.1.bn2.running_mean": (512,),
    "feature_extractor_video.proj.weight": (768, 512),
    "feature_extractor_audio.proj.weight": (768, 104),
    "layer_norm.weight": (1536,),
    "post_extract_proj.weight": (768, 1536),
    "mask_emb": (768,),
    "encoder.pos_conv.0.weight_g": (1, 1, 128),
    "encoder.pos_conv.0.weight_v": (768, 48, 128),
    "encoder.layers.11.self_attn.q_proj.bias": (768,),
    "encoder.layers.0.self_attn_layer_norm.weight": (768,),
    "encoder.layers.0.fc1.weight": (3072, 768),
    "encoder.layers.0.final_layer_norm.bias": (768,),
    "encoder.layer_norm.weight": (768,),
}


@pytest.mark.parametrize(
    "shape",
    [AVHubertConfig(), AVHubertConfig(width=1024, layers=24, heads=16, ffn_width=4096)],
    ids=["base", "large"],
)
def test_published_sizes_are_read_from_the_tensors(shape: AVHubertConfig) -> None:
    with torch.device("meta"):
        published = Published(shape.width, shape.layers, shape.heads, shape.ffn_width)
    state = published.state_dict()
    assert shape_of(state, {}) == shape
    if shape.width == 768:
        assert {name: tuple(state[name].shape) for name in KNOWN} == KNOWN
    converted = convert(state, {})
    # What is converted and what is dropped is everything, once.
    used = set(names_of(shape).values())
    assert used.isdisjoint(converted.dropped) and used | converted.dropped.keys() == state.keys()
    assert set(converted.dropped.values()) == set(DROPPED.values())


def save(path: Path, model: dict[str, Tensor], **more: Any) -> Path:
    torch.save({"model": model, **more}, path)
    return path


def features(directory: Path) -> Tensor:
    clip = torch.randint(0, 256, (6, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        return load_video_encoder(directory)([clip])[0]


SETTINGS = {"_name": "av_hubert", "encoder_attention_heads": 4, "layer_norm_first": True, "modality_fuse": "concat"}


def forms(state: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The ways in which checkpoints tell their settings."""
    inner = {"common": {"fp16": True}, "model": SETTINGS}
    return {
        "plain": {"model": state, "cfg": inner},
        "omegaconf": {"model": state, "cfg": OmegaConf.create(inner)},
        "namespace": {"model": state, "args": argparse.Namespace(**SETTINGS)},
        "fine-tuned": {"model": fine_tuned(state), "cfg": {"model": {"_name": "av_hubert_seq2seq", "w2v_args": inner}}},
    }


def test_every_form_gives_the_same_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small().state_dict()
    found = {}
    for form, content in forms(state).items():
        rest = {"extra_state": {"epoch": 3}, "task_state": {"dictionaries": [Path("x")]}}
        torch.save(content | rest, tmp_path / "it.pt")
        assert main([str(tmp_path / "it.pt"), "--output", str(tmp_path / form)]) == 0, capsys.readouterr().err
        document = json.loads((tmp_path / form / "config.json").read_text())
        assert document["geometry"] == AVHUBERT
        assert document["encoder"]["heads"] == 4  # 32 channels over 64 would be one
        assert document["source"]["model"] == ("fine-tuned" if form == "fine-tuned" else "pre-trained")
        found[form] = features(tmp_path / form)
    assert all(torch.equal(value, found["plain"]) for value in found.values())
    written = capsys.readouterr().out
    assert "decoder.embed_tokens.weight and 1 more" in written and "omegaconf" in written


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in small().state_dict().items()}
    converted = convert(state, {}, 4)
    assert {value.dtype for value in converted.encoder.parameters()} == {torch.float32}
    norm = converted.encoder.transformer.layer_norm.weight
    assert torch.equal(norm, state["encoder.layer_norm.weight"].float())


def test_weight_norm_keeps_its_kernel() -> None:
    """The kernel is g * v / |v|, the length taken over each position of the window."""
    state = small().state_dict()
    g, v = state["encoder.pos_conv.0.weight_g"], state["encoder.pos_conv.0.weight_v"]
    expected = g * v / v.square().sum((0, 1), keepdim=True).sqrt()
    kernel = convert(state, {}, 4).encoder.transformer.pos_conv_embed.conv.weight
    torch.testing.assert_close(kernel, expected, rtol=1e-5, atol=1e-6)


def test_missing_unknown_and_misshapen_tensors_are_named() -> None:
    state = small().state_dict()
    without = {name: value for name, value in state.items() if name != "encoder.layers.1.fc2.bias"}
    with pytest.raises(UserError, match=r"lacks encoder\.layers\.1\.fc2\.bias"):
        convert(without, {}, 4)
    with pytest.raises(UserError, match=r"unknown tensors: encoder\.adapter\.weight"):
        convert(state | {"encoder.adapter.weight": torch.zeros(1)}, {}, 4)
    with pytest.raises(UserError, match=r"unknown tensors: classifier\.weight"):
        convert(fine_tuned(state) | {"classifier.weight": torch.zeros(1)}, {}, 4)
    with pytest.raises(UserError, match=r"encoder\.layers\.1\.fc1\.weight has shape \[3, 3\]"):
        convert(state | {"encoder.layers.1.fc1.weight": torch.zeros(3, 3)}, {}, 4)
    with pytest.raises(UserError, match=r"lacks encoder\.pos_conv"):
        convert({"wav2vec": torch.zeros(1)}, {})


@pytest.mark.parametrize(("key", "value"), [("layer_norm_first", False), ("modality_fuse", "add")])
def test_another_architecture_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        convert(small().state_dict(), {key: value}, 4)


class Attack:
    """A pickle that would run a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(path: str) -> None:
    """What the file of the test would call."""
    Path(path).touch()


def test_nothing_in_the_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class that is not known stays inert; what only an attack calls is refused by name."""
    state, witness = small().state_dict(), tmp_path / "witness"
    inert = save(tmp_path / "inert.pt", state, task_state=Attack(touch, str(witness)), cfg={"model": SETTINGS})
    # As libraries do it for classes of their own: here it would let the file call the function.
    with torch.serialization.safe_globals([touch]):
        file = read_fairseq(inert)
        assert touch in torch.serialization.get_safe_globals(), "what others allow stays allowed"
    assert file.ignored == [f"{__name__}.touch"] and not witness.exists()
    torch.load(inert, weights_only=False)
    assert witness.exists(), "the file would have done it"
    method = save(tmp_path / "method.pt", state, task_state=Attack(Path.touch, witness))  # by way of getattr
    with pytest.raises(UserError, match=r"method\.pt cannot be read .*<object that is not loaded>"):
        read_fairseq(method)
    attack = save(tmp_path / "attack.pt", state, task_state=Attack(os.system, "true"))
    assert main([str(attack), "--output", str(tmp_path / "out")]) == 2
    assert "do not trust this file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_fairseq(tmp_path / "nothing.pt")
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(UserError, match=r"a\.pt is no file of torch 1\.6"):
        read_fairseq(path)
    torch.save({"model": {"a": 1}}, path)
    with pytest.raises(UserError, match="no 'model' of tensors"):
        read_fairseq(path)
    save(path, small().state_dict())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"a\.pt"):
        read_fairseq(path)


def test_a_directory_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.pt", small().state_dict())
    (tmp_path / "out").mkdir()
    assert main([str(path), "--output", str(tmp_path / "out"), "--heads", "4"]) == 2
    assert "replaces nothing" in capsys.readouterr().err
    assert main([str(path)]) == 2
    assert "no published size" in capsys.readouterr().err
