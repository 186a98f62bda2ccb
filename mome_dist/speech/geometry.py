"""Names of the ways in which a mouth lies in its crop: how large, how turned, where.

A video encoder reads one of them: mouths of another size are pictures that it never saw, and nothing but worse words
would tell. So a corpus says in its manifest which geometry its crops have, an encoder in its ``config.json`` which one
it was trained on, and a run or an evaluation of the two compares the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.text_files import read_json

# The recipe of AV-HuBERT and auto_avsr, which the published lip readers share: `mome_dist.data.preparation.mouth`.
AVHUBERT = "avhubert"
# The drawn mouths of the synthetic corpus (`mome_dist.data.synthetic.render`), which are about a sixth larger.
RENDERED = "rendered"

GEOMETRIES = (AVHUBERT, RENDERED)

# What encoders were trained on whose files were written before these named it, by the formats of then.
_UNNAMED = {"mome_dist.avhubert/1": AVHUBERT, "mome_dist.video_encoder/1": RENDERED}


def geometry_of(document: Mapping[str, Any]) -> str | None:
    """The geometry that the encoder of a ``config.json`` expects; None where it cannot be told."""
    named = document.get("geometry", _UNNAMED.get(str(document.get("format"))))
    return None if named is None else str(named)


def expected_geometry(encoder: str | Path) -> str | None:
    """The geometry of crops that the video encoder of a directory expects; None where its format is not known.

    Raises:
        UserError: its ``config.json`` cannot be read.
    """
    path = Path(encoder) / "config.json"
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object. Make the encoder again.")
    return geometry_of(document)
