"""A published AV-HuBERT, of any size, put together from plain torch modules: its names, its shapes, its arithmetic.

It shares no code with `mome_dist.speech`: 3-D convolution, BatchNorm and pooling, torch's multi-head attention, the old
weight normalisation. ``state_dict()`` has the names of the published files.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUNK = (64, 128, 256, 512)
CLUSTERS = 20  # of pre-training; 2,000 in the published models
PRETRAINING = ("label_embs_concat", "final_proj.weight", "final_proj.bias")  # what fine-tuning leaves out


class Block(nn.Module):
    """A block of ResNet-18 with PReLU."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(out), nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out), nn.PReLU(out)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        beside = self.downsample(x) if hasattr(self, "downsample") else x
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + beside)


class Part(nn.Module):
    """Named children and nothing else."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def _layer(width: int, ffn: int) -> Part:
    projections = {name: nn.Linear(width, width) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    return Part(
        self_attn=Part(**projections),
        self_attn_layer_norm=nn.LayerNorm(width),
        fc1=nn.Linear(width, ffn),
        fc2=nn.Linear(ffn, width),
        final_layer_norm=nn.LayerNorm(width),
    )


class Published(nn.Module):
    """The pre-trained model."""

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn: int = 3072,
        trunk: tuple[int, ...] = TRUNK,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.mask_emb = nn.Parameter(torch.empty(width))
        self.label_embs_concat = nn.Parameter(torch.empty(CLUSTERS, 256))
        self.final_proj = nn.Linear(width, 256)
        first = trunk[0]
        front = nn.Sequential(
            nn.Conv3d(1, first, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(first),
            nn.PReLU(first),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        stages, channels = {}, first
        for number, out in enumerate(trunk, 1):
            stages[f"layer{number}"] = nn.Sequential(Block(channels, out, 1 if number == 1 else 2), Block(out, out, 1))
            channels = out
        self.feature_extractor_video = Part(
            resnet=Part(frontend3D=front, trunk=Part(**stages)), proj=nn.Linear(channels, width)
        )
        self.feature_extractor_audio = Part(proj=nn.Linear(104, width))
        self.layer_norm = nn.LayerNorm(2 * width)
        self.post_extract_proj = nn.Linear(2 * width, width)
        position = nn.Conv1d(width, width, 128, padding=64, groups=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old form has the names of the published files
            nn.utils.weight_norm(position, dim=2)
        self.encoder = Part(
            pos_conv=nn.Sequential(position),
            layers=nn.ModuleList([_layer(width, ffn) for _ in range(layers)]),
            layer_norm=nn.LayerNorm(width),
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Features [T, width] of one normalised clip [T, 88, 88], without audio."""
        resnet = self.feature_extractor_video.resnet
        x = resnet.frontend3D(clip[None, None])[0].transpose(0, 1)
        for stage in resnet.trunk.children():
            x = stage(x)
        video = self.feature_extractor_video.proj(F.adaptive_avg_pool2d(x, 1).flatten(1))
        x = self.post_extract_proj(self.layer_norm(torch.cat([torch.zeros_like(video), video], dim=1)))
        x = x + F.gelu(self.encoder.pos_conv(x.t()[None])[0, :, :-1]).t()
        for layer in self.encoder.layers:
            x = x + self._attention(layer.self_attn, layer.self_attn_layer_norm(x))
            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
        return self.encoder.layer_norm(x)

    def _attention(self, part: Part, x: Tensor) -> Tensor:
        attention = nn.MultiheadAttention(x.shape[1], self.heads, batch_first=True)
        projections = [getattr(part, name) for name in ("q_proj", "k_proj", "v_proj")]
        weights = {
            "in_proj_weight": torch.cat([each.weight for each in projections]),
            "in_proj_bias": torch.cat([each.bias for each in projections]),
            "out_proj.weight": part.out_proj.weight,
            "out_proj.bias": part.out_proj.bias,
        }
        attention.load_state_dict(weights)
        return attention.eval()(x[None], x[None], x[None], need_weights=False)[0][0]


@torch.no_grad()
def small(seed: int = 0) -> Published:
    """Random weights, and statistics and slopes that are not the initial ones; seconds to run."""
    torch.manual_seed(seed)
    model = Published(width=32, layers=2, heads=4, ffn=64, trunk=(4, 8, 8, 16))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand_like(value) if name.endswith("running_var") else 0.3 * torch.randn_like(value))
    return model.eval()


def fine_tuned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a fine-tuned model that holds this pre-trained one, and a text decoder."""
    inside = {f"encoder.w2v_model.{name}": value for name, value in state.items() if name not in PRETRAINING}
    return inside | {"decoder.embed_tokens.weight": torch.zeros(10, 4), "decoder.layers.0.fc1.bias": torch.zeros(4)}


def fine_tuned_ctc(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Likewise of a model that was fine-tuned with CTC: letters of the features."""
    inside = {f"w2v_encoder.w2v_model.{name}": value for name, value in state.items() if name not in PRETRAINING}
    return inside | {"w2v_encoder.proj.weight": torch.zeros(10, 4), "w2v_encoder.proj.bias": torch.zeros(10)}
