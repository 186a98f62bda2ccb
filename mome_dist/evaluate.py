"""Command: word error rates of a trained model, in any views and conditions, with intervals and costs.

    mome-dist evaluate runs/quickstart
    mome-dist evaluate runs/quickstart 'rates=[asr(4),avsr(16,5)]' split=test baselines=[chance,untrained]
    mome-dist evaluate runs/quickstart noise=[clean,babble] snr=[-5,0,5,10] video_corruption=[none,blur]
    mome-dist evaluate runs/quickstart select=best compare=runs/other
    mome-dist launch --nproc 2 evaluate runs/quickstart

The first argument (or checkpoint=DIR) is a run, one checkpoint of it, or an export (`mome-dist export`), which needs
output=DIR. select is latest, best (lowest validation loss) or average:N. Rates that were not trained need
untrained_rates=true. noise names "clean", "babble" and directories of recordings; video_corruption "none", occlusion,
blur, missing_frames and missing_video, each with or without :severity. Further keys: corpus, limit, output, seed;
num_beams, max_new_tokens, tokens_per_second, length_penalty, static_cache, batch_size, device_map and precision (bf16,
fp32) of decoding; llm, audio_encoder, video_encoder for frozen models that moved. Results go to ``evaluation/`` in the
run directory: ``results.json``, ``results.md``, ``hypotheses.jsonl``, ``noise.jsonl`` and ``activations.safetensors``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mome_dist.cli import main_guard
from mome_dist.evaluation.checks import check_request
from mome_dist.evaluation.request import EvaluationRequest, parse_request
from mome_dist.quiet import quiet_libraries


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``key=value`` arguments, then evaluate on every rank; nothing heavy is imported before they are right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) in (["-h"], ["--help"]):
        print(__doc__)
        return
    request = parse_request(EvaluationRequest, arguments)
    check_request(request)

    quiet_libraries()
    from rich.console import Console

    from mome_dist.evaluation.command import evaluate
    from mome_dist.evaluation.world import join_world

    with join_world(request.timeout_seconds) as world:
        evaluate(request, world, Console(quiet=world.rank > 0))


if __name__ == "__main__":
    sys.exit(main())
