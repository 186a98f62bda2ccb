"""What changes AV-HuBERT's features and no tensor tells: said by the checkpoint, by an option, or asked for.

Sizes, the kind of fusion, PReLU and the normalisation of the positional convolution show in the tensors' names and
shapes. Dropouts, masking and layer drop act while training only; ``normalize`` and ``stack_order_audio`` are of the
audio stream, which is absent. That leaves the settings below.

fairseq stores the keys that the configuration of a training named, and fills in the defaults of its classes whenever it
loads a file. No published configuration names the activation or the pixels' statistics, and those of Base leave out all
sizes, so there the defaults of the public classes are what the file means (facebookresearch/av_hubert, classes
AVHubertConfig and AVHubertPretrainingConfig). Other sizes, and the order of the layer norms, are named in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mome_dist.errors import UserError

HEADS, PRE_NORM = "encoder_attention_heads", "layer_norm_first"
OPTIONS = {HEADS: "--heads N", PRE_NORM: "--pre-norm"}

# Defaults of the public classes.
DEFAULTS = {"activation_fn": "gelu", "image_crop_size": 88, "image_mean": 0.421, "image_std": 0.165}
BASE_SIZES = {"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072}
BASE_HEADS = 12

# Settings of which one value is implemented. All but the first two show in the tensors too.
SUPPORTED = {
    PRE_NORM: True,
    "activation_fn": "gelu",
    "modality_fuse": "concat",
    "resnet_relu_type": "prelu",
    "conv_pos_batch_norm": False,
    "layer_type": "transformer",
}


@dataclass(frozen=True)
class Setting:
    """A value and where it is from: "file", "option" or "default of the public code"."""

    value: Any
    source: str


def settle(told: Mapping[str, Any], given: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Setting]:
    """The settings that no tensor tells, by fairseq's keys.

    Args:
        told: by the checkpoint.
        given: by the user; None is not given.
        sizes: of the Transformer, as the tensors have them, by the keys of `BASE_SIZES`.

    Raises:
        UserError: if a setting is neither told nor given, is both and differs, or is not supported.
    """
    told = {key: value for key, value in told.items() if value is not None}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in SUPPORTED.items():
        if told.get(key, value) != value:
            raise UserError(f"The checkpoint's setting {key} is {told[key]!r}; only {value!r} is supported.")
    for key, value in given.items():
        if told.get(key, value) != value:
            raise UserError(
                f"{OPTIONS[key].partition(' ')[0]} gives {key}={value!r}, but the checkpoint says {told[key]!r}: leave "
                "the option out."
            )
    defaults: dict[str, Any] = dict(DEFAULTS)
    # A file of fairseq's that names none of its sizes has the class's own; its tensors confirm the others.
    if told.get("_name") == "av_hubert" and not BASE_SIZES.keys() & told.keys() and sizes == BASE_SIZES:
        defaults[HEADS] = BASE_HEADS
    found = {key: Setting(value, "default of the public code") for key, value in defaults.items()}
    found |= {key: Setting(value, "option") for key, value in given.items()}
    found |= {key: Setting(told[key], "file") for key in (*OPTIONS, *DEFAULTS) if key in told}
    missing = [key for key in OPTIONS if key not in found]
    if missing:
        raise UserError(
            f"The checkpoint does not say {' and '.join(missing)}, which no tensor tells and every feature depends on: "
            f"give {' and '.join(OPTIONS[key] for key in missing)} if you know "
            f"{'them' if missing[1:] else 'it'} (published: 12 heads in Base, 16 in Large; all are pre-norm)."
        )
    settings = {key: found[key] for key in (*OPTIONS, *DEFAULTS)}
    _check_numbers({key: setting.value for key, setting in settings.items()})
    return settings


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raise UserError for a value that is no number of the right kind."""
    for key in (HEADS, "image_crop_size"):
        if type(values[key]) is not int or values[key] < 1:  # a bool is an int, but no number
            raise UserError(f"{key}={values[key]!r}: must be a whole number above 0.")
    for key, least in (("image_mean", -math.inf), ("image_std", 0.0)):
        if type(values[key]) not in (int, float) or not least < values[key] < math.inf:
            raise UserError(f"{key}={values[key]!r}: must be a finite number{' above 0' if least == 0 else ''}.")
