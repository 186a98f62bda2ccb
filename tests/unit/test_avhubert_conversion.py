"""The published checkpoints: every name accounted for, nothing of the file run, the shape read from the tensors."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mome_dist.commands.convert_avhubert import main
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.paths import configs_dir
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder
from mome_dist.speech.avhubert.conversion import DROPPED, convert, names_of, shape_of
from mome_dist.speech.avhubert.fairseq_file import read_fairseq
from mome_dist.speech.avhubert.settings import Setting, settle
from mome_dist.speech.geometry import AVHUBERT
from mome_dist.speech.lora import attach_lora, lora_layers
from mome_dist.speech.video_encoders import load_video_encoder
from tests.avhubert_checkpoint import Published, fine_tuned, fine_tuned_ctc, small

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


# The model's section in the published files: the keys that the configuration of the training named, no others.
PUBLISHED = {
    "_name": "av_hubert",
    "modality_fuse": "concat",
    "masking_type": "input",
    "extractor_mode": "default",
    "final_dim": 256,
    "encoder_layerdrop": 0.05,
    "dropout": 0.1,
    "layer_norm_first": True,
    "audio_feat_dim": 104,
}
LARGE = {
    "encoder_layers": 24,
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
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
    told = PUBLISHED if shape.width == 768 else PUBLISHED | LARGE
    assert shape_of(state, told, {})[0] == shape
    if shape.width == 768:
        assert {name: tuple(state[name].shape) for name in KNOWN} == KNOWN
    converted = convert(state, told)
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
        "CTC": {
            "model": fine_tuned_ctc(state),
            "args": argparse.Namespace(arch="av_hubert_ctc", w2v_args=argparse.Namespace(**SETTINGS)),
        },
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
        assert document["source"]["model"] == ("fine-tuned" if form in ("fine-tuned", "CTC") else "pre-trained")
        found[form] = features(tmp_path / form)
    assert all(torch.equal(value, found["plain"]) for value in found.values())
    written = capsys.readouterr().out
    assert "decoder.embed_tokens.weight and 1 more" in written and "omegaconf" in written
    assert "w2v_encoder.proj.bias and 1 more: letters" in written
    assert "layer_norm_first=True: file" in written and "image_mean=0.421: default of the public code" in written


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in small().state_dict().items()}
    converted = convert(state, SETTINGS)
    assert {value.dtype for value in converted.encoder.parameters()} == {torch.float32}
    norm = converted.encoder.transformer.layer_norm.weight
    assert torch.equal(norm, state["encoder.layer_norm.weight"].float())


def test_weight_norm_keeps_its_kernel() -> None:
    """The kernel is g * v / |v|, the length taken over each position of the window."""
    state = small().state_dict()
    g, v = state["encoder.pos_conv.0.weight_g"], state["encoder.pos_conv.0.weight_v"]
    expected = g * v / v.square().sum((0, 1), keepdim=True).sqrt()
    kernel = convert(state, SETTINGS).encoder.transformer.pos_conv_embed.conv.weight
    torch.testing.assert_close(kernel, expected, rtol=1e-5, atol=1e-6)


def test_missing_unknown_and_misshapen_tensors_are_named() -> None:
    state = small().state_dict()
    without = {name: value for name, value in state.items() if name != "encoder.layers.1.fc2.bias"}
    with pytest.raises(UserError, match=r"lacks encoder\.layers\.1\.fc2\.bias"):
        convert(without, SETTINGS)
    with pytest.raises(UserError, match=r"unknown tensors: encoder\.adapter\.weight"):
        convert(state | {"encoder.adapter.weight": torch.zeros(1)}, SETTINGS)
    with pytest.raises(UserError, match=r"unknown tensors: classifier\.weight"):
        convert(fine_tuned(state) | {"classifier.weight": torch.zeros(1)}, SETTINGS)
    with pytest.raises(UserError, match=r"encoder\.layers\.1\.fc1\.weight has shape \[3, 3\]"):
        convert(state | {"encoder.layers.1.fc1.weight": torch.zeros(3, 3)}, SETTINGS)
    with pytest.raises(UserError, match=r"lacks encoder\.pos_conv"):
        convert({"wav2vec": torch.zeros(1)}, {})
    # CTC's letters are beside the pre-trained model; the same name elsewhere is none of theirs.
    with pytest.raises(UserError, match=r"unknown tensors: encoder\.proj\.weight"):
        convert(fine_tuned(state) | {"encoder.proj.weight": torch.zeros(1)}, SETTINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_first", False),
        ("modality_fuse", "add"),
        ("activation_fn", "relu"),
        ("resnet_relu_type", "relu"),
        ("encoder_attention_heads", 0),
        ("image_std", 0),
        ("image_mean", "${task.mean}"),
        ("image_crop_size", 88.0),
    ],
)
def test_another_architecture_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        convert(small().state_dict(), SETTINGS | {key: value})


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads by width, and layer norms assumed, gave features that were 6 % and 112 % off, and exit code 0."""
    state = small().state_dict()
    heads, norm = {"encoder_attention_heads": 4}, {"layer_norm_first": True}
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({}, [], "does not say encoder_attention_heads and layer_norm_first, .*: give --heads N and --pre-norm"),
        ({"model": {"_name": "av_hubert"} | norm}, [], "does not say encoder_attention_heads,.*: give --heads N if"),
        ({"model": heads}, [], "does not say layer_norm_first, .*: give --pre-norm if"),
        ({"model": norm}, ["--pre-norm"], "does not say encoder_attention_heads"),
        ({}, ["--heads", "4"], "does not say layer_norm_first"),
        ({"model": heads | norm}, ["--heads", "8"], "--heads gives encoder_attention_heads=8, but .* says 4: leave"),
        ({"model": heads | {"layer_norm_first": False}}, ["--pre-norm"], "layer_norm_first is False; only True"),
    ]
    for number, (cfg, options, message) in enumerate(cases):
        path = save(tmp_path / f"{number}.pt", state, cfg=cfg)
        assert main([str(path), "--output", str(tmp_path / "out"), *options]) == 2, message
        error = capsys.readouterr().err
        assert re.search(message, error) and error.strip().count("\n") == 0
        assert not (tmp_path / "out").exists()


def test_options_stand_for_a_file_without_settings(tmp_path: Path) -> None:
    state = small().state_dict()
    options = ["--heads", "4", "--pre-norm"]
    assert main([str(save(tmp_path / "a.pt", state)), "--output", str(tmp_path / "options"), *options]) == 0
    told = save(tmp_path / "b.pt", state, cfg={"model": SETTINGS, "task": {"image_crop_size": 80, "image_std": 0.25}})
    assert main([str(told), "--output", str(tmp_path / "file")]) == 0
    assert main([str(save(tmp_path / "c.pt", state, cfg={"model": SETTINGS})), "--output", str(tmp_path / "c")]) == 0
    assert torch.equal(features(tmp_path / "options"), features(tmp_path / "c"))
    found = {}
    for name in ("options", "file"):
        document = json.loads((tmp_path / name / "config.json").read_text())
        found[name] = {key: (each["value"], each["source"]) for key, each in document["source"]["settings"].items()}
    default = "default of the public code"
    fixed = {"activation_fn": ("gelu", default), "image_mean": (0.421, default)}
    sizes = {"image_crop_size": (88, default), "image_std": (0.165, default)}
    assert found["options"] == {
        "encoder_attention_heads": (4, "option"),
        "layer_norm_first": (True, "option"),
        **(fixed | sizes),
    }
    told_sizes = {"image_crop_size": (80, "file"), "image_std": (0.25, "file")}
    assert found["file"] == {
        "encoder_attention_heads": (4, "file"),
        "layer_norm_first": (True, "file"),
        **(fixed | told_sizes),
    }
    config = json.loads((tmp_path / "file" / "config.json").read_text())["encoder"]
    assert (config["crop"], config["pixel_mean"], config["pixel_std"]) == (80, 0.421, 0.25)


def test_the_pictures_of_a_fine_tuned_model_are_those_that_it_trained_on_last(tmp_path: Path) -> None:
    inner = {"model": SETTINGS, "task": {"image_mean": 0.4, "image_std": 0.2}}
    cfg = {"model": {"w2v_args": inner}, "task": {"image_mean": 0.5, "normalize": True}}
    file = read_fairseq(save(tmp_path / "a.pt", fine_tuned(small().state_dict()), cfg=cfg))
    assert file.settings == SETTINGS | {"image_mean": 0.5, "image_std": 0.2}


def test_heads_of_base_are_the_default_only_where_everything_else_is() -> None:
    """The published Base files name no size; a file that names one, or has another, has to name its heads."""
    base = {"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072}
    assert settle(PUBLISHED, {}, base)["encoder_attention_heads"] == Setting(12, "default of the public code")
    for told, sizes in (
        (PUBLISHED, base | {"encoder_layers": 6}),
        (PUBLISHED, base | {"encoder_embed_dim": 1024}),
        (PUBLISHED | {"encoder_layers": 12}, base),
        ({"layer_norm_first": True}, base),
    ):
        with pytest.raises(UserError, match="does not say encoder_attention_heads"):
            settle(told, {}, sizes)


@pytest.mark.parametrize(("size", "width", "rank"), [("base", 768, 48), ("large", 1024, 64)])
def test_the_documented_lora_is_the_familys(size: str, width: int, rank: int) -> None:
    """Bottleneck of a sixteenth of the width, scale 2, on queries and values (Omni-AVSR)."""
    text = (configs_dir() / "video_encoder" / f"avhubert_{size}.yaml").read_text()
    example = re.sub(r"\n *# *", " ", text)
    example = example[example.index("{rank") : example.index("}", example.index("{rank")) + 1]
    lora = load_config([f"video_encoder=avhubert_{size}", f"video_encoder.lora={example}"]).video_encoder.lora
    assert lora is not None
    encoder = AVHubertEncoder(AVHubertConfig(trunk_widths=(4,), width=width, layers=1, heads=4, ffn_width=8))
    names = attach_lora(encoder, lora.rank, lora.alpha, lora.targets)
    assert sorted(name.rpartition(".")[2] for name in names) == ["q_proj", "v_proj"]
    for layer in lora_layers(encoder).values():
        assert layer.scale == 2.0 and layer.lora_a.shape == (rank, width) and layer.lora_b.shape == (width, rank)


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
    torch.load(inert, weights_only=False)  # unsafe on purpose, of a file that this test made
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
    assert main([str(path), "--output", str(tmp_path / "out"), "--heads", "4", "--pre-norm"]) == 2
    assert "replaces nothing" in capsys.readouterr().err
    assert main([str(path), "--heads", "4", "--pre-norm"]) == 2
    assert "no published size" in capsys.readouterr().err
