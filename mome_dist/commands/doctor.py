"""What works here: versions, devices, places, models, and what is missing for which command.

    mome-dist doctor
    mome-dist doctor --json > doctor.json      for a report of a problem: it holds no token

The exit code is 1 if something is broken, and 0 if all that could be found is something that may be added.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mome_dist.cli import Parser, command_parser, main_guard

_WIDTH = 26  # of names


def command_line() -> Parser:
    """Its options."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a page")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Look and tell; 1 if something is broken."""
    options = command_line().parse_args(arguments)
    from mome_dist.diagnosis.facts import Facts, find_facts
    from mome_dist.diagnosis.findings import Finding, judge
    from mome_dist.quiet import quiet_libraries

    quiet_libraries()
    facts: Facts = find_facts()
    findings: list[Finding] = judge(facts)
    broken = any(finding.broken for finding in findings)
    if options.json:
        print(json.dumps({**facts.as_json(), "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(broken)
    print("\n".join(_page(facts.as_json())))
    for title, faults in (("Broken", True), ("Not here", False)):
        told = [finding for finding in findings if finding.broken is faults]
        if told:
            print(f"\n{title}")
        for finding in told:
            print(f"  {finding.what}\n    for: {finding.commands}\n    fix: {finding.fix}")
    print("\nSomething is broken." if broken else "\nNothing is broken.")
    return int(broken)


def _page(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts in sections of aligned lines."""
    torch, cpu, memory = facts["torch"], facts["cpu"], facts["memory"]
    yield from _section("Versions", facts["versions"].items())
    yield from _section("Packages", facts["packages"].items())
    yield from _section("Optional packages", facts["optional"].items())
    driver = facts["driver_gpus"]
    devices = [f"{each['name']}, {each['memory_gb']} GB, compute {each['capability']}" for each in facts["devices"]]
    yield from _section(
        "Devices",
        [
            ("torch was built for", torch.get("build", torch.get("error"))),
            ("GPUs of the driver", driver if isinstance(driver, str) else len(driver)),
            *((f"GPU {number}", device) for number, device in enumerate(devices)),
            ("NCCL", torch.get("nccl")),
            ("gloo", torch.get("gloo")),
            ("Apex", facts["apex"]),
            ("CPU", f"{cpu['model']}, {cpu['cores']} cores"),
            ("bf16 products of the CPU", cpu["bf16"]),
            ("memory", f"{memory['free_gb']} of {memory['total_gb']} GB free" if memory else None),
        ],
    )
    places = {
        name: f"{place['path']}: {'writable' if place['writable'] else 'not writable'}, {place['free_gb']} GB free"
        f"{'' if place['exists'] else ' (does not exist yet)'}"
        for name, place in facts["places"].items()
    }
    yield from _section("Places", places.items())
    yield from _section("Models and corpora", facts["models"].items())
    yield from _section("Programs", facts["programs"].items())
    yield from _section("Slurm", facts["slurm"].items())
    yield from _section("Environment", facts["environment"].items())


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> Iterator[str]:
    yield f"\n{title}"
    for name, value in rows:
        if isinstance(value, bool):
            value = "yes" if value else "no"
        yield f"  {name:<{_WIDTH}}{'-' if value is None else value}"


if __name__ == "__main__":
    sys.exit(main())
