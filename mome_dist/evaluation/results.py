"""Results of an evaluation as files.

results.json       header and an entry for each view and condition
results.md         the tables
hypotheses.jsonl   every text
noise.jsonl        every mixture: asked and measured ratio, and what the noise was made of
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.evaluation.bootstrap import Bootstrap
from mome_dist.evaluation.outcome import CaseResult
from mome_dist.evaluation.tables import markdown_report
from mome_dist.evaluation.wer import WordErrors
from mome_dist.files import write_json, write_text

FORMAT = "mome_dist.evaluation/2"
RESULTS, TABLE, HYPOTHESES, ACTIVATIONS = "results.json", "results.md", "hypotheses.jsonl", "activations.safetensors"
NOISE = "noise.jsonl"


def summary_of(result: CaseResult, trained: bool, bootstrap: Bootstrap) -> dict[str, Any]:
    """One case's entry in ``results.json``; rates of error in percent, ``trained`` whether training saw this view."""
    errors, (view, condition) = result.errors, result.case
    interval = bootstrap.interval(result.by_utterance)
    return {
        "view": str(view),
        "task": view.task,
        "audio_rate": view.audio_rate,
        "video_rate": view.video_rate,
        "rates": view.rates,
        "trained": trained,
        **condition.record(),
        "wer": errors.rate,
        "wer_low": interval.low,
        "wer_high": interval.high,
        "words": errors.words,
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
        "chance_wer": _rate(result.chance),
        "untrained_wer": _rate(result.untrained),
        "tokens": result.tokens,
        "llm_tokens": result.prefix_tokens / len(result.hypotheses),
        "tokens_per_second": result.tokens_per_second,
        "real_time_factor": result.real_time_factor,
        "decode_seconds": result.decode_seconds,
        "encode_seconds": result.encode_seconds,
        "peak_memory_bytes": result.peak_memory,
    }


def _rate(errors: WordErrors | None) -> float | None:
    return None if errors is None else errors.rate


def write_results(
    directory: Path,
    document: Mapping[str, Any],
    results: Sequence[CaseResult],
    mixtures: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    references: Sequence[str],
) -> None:
    """Write hypotheses, mixtures, the tables and, last, ``results.json``; each file atomically.

    Args:
        document: the content of ``results.json`` but for the format.
    """
    write_text(directory / HYPOTHESES, "".join(f"{line}\n" for line in _hypotheses(results, ids, references)))
    ordered = sorted(mixtures, key=lambda mixture: (mixture["noise"], mixture["snr"], mixture["id"]))
    if ordered:
        write_text(directory / NOISE, "".join(f"{json.dumps(mixture, ensure_ascii=False)}\n" for mixture in ordered))
    else:
        (directory / NOISE).unlink(missing_ok=True)  # of an earlier evaluation
    title = f"# {document['run']}, step {document['step']}: {document['split']} split, "
    title += f"{document['utterances']} utterances\n\n"
    write_text(directory / TABLE, title + markdown_report(document))
    write_json(directory / RESULTS, {"format": FORMAT, **document})


def _hypotheses(results: Sequence[CaseResult], ids: Sequence[str], references: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for result in results:
        before: Sequence[str | None] = result.untrained_hypotheses or [None] * len(ids)
        rows = zip(ids, references, result.hypotheses, result.by_utterance, before, strict=True)
        for name, reference, hypothesis, errors, first in rows:
            line: dict[str, Any] = {
                "view": str(result.case.view),
                "condition": str(result.case.condition),
                "id": name,
                "reference": reference,
                "hypothesis": hypothesis,
                "words": errors.words,
                "errors": errors.errors,
            }
            lines.append(json.dumps(line | ({} if first is None else {"untrained": first}), ensure_ascii=False))
    return lines


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
