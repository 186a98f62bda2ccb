"""Several runs on one page: what their configurations differ in, how they went, and how well each recognises.

The first run is what the others are compared with: word error rates on the same utterances, with the interval of the
difference (`mome_dist.evaluation.comparison`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.evaluation.comparison import Texts, compare, read_texts
from mome_dist.evaluation.condition_plots import differences_figure
from mome_dist.evaluation.page import shown, write_page
from mome_dist.evaluation.plots import losses_figure
from mome_dist.evaluation.results import HYPOTHESES
from mome_dist.evaluation.run_files import RunFiles
from mome_dist.evaluation.run_summary import progress_rows
from mome_dist.evaluation.tables import comparison_columns, markdown, plain

_KEY = "key"
_OWN = ("name", "output_dir")  # keys that differ between any two runs


def write_comparison(runs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the page of several runs, in Markdown and HTML, with its figures.

    Args:
        runs: directories of two runs at least; the first is what the others are compared with.
        out: where to; by default ``report/against-OTHERS`` in the first run.

    Returns:
        The Markdown and the HTML file.

    Raises:
        UserError: not a run directory, the same run twice, or a damaged file.
    """
    names = _names(runs)
    files = {name: RunFiles.read(run) for name, run in zip(names, runs, strict=True)}
    out = out or runs[0] / "report" / f"against-{'-'.join(run.resolve().name for run in runs[1:])}"
    title = f"{', '.join(names[1:])} against {names[0]}"
    sections = [f"# {plain(title)}\n", *_configurations(files), *_training(files, out), *_recognition(files, out)]
    return write_page(out, "report", title, "\n".join(sections))


def _names(runs: Sequence[Path]) -> list[str]:
    """What the runs are called: their folders, or the whole places where folders are called alike."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"compare: {' '.join(map(str, runs))} names a run twice.")
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _configurations(files: Mapping[str, RunFiles]) -> list[str]:
    settings = {name: dict(flattened(dataclasses.asdict(each.config))) for name, each in files.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    shown = {key: [values.get(key, "-") for values in settings.values()] for key in keys}
    differing = {key: cells for key, cells in shown.items() if len(set(cells)) > 1 and key not in _OWN}
    title = "## What differs in the configurations\n"
    if not differing:
        return [title, "Nothing.\n"]
    columns = dict(zip(files, map(list, zip(*differing.values(), strict=True)), strict=True))
    return [title, markdown({_KEY: list(differing), **columns}, [_KEY, *files]), ""]


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of nested mappings as a command line names them, with their values as it writes them."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _training(files: Mapping[str, RunFiles], out: Path) -> list[str]:
    rows = {name: dict(progress_rows(each)) for name, each in files.items()}
    headings = list(dict.fromkeys(heading for found in rows.values() for heading in found))
    columns = {name: [found.get(heading, "-") for heading in headings] for name, found in rows.items()}
    sections = ["## Training\n", markdown({"figure": headings, **columns}, ["figure", *files]), ""]
    logs = {name: each.log for name, each in files.items() if each.log.steps}
    if logs:
        reading = (
            "How to read it: cross-entropy on text and end tokens, on a logarithmic axis. Runs that train on other "
            "tasks, rates or texts have losses that do not compare."
        )
        sections.append(shown(out, "losses.png", losses_figure(logs), "Losses", reading))
    return sections


def _recognition(files: Mapping[str, RunFiles], out: Path) -> list[str]:
    title, (first, *others) = "## Word error rates\n", list(files)
    texts: dict[str, Texts] = {}
    for name, each in files.items():
        if (each.directory / "evaluation" / HYPOTHESES).is_file():
            texts[name] = read_texts(each.directory)
    missing = [
        f"{plain(name)} is not evaluated yet: run `mome-dist evaluate {each.directory}`.\n"
        for name, each in files.items()
        if name not in texts
    ]
    if first not in texts or len(texts) < 2:
        return [title, *missing]
    sections = [
        title,
        f"Each run against {plain(first)} (*other*) on the same utterances, which are drawn together: 95 % CI is that "
        "of the difference, and *better in* the share of resamples with fewer errors. An interval without zero is a "
        "difference.\n",
    ]
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name in others:
        if name in texts:
            try:
                found[name] = compare(texts[first], texts[name])
            except UserError as error:
                sections.append(f"{plain(name)} does not compare with {plain(first)}: {plain(str(error))}\n")
                continue
            sections += [f"### {plain(name)}\n", markdown(comparison_columns({"views": found[name]})), ""]
    if found:
        reading = "How to read it: left of zero a run makes fewer errors than the first; a bar across zero is no news."
        figure = differences_figure(found, first)
        sections.append(shown(out, "differences.png", figure, "Differences of word error rates", reading))
    return [*sections, *missing]
