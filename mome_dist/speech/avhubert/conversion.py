"""From the names of the published AV-HuBERT checkpoints to those of `AVHubertEncoder`.

Every tensor of a checkpoint is accounted for: it becomes one of ours, or it is on the list of what is dropped, with the
reason. Anything else, and anything that is missing, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.avhubert.model import AVHubertEncoder
from mome_dist.speech.avhubert.settings import HEADS, Setting, settle

# A fine-tuned model holds the pre-trained one under a name: with a text decoder, or with CTC.
FINE_TUNED_PREFIXES = ("encoder.w2v_model.", "w2v_encoder.w2v_model.")

# What is dropped (by the names after the prefix), and why.
DROPPED = {
    r"mask_emb": "the embedding of masked frames: pre-training only",
    r"label_embs_concat": "embeddings of the clusters: pre-training only",
    r"(final_proj|target_glu)\..*": "prediction of the clusters: pre-training only",
    r"feature_extractor_audio\..*": "the audio front end: the audio stream is absent, its vector is zero",
    r".*\.num_batches_tracked": "how many batches trained a BatchNorm: not used in eval mode",
}
# Likewise for names outside the prefix of a fine-tuned model.
DROPPED_BESIDE = {
    r"decoder\..*": "the text decoder of a fine-tuned model: an LLM takes its place",
    r"w2v_encoder\.proj\..*": "letters from features (CTC): an LLM takes its place",
}

_TRUNK = "feature_extractor_video.resnet.trunk"
_STEM = "feature_extractor_video.resnet.frontend3D"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Converted:
    """An encoder and what became of the checkpoint.

    Attributes:
        encoder: frozen, fp32.
        fine_tuned: whether the checkpoint is of a fine-tuned model.
        dropped: names that were left out, with the reason.
        settings: what no tensor tells, and where each is from.
    """

    encoder: AVHubertEncoder
    fine_tuned: bool
    dropped: dict[str, str]
    settings: dict[str, Setting]


def convert(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> Converted:
    """Make an encoder of a published checkpoint.

    Args:
        tensors: of the checkpoint, by name.
        told: settings of the pre-trained model, as far as the checkpoint tells them (``encoder_attention_heads``,
            ``layer_norm_first``, ...).
        given: the same that the user gives, for a checkpoint that does not tell them.

    Raises:
        UserError: naming tensors that are missing, unknown or of a wrong shape, or a setting that is neither told nor
            given, or not supported.
    """
    prefix = next((each for each in FINE_TUNED_PREFIXES if any(name.startswith(each) for name in tensors)), "")
    beside = {name for name in tensors if not name.startswith(prefix)}
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name not in beside}
    config, settings = shape_of(inside, told, given or {})
    names = names_of(config)
    dropped = {name: reason for name in sorted(inside) if (reason := _reason(name, DROPPED)) is not None}
    dropped |= {name: reason for name in sorted(beside) if (reason := _reason(name, DROPPED_BESIDE)) is not None}
    missing = sorted(set(names.values()) - inside.keys())
    unknown = sorted((inside.keys() | beside) - set(names.values()) - dropped.keys())
    for what, found in (("lacks", missing), ("holds unknown tensors:", unknown)):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UserError(
                f"The checkpoint {what} {', '.join(found[:5])}{more}: it is no AV-HuBERT of the published form."
            )
    with torch.device("meta"):
        encoder = AVHubertEncoder(config)
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = inside[theirs]
        if ours == "front_end.video.stem.weight":
            value = value.squeeze(1)  # one input channel: see `neighbourhoods`
        if value.shape != shapes[ours]:
            raise UserError(
                f"The checkpoint's {theirs} has shape {list(inside[theirs].shape)}; {ours} needs {list(shapes[ours])}."
            )
        weights[ours] = value.float().contiguous()
    counters = {name: torch.zeros((), dtype=torch.long) for name in shapes if name.endswith("num_batches_tracked")}
    encoder.load_state_dict(weights | counters, assign=True)
    return Converted(encoder.freeze(), bool(prefix), dropped, settings)


def shape_of(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[AVHubertConfig, dict[str, Setting]]:
    """The shape of a checkpoint, and what of it no tensor tells (`mome_dist.speech.avhubert.settings`).

    Raises:
        UserError: if a tensor or setting that tells it is missing, or the sizes do not fit each other.
    """
    try:
        kernel = tensors["encoder.pos_conv.0.weight_v"].shape
        stem = tensors[f"{_STEM}.0.weight"].shape
        stages = _count(tensors, rf"{re.escape(_TRUNK)}\.layer(\d+)\.")
        trunk_widths = tuple(tensors[f"{_TRUNK}.layer{n + 1}.0.conv1.weight"].shape[0] for n in range(stages))
        width = tensors["post_extract_proj.weight"].shape[0]
        ffn_width = tensors["encoder.layers.0.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"The checkpoint lacks {error.args[0]}: it is no AV-HuBERT of the published form.") from error
    layers = 1 + _count(tensors, r"encoder\.layers\.(\d+)\.")
    sizes = {"encoder_layers": layers, "encoder_embed_dim": width, "encoder_ffn_embed_dim": ffn_width}
    settings = settle(told, given, sizes)
    config = AVHubertConfig(
        crop=settings["image_crop_size"].value,
        pixel_mean=settings["image_mean"].value,
        pixel_std=settings["image_std"].value,
        stem_frames=stem[2],
        stem_kernel=stem[3],
        trunk_widths=trunk_widths,
        trunk_blocks=1 + _count(tensors, rf"{re.escape(_TRUNK)}\.layer1\.(\d+)\."),
        width=width,
        layers=layers,
        heads=settings[HEADS].value,
        ffn_width=ffn_width,
        position_kernel=kernel[2],
        position_groups=kernel[0] // kernel[1],
    )
    return config, settings


def names_of(config: AVHubertConfig) -> dict[str, str]:
    """The published name of every tensor of an `AVHubertEncoder`, BatchNorm counters left out, by our name."""
    names = {
        "front_end.video.stem.weight": f"{_STEM}.0.weight",
        **_pairs("front_end.video.stem_norm", f"{_STEM}.1", _BATCH_NORM),
        "front_end.video.stem_activation.weight": f"{_STEM}.2.weight",
        **_pairs("front_end.video.projection", "feature_extractor_video.proj"),
        **_pairs("front_end.fusion_norm", "layer_norm"),
        **_pairs("front_end.fusion", "post_extract_proj"),
        **_pairs("transformer.layer_norm", "encoder.layer_norm"),
        "transformer.pos_conv_embed.conv.bias": "encoder.pos_conv.0.bias",
        # Weight normalisation: the length (g) and the direction (v) of the kernel at each position.
        "transformer.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
        "transformer.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
    }
    for stage in range(len(config.trunk_widths)):
        for block in range(config.trunk_blocks):
            ours, theirs = f"front_end.video.stages.{stage}.{block}", f"{_TRUNK}.layer{stage + 1}.{block}"
            for number in (1, 2):
                names[f"{ours}.conv{number}.weight"] = f"{theirs}.conv{number}.weight"
                names[f"{ours}.activation{number}.weight"] = f"{theirs}.relu{number}.weight"
                names |= _pairs(f"{ours}.norm{number}", f"{theirs}.bn{number}", _BATCH_NORM)
            if stage > 0 and block == 0:
                names[f"{ours}.shortcut.0.weight"] = f"{theirs}.downsample.0.weight"
                names |= _pairs(f"{ours}.shortcut.1", f"{theirs}.downsample.1", _BATCH_NORM)
    for layer in range(config.layers):
        ours, theirs = f"transformer.layers.{layer}", f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= _pairs(f"{ours}.attention.{projection}", f"{theirs}.self_attn.{projection}")
        names |= _pairs(f"{ours}.layer_norm", f"{theirs}.self_attn_layer_norm")
        names |= _pairs(f"{ours}.feed_forward.intermediate_dense", f"{theirs}.fc1")
        names |= _pairs(f"{ours}.feed_forward.output_dense", f"{theirs}.fc2")
        names |= _pairs(f"{ours}.final_layer_norm", f"{theirs}.final_layer_norm")
    return names


def _pairs(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight", "bias")) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """The highest number that the names have where the pattern's group is; -1 if no name fits."""
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def _reason(name: str, dropped: Mapping[str, str]) -> str | None:
    return next((reason for pattern, reason in dropped.items() if re.fullmatch(pattern, name)), None)
