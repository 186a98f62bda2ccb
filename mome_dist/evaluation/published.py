"""Word error rates that were published, to stand beside one's own.

They compare only where corpus, task and rates are the same, and even then encoders, LLM and training data may differ:
the tables say whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MOME = "MoME, arXiv 2510.04136"
MTSK = "Llama-MTSK, arXiv 2503.06362"
OMNI = "Omni-AVSR, arXiv 2511.07253"
CORPORA = {"lrs2": "LRS2", "lrs3": "LRS3"}
_PAIRS = ("avsr(4,2)", "avsr(4,5)", "avsr(16,2)", "avsr(16,5)")


@dataclass(frozen=True)
class Published:
    """One line of a published table: WER in percent by view, clean speech."""

    method: str
    corpus: str
    paper: str
    wer: Mapping[str, float]


def _pairs(method: str, corpus: str, paper: str, *wer: float) -> Published:
    return Published(method, corpus, paper, dict(zip(_PAIRS, wer, strict=True)))


PUBLISHED = (
    _pairs("Llama-AVSR, one model a pair", "LRS2", MOME, 4.1, 4.5, 5.3, 8.1),
    _pairs("Llama-MTSK SS", "LRS2", MOME, 3.4, 4.7, 4.8, 6.4),
    _pairs("Llama-MTSK MSS", "LRS2", MOME, 3.6, 4.8, 6.1, 9.0),
    _pairs("MoME-23/4-MHSA", "LRS2", MOME, 2.9, 3.0, 4.2, 4.3),
    _pairs("MoME-23/4-LAYER", "LRS2", MOME, 2.7, 2.7, 4.2, 4.2),
    _pairs("Llama-AVSR, one model a pair", "LRS3", MOME, 2.4, 2.8, 3.3, 4.1),
    _pairs("Llama-MTSK SS", "LRS3", MOME, 2.3, 2.2, 3.3, 3.6),
    _pairs("Llama-MTSK MSS", "LRS3", MOME, 2.4, 2.4, 3.2, 3.5),
    _pairs("MoME-23/4-MHSA", "LRS3", MOME, 1.8, 1.7, 2.9, 2.9),
    _pairs("MoME-23/4-LAYER", "LRS3", MOME, 1.5, 1.8, 3.1, 3.2),
    _pairs("Llama-MTSK MS, Llama 3.1 8B", "LRS3", MTSK, 1.0, 1.1, 1.5, 1.6),
    _pairs("Llama-MTSK SS, Llama 3.1 8B", "LRS3", MTSK, 0.9, 1.0, 1.7, 1.8),
    _pairs("Llama-MTSK MSS, Llama 3.1 8B", "LRS3", MTSK, 1.2, 1.0, 1.5, 1.6),
    _pairs("Llama-AVSR, run again", "LRS3", OMNI, 1.1, 1.2, 2.0, 2.1),
    _pairs("Llama-MTSK, run again", "LRS3", OMNI, 1.0, 1.0, 1.9, 2.0),
    Published(
        "Omni-AVSR ST",
        "LRS3",
        OMNI,
        {
            "asr(4)": 1.2,
            "asr(16)": 2.0,
            "vsr(2)": 26.8,
            "vsr(5)": 27.1,
            **dict(zip(_PAIRS, (1.0, 1.1, 1.8, 1.9), strict=True)),
        },
    ),
)


def corpus_of(name: str) -> str | None:
    """The published corpus that a corpus of this name is; None for any other."""
    return CORPORA.get(name.lower())
