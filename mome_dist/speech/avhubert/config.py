"""The shape of an AV-HuBERT."""

from __future__ import annotations

from dataclasses import dataclass

from mome_dist.errors import UserError


@dataclass(frozen=True)
class AVHubertConfig:
    """Shape of an `AVHubertEncoder`; the defaults are the paper's Base model.

    Large is ``width=1024, layers=24, heads=16, ffn_width=4096``.

    Attributes:
        crop: side in pixels of the square cut from the centre of each frame.
        pixel_mean, pixel_std: statistics of grey values in [0, 1].
        stem_frames: neighbouring frames that the 3-D stem sees; odd.
        stem_kernel: side of the stem's window in pixels; odd.
        trunk_widths: channels of the stem and of the ResNet's stages; the first stage keeps the size of the picture,
            each further one halves it.
        trunk_blocks: residual blocks in each stage (2: ResNet-18).
        width: size of the Transformer and of the output features.
        layers, heads, ffn_width: the Transformer.
        position_kernel, position_groups: the convolutional positional embedding.
        dropout: in the Transformer, while training.
    """

    crop: int = 88
    pixel_mean: float = 0.421
    pixel_std: float = 0.165
    stem_frames: int = 5
    stem_kernel: int = 7
    trunk_widths: tuple[int, ...] = (64, 128, 256, 512)
    trunk_blocks: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_width: int = 3072
    position_kernel: int = 128
    position_groups: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check that the sizes fit each other; raises UserError."""
        object.__setattr__(self, "trunk_widths", tuple(self.trunk_widths))
        if self.stem_frames % 2 == 0 or self.stem_kernel % 2 == 0:
            raise UserError("AV-HuBERT: stem_frames and stem_kernel must be odd, to have a middle.")
        if self.width % self.heads or self.width % self.position_groups:
            raise UserError(
                f"AV-HuBERT: width={self.width} must be a multiple of heads={self.heads} and of "
                f"position_groups={self.position_groups}."
            )
