"""FLOPs that a step needs: what a model FLOPs utilisation counts (MFU; PaLM, arXiv 2204.02311, appendix B).

Needed are products only, each once: nothing that is computed again, no expert that a token did not choose, no key that
a token does not see. Frozen weights have two products (forward, and the gradient of their input), trained ones three.
"""

from __future__ import annotations

from mome_dist.llm.shape import LLMShape
from mome_dist.planning.job import Job

FROZEN, TRAINED = 2, 3  # products of a map, forward and backward
OUTPUT_PRODUCTS = 2 * FROZEN  # FLOPs for each logit and hidden value of the frozen output layer


def frozen_flops(shape: LLMShape, tokens: float) -> float:
    """FLOPs of the maps of one frozen layer, forward and backward."""
    return 2 * FROZEN * tokens * shape.layer_parameters


def attention_flops(shape: LLMShape, length: int, tokens: float, causal: bool) -> float:
    """FLOPs of scores and weighted sums of one layer, forward and backward, for tokens in sequences of a length.

    Args:
        causal: whether keys behind a token are left out; else they are computed, and then masked.
    """
    flops = 2 * 2 * TRAINED * tokens * length * shape.heads * shape.head_size
    return flops / 2 if causal else flops


def step_flops(job: Job) -> dict[str, float]:
    """FLOPs of a step of the whole job by part: "llm", its low-rank "terms", "experts" with their router, "encoders".

    Projectors are left out: they are less than a hundredth of the LLM's, and by how much depends on the clips' streams.
    """
    shape = job.shape
    llm = terms = experts = 0.0
    for length, share in zip(job.lengths, job.shares, strict=True):
        tokens = length * job.batch_size * share
        layer = frozen_flops(shape, tokens) + attention_flops(shape, length, tokens, causal=True)
        outputs = OUTPUT_PRODUCTS * job.labels * job.batch_size * share * shape.vocabulary * shape.hidden_size
        llm += shape.layers * layer + outputs
        if job.terms is not None:
            one = job.terms.rank * (2 * shape.hidden_size + job.term_widths)
            terms += shape.layers * 2 * TRAINED * tokens * len(job.terms.kinds) * one
        used = job.passes * (job.token_macs + job.common_parameters)  # weights for a token
        used += job.router.active_parameters(shape.hidden_size, job.experts) if job.experts else 0
        experts += shape.layers * 2 * TRAINED * tokens * used
    encoders = sum(
        job.batch_size
        * each.share
        * (each.shape.front_flops(each.seconds) + each.shape.transformer.flops(each.shape.frames(each.seconds)))
        for each in job.encoders
    )
    return {"llm": llm, "terms": terms, "experts": experts, "encoders": encoders}
