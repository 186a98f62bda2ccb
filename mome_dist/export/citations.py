"""Which papers the parts of a run are from: what a model card cites."""

from __future__ import annotations

from mome_dist.adapters.terms import RATES, TASK
from mome_dist.config.schema import RunConfig

_PAPERS = {
    "MoME": ("MoME: Mixture of Matryoshka Experts for Audio-Visual Speech Recognition", "2510.04136"),
    "LoRAMoE": ("LoRAMoE, a router between low-rank experts of a language model", "2312.09979"),
    "Llama-AVSR": ("Llama-AVSR, LoRA of a language model that reads speech and lips", "2409.12319"),
    "Llama-MTSK": ("Llama-MTSK, low-rank terms for each pair of rates", "2503.06362"),
    "Llama-SMoP": ("Llama-SMoP, sparse mixtures of projectors", "2505.14336"),
    "Omni-AVSR": ("Omni-AVSR, one model of all tasks at drawn rates", "2511.07253"),
}


def citations(config: RunConfig) -> list[str]:
    """The papers of what trains in a run, a line of Markdown each; none where only projectors do."""
    lora, parts = config.llm.lora, list[str]()
    terms = [] if lora is None else lora.terms
    if config.mome.experts:
        parts += ["MoME", *(["LoRAMoE"] if config.mome.inside else [])]
    if lora is not None:
        parts.append("Llama-AVSR")
    if RATES in terms:
        parts.append("Llama-MTSK")
    if config.projector.mixture is not None:
        parts.append("Llama-SMoP")
    if TASK in terms or config.task.sampling == "rates":
        parts.append("Omni-AVSR")
    return [
        f"{title}, [arXiv {number}](https://arxiv.org/abs/{number})."
        for title, number in (_PAPERS[part] for part in parts)
    ]
