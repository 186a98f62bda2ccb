"""Results of an evaluation as files and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mome_dist.errors import UserError
from mome_dist.evaluation.run import ViewResult
from mome_dist.evaluation.wer import WordErrors, word_errors
from mome_dist.files import write_json, write_text

FORMAT = "mome_dist.evaluation/1"
RESULTS, TABLE, HYPOTHESES, ACTIVATIONS = "results.json", "results.md", "hypotheses.jsonl", "activations.safetensors"

_COLUMNS = ("task", "rates", "WER %", "S", "D", "I", "words", "chance %", "untrained %", "tokens/s", "RTF")
_NUMBERS_START = 2


def summary_of(result: ViewResult, trained: bool) -> dict[str, Any]:
    """One view's line in ``results.json``; rates of error in percent, ``trained`` whether training saw this view."""
    errors = result.errors
    return {
        "view": str(result.view),
        "task": result.view.task,
        "audio_rate": result.view.audio_rate,
        "video_rate": result.view.video_rate,
        "rates": result.view.rates,
        "trained": trained,
        "wer": errors.rate,
        "words": errors.words,
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
        "chance_wer": _rate(result.chance),
        "untrained_wer": _rate(result.untrained),
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "real_time_factor": result.real_time_factor,
        "decode_seconds": result.decode_seconds,
        "encode_seconds": result.encode_seconds,
    }


def _rate(errors: WordErrors | None) -> float | None:
    return None if errors is None else errors.rate


def table_rows(views: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table, a row a view of ``results.json``; "-" where a baseline was not asked for."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    return [
        [
            view["task"].upper(),
            view["rates"] + ("" if view["trained"] else " *"),
            percent(view["wer"]),
            *(str(view[key]) for key in ("substitutions", "deletions", "insertions", "words")),
            percent(view["chance_wer"]),
            percent(view["untrained_wer"]),
            f"{view['tokens_per_second']:.1f}",
            f"{view['real_time_factor']:.3f}",
        ]
        for view in views
    ]


def notes(views: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    lines = [
        "Rates: frames per token (audio, video). S, D, I: substituted, deleted, inserted words. Chance: speech "
        "shuffled among the utterances. tokens/s and RTF (seconds per second of speech) are those of one process."
    ]
    if not all(view["trained"] for view in views):
        lines.append("* not among the views of the training.")
    return lines


def rich_table(title: str, views: Sequence[Mapping[str, Any]]) -> Table:
    """The table for a terminal."""
    caption = "\n".join(notes(views))
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    for number, column in enumerate(_COLUMNS):
        # Two short lines a heading: the table fits 80 columns.
        heading = column.replace(" ", "\n")
        table.add_column(heading, justify="left" if number < _NUMBERS_START else "right", no_wrap=True)
    for row in table_rows(views):
        table.add_row(*row)
    return table


def markdown_table(views: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, without a title."""
    rules = [" --- " if number < _NUMBERS_START else " ---: " for number in range(len(_COLUMNS))]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "|".join(rules) + "|"]
    lines += ["| " + " | ".join(cell.replace("*", r"\*") for cell in row) + " |" for row in table_rows(views)]
    text = [line.replace("*", r"\*") for line in notes(views)]
    return "\n".join(lines) + "\n\n" + "\n".join(text) + "\n"


def write_results(
    directory: Path,
    header: Mapping[str, Any],
    summaries: Sequence[Mapping[str, Any]],
    results: Sequence[ViewResult],
    ids: Sequence[str],
    references: Sequence[str],
) -> None:
    """Write hypotheses, the Markdown table and, last, ``results.json``; each file atomically."""
    lines: list[str] = []
    for result in results:
        before: Sequence[str | None] = result.untrained_hypotheses or [None] * len(ids)
        for name, reference, hypothesis, first in zip(ids, references, result.hypotheses, before, strict=True):
            errors = word_errors(reference, hypothesis)
            line: dict[str, Any] = {
                "view": str(result.view),
                "id": name,
                "reference": reference,
                "hypothesis": hypothesis,
            }
            line |= {"words": errors.words, "errors": errors.errors}
            lines.append(json.dumps(line | ({} if first is None else {"untrained": first}), ensure_ascii=False))
    write_text(directory / HYPOTHESES, "\n".join(lines) + "\n")
    title = f"# {header['run']}, step {header['step']}: {header['split']} split, {header['utterances']} utterances\n\n"
    write_text(directory / TABLE, title + markdown_table(summaries))
    write_json(directory / RESULTS, {"format": FORMAT, **header, "views": list(summaries)})


def read_results(path: Path) -> dict[str, Any]:
    """Read ``results.json``. Raises UserError if it is not one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); evaluate the run again.") from error
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}, this version reads {FORMAT!r}; evaluate the run again.")
    return dict(results)
