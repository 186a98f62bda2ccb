"""The part of `benchmarks.moe_layer` that runs on every rank: measures all cases of one number of processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks.layer_options import TOP_K, add_case_options
from benchmarks.results import rank_arguments
from mome_dist.quiet import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case and let rank 0 write the figures."""
    options = rank_arguments(__doc__, add_case_options, arguments)
    quiet_libraries()
    import torch

    from benchmarks.layer_candidates import LayerShape
    from benchmarks.layer_cases import measure_case
    from benchmarks.measuring import machine
    from mome_dist.files import write_json
    from mome_dist.parallel.initialize import parallel_world
    from mome_dist.parallel.layout import Layout

    torch.set_num_threads(1)  # also a process alone: what differs between worlds is what travels
    ranks = int(os.environ["WORLD_SIZE"])
    with parallel_world(Layout.for_world(ranks, tp=1, pp=1, ep=ranks), 0, timeout_seconds=600) as at:
        described = machine()
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
        cases = [
            measure_case(LayerShape(hidden, experts + -experts % ranks, TOP_K, bottleneck), at.ep, options)
            for hidden, bottleneck, experts in shapes
        ]
        if os.environ["RANK"] == "0":
            write_json(options.figures, {"machine": described, "cases": cases})


if __name__ == "__main__":
    main()
