"""What was run on a GPU and what was not, as benchmarks/README.md tells it.

python -m benchmarks.gpu.told          writes that part of the page anew from benchmarks/results/gpu_*.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import decode, encoders, layer, profile, step
from benchmarks.results import RESULTS
from mome_dist.cli import main_guard
from mome_dist.errors import UserError

MODULES: dict[str, Any] = {
    "step": step,
    "layer": layer,
    "profile": profile,
    "encoders": encoders,
    "decode": decode,
}
PAGE = RESULTS.parent / "README.md"
PART = re.compile(r"(?<=<!-- written by benchmarks\.gpu\.told -->\n).*?(?=<!-- end -->)", re.DOTALL)
FACTS = ("GPU", "driver", "CUDA", "torch")
NOTHING = "None of these was run on a GPU yet: nothing is known but that they run, and what they aim at.\n"


def told(results: Path) -> str:
    """Markdown: the GPU and what was found on it of every benchmark that has results, and the names of the others.

    Raises:
        UserError: for results that come from no GPU, or from a rehearsal.
    """
    found = {name: results / f"gpu_{name}.json" for name in MODULES}
    lines = []
    for name, path in found.items():
        if not path.is_file():
            continue
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "GPU" not in stored["machine"] or "--tiny" in stored["command"].split():
            raise UserError(f"{path} comes from a rehearsal or no GPU: leave it out of {results.name}/.")
        machine = ", ".join(f"{fact} {stored['machine'][fact]}" for fact in FACTS)
        lines += [f"**{name}** ([table](results/{path.stem}.md)), on {machine}:", ""]
        lines += [*MODULES[name].summary(stored["figures"]), ""]
    missing = [name for name, path in found.items() if not path.is_file()]
    if not lines:
        return NOTHING
    if missing:
        lines.append(f"Not run on a GPU yet: {', '.join(missing)}.")
    return "\n".join(lines).rstrip() + "\n"


@main_guard
def main() -> None:
    """Write the part of the page."""
    part = told(RESULTS)
    PAGE.write_text(PART.sub(lambda _: part, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
