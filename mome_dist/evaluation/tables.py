"""Tables of an evaluation, from the entries of ``results.json``: for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mome_dist.evaluation.published import PUBLISHED, corpus_of

Entry = Mapping[str, Any]

_TASK, _RATES = "task", "rates"
_TEXT_COLUMNS = (_TASK, _RATES, "condition", "method", "from")


def clean_views(views: Sequence[Entry]) -> list[Entry]:
    """The entries without noise or corruption; where there is none, each view's first."""
    clean = [view for view in views if view["condition"] == "clean"]
    return clean or list({view["view"]: view for view in reversed(views)}.values())[::-1]


_MARKS = str.maketrans({"\n": " ", "\r": " ", **{mark: f"\\{mark}" for mark in "\\`*<|"}})


def plain(text: str) -> str:
    """A text as Markdown that shows it as it is, in a line or a cell: no emphasis, HTML, link, image or column."""
    return text.translate(_MARKS).replace("](", r"]\(")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(entry: Entry) -> str:
    return f"{entry['wer_low']:.1f}-{entry['wer_high']:.1f}"


def _rates_cell(entry: Entry) -> str:
    return str(entry["rates"]) + ("" if entry["trained"] else " *")


def table_columns(views: Sequence[Entry]) -> dict[str, list[str]]:
    """The main table, cells by column; baselines and conditions have columns only where there are any."""
    columns = {_TASK: [view["task"].upper() for view in views], _RATES: [_rates_cell(view) for view in views]}
    if any(view["condition"] != "clean" for view in views):
        columns["condition"] = [view["condition"] for view in views]
    columns |= {"WER %": [_percent(view["wer"]) for view in views], "95 % CI": [_interval(view) for view in views]}
    for heading, key in (("S", "substitutions"), ("D", "deletions"), ("I", "insertions"), ("words", "words")):
        columns[heading] = [str(view[key]) for view in views]
    for heading, key in (("chance %", "chance_wer"), ("untrained %", "untrained_wer")):
        if any(view[key] is not None for view in views):
            columns[heading] = [_percent(view[key]) for view in views]
    return columns


def cost_columns(views: Sequence[Entry]) -> dict[str, list[str]]:
    """What each view costs, cells by column."""
    return {
        _TASK: [view["task"].upper() for view in views],
        _RATES: [_rates_cell(view) for view in views],
        "LLM tokens": [f"{view['llm_tokens']:.0f}" for view in views],
        "tokens/s": [f"{view['tokens_per_second']:.1f}" for view in views],
        "RTF": [f"{view['real_time_factor']:.3f}" for view in views],
        "peak MB": [_megabytes(view["peak_memory_bytes"]) for view in views],
    }


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"


def grid_columns(views: Sequence[Entry], intervals: bool) -> dict[str, list[str]]:
    """WER of every condition (rows) in every view (columns).

    A view that cannot notice a condition has its number without it there, in brackets.
    """
    names = list(dict.fromkeys(view["view"] for view in views))
    conditions = list(dict.fromkeys(view["condition"] for view in views))
    found = {(view["condition"], view["view"]): view for view in views}
    shown = {view["condition"]: view for view in views}
    columns: dict[str, list[str]] = {"condition": conditions}
    for name in names:
        columns[_label(name)] = [_grid_cell(found, shown[condition], name, intervals) for condition in conditions]
    return columns


def _label(view: str) -> str:
    task, bracket, rates = view.partition("(")
    return f"{task.upper()} {bracket}{rates}"


def _grid_cell(found: Mapping[tuple[str, str], Entry], condition: Entry, view: str, intervals: bool) -> str:
    entry = found.get((condition["condition"], view))
    if entry is not None:
        return _percent(entry["wer"]) + (f" ({_interval(entry)})" if intervals else "")
    for (_, name), other in found.items():
        heard = other["audio_rate"] is not None
        noticed = {
            "noise": condition["noise"] if heard else None,
            "snr": condition["snr"] if heard else None,
            "video_corruption": condition["video_corruption"] if other["video_rate"] is not None else None,
        }
        if name == view and all(other[key] == value for key, value in noticed.items()):
            return f"[{_percent(other['wer'])}]"
    return "-"


def markdown(columns: Mapping[str, Sequence[str]], text: Collection[str] = _TEXT_COLUMNS) -> str:
    """Columns as a Markdown table, without a final newline; those of ``text`` are set from the left."""
    names = list(columns)
    rules = [" --- " if name in text else " ---: " for name in names]
    lines = ["| " + " | ".join(map(plain, names)) + " |", "|" + "|".join(rules) + "|"]
    lines += ["| " + " | ".join(map(plain, row)) + " |" for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def rich_table(title: str, columns: Mapping[str, Sequence[str]], caption: str = "") -> Table:
    """Columns as a table for a terminal."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in columns:
        # Two short lines a heading: the table fits 80 columns.
        heading = "\n".join(name.rsplit(" ", 1))
        table.add_column(heading, justify="left" if name in _TEXT_COLUMNS else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def notes(views: Sequence[Entry]) -> list[str]:
    """What a reader of the main table must know."""
    lines = [
        "Rates: frames per token (audio, video). S, D, I: substituted, deleted, inserted words. 95 % CI: bootstrap "
        "over utterances. Chance: speech shuffled among the utterances."
    ]
    if not all(view["trained"] for view in views):
        lines.append("* not among the views of the training.")
    return lines


COST_NOTE = (
    "LLM tokens: read before the text, mean of an utterance. tokens/s (written) and RTF (seconds per second of speech) "
    "are those of one process, encoders included in RTF; peak: memory while decoding, of the whole process on a CPU "
    "and of torch's tensors on GPUs."
)
GRID_NOTE = "In brackets: a view that cannot notice the condition has its number without it."


def tables_for_terminal(title: str, results: Mapping[str, Any]) -> list[Table]:
    """Word error rates, conditions if there are several, costs, and a comparison if there is one."""
    views = results["views"]
    clean = clean_views(views)
    main = table_columns(clean)
    main.pop("words")  # in the Markdown table: 80 columns are not enough for all
    tables = [rich_table(title, main, "\n".join(notes(views)))]
    if len({view["condition"] for view in views}) > 1:
        tables.append(rich_table("WER % by condition", grid_columns(views, intervals=False), GRID_NOTE))
    tables.append(rich_table("Costs", cost_columns(clean), COST_NOTE))
    if results.get("comparison"):
        comparison = results["comparison"]
        tables.append(rich_table(f"Against {comparison['with']}", comparison_columns(comparison)))
    return tables


def published_section(results: Mapping[str, Any]) -> str:
    """Measured and published word error rates, as Markdown; empty where no view of the evaluation was published."""
    views = {view["view"]: view for view in clean_views(results["views"]) if view["condition"] == "clean"}
    published = [line for line in PUBLISHED if line.wer.keys() & views.keys()]
    if not published:
        return ""
    corpus = corpus_of(str(results["corpus"])) if results["split"] == "test" else None
    here = [line for line in published if line.corpus == corpus]
    shown = here or published
    names = [name for name in dict.fromkeys(name for line in shown for name in line.wer) if name in views]
    measured = {
        "method": [f"**{results['run']}, measured here**"],
        "from": [f"{results['corpus']}, {results['split']}"],
    }
    measured |= {_label(name): [_percent(views[name]["wer"])] for name in names}
    columns = {"method": [line.method for line in shown], "from": [f"{line.corpus}; {line.paper}" for line in shown]}
    columns |= {_label(name): [_percent(line.wer.get(name)) for line in shown] for name in names}
    if here:
        return "WER %, measured and published.\n\n" + _markdown_bold(
            {name: measured[name] + cells for name, cells in columns.items()}
        )
    others = " and ".join(dict.fromkeys(line.corpus for line in shown))
    return (
        f"{_markdown_bold(measured)}\n\nPublished on {others} (another corpus: these numbers do not compare with those "
        f"above).\n\n{markdown(columns)}"
    )


def _markdown_bold(columns: Mapping[str, Sequence[str]]) -> str:
    """Bold text is the one use of asterisks that is meant."""
    return markdown(columns).replace(r"\*\*", "**")


def markdown_report(results: Mapping[str, Any]) -> str:
    """All tables of an evaluation in Markdown, without a title."""
    views = results["views"]
    clean = clean_views(views)
    parts = [markdown(table_columns(views)), "\n".join(map(plain, notes(views)))]
    if len({view["condition"] for view in views}) > 1:
        parts += ["WER % by condition.", markdown(grid_columns(views, intervals=True)), GRID_NOTE]
    parts += [markdown(cost_columns(clean)), COST_NOTE]
    comparison = results.get("comparison")
    if comparison:
        heading = f"Against {plain(comparison['with'])}, on the same utterances."
        parts += [heading, markdown(comparison_columns(comparison))]
    published = published_section(results)
    return "\n\n".join([*parts, *([published] if published else [])]) + "\n"


def comparison_columns(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """The table of a comparison (`mome_dist.evaluation.comparison`), cells by column."""
    rows = comparison["views"]
    return {
        _TASK: [row["task"].upper() for row in rows],
        _RATES: [row["rates"] for row in rows],
        "condition": [row["condition"] for row in rows],
        "WER %": [_percent(row["wer"]) for row in rows],
        "other %": [_percent(row["other_wer"]) for row in rows],
        "difference": [f"{row['difference']:+.1f}" for row in rows],
        "95 % CI": [f"{row['low']:+.1f} to {row['high']:+.1f}" for row in rows],
        "better in %": [f"{100 * row['better']:.0f}" for row in rows],
    }
