"""Two evaluations on the same utterances: is one system better than the other, or was it luck?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.evaluation.bootstrap import Bootstrap
from mome_dist.evaluation.outcome import CaseResult
from mome_dist.evaluation.results import HYPOTHESES
from mome_dist.evaluation.wer import WordErrors, total, word_errors
from mome_dist.text_files import lines_of

Texts = Mapping[tuple[str, str], Mapping[str, tuple[str, str]]]


def read_texts(place: str | Path) -> Texts:
    """Reference and hypothesis of every utterance, by (view, condition), of an evaluation.

    Args:
        place: directory of an evaluation, or of a run that has one.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    place = Path(place)
    paths = [place / HYPOTHESES, place / "evaluation" / HYPOTHESES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{place}: no {HYPOTHESES} there or in evaluation/: evaluate that run first.")
    found: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for number, line in enumerate(lines_of(path), 1):
        try:
            record = json.loads(line)
            texts = found.setdefault((record["view"], record["condition"]), {})
            texts[record["id"]] = (record["reference"], record["hypothesis"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is no hypothesis ({error!r}); evaluate that run again.") from error
    return found


def texts_of(results: Sequence[CaseResult], ids: Sequence[str], references: Sequence[str]) -> Texts:
    """The same of an evaluation that was not written yet."""
    return {
        (str(result.case.view), str(result.case.condition)): dict(
            zip(ids, zip(references, result.hypotheses, strict=True), strict=True)
        )
        for result in results
    }


def compare(first: Texts, second: Texts, seed: int = 0) -> list[dict[str, Any]]:
    """``second`` minus ``first``, for each view and condition that both have.

    Returns:
        Entries with ``wer`` (of the second), ``other_wer``, ``difference``, its 95 % interval ``low`` and ``high``, and
        ``better``: the share of resamples in which the second has fewer errors.

    Raises:
        UserError: no view in common, or other utterances or references.
    """
    common = [key for key in second if key in first]
    if not common:
        raise UserError("the two evaluations have no view and condition in common: evaluate both with the same rates.")
    return [_compare(key, first[key], second[key], seed) for key in common]


def _compare(
    key: tuple[str, str],
    first: Mapping[str, tuple[str, str]],
    second: Mapping[str, tuple[str, str]],
    seed: int,
) -> dict[str, Any]:
    view, condition = key
    if {name: pair[0] for name, pair in first.items()} != {name: pair[0] for name, pair in second.items()}:
        raise UserError(f"{view}, {condition}: the two evaluations are of other utterances: evaluate the same split.")
    ids = list(second)
    one, two = ([word_errors(*texts[name]) for name in ids] for texts in (first, second))
    return {
        "view": view,
        "task": view.partition("(")[0],
        "rates": view[view.index("(") :],
        "condition": condition,
        **difference(one, two, seed),
    }


def difference(first: Sequence[WordErrors], second: Sequence[WordErrors], seed: int = 0) -> dict[str, Any]:
    """The rates of two systems on the same utterances and their difference, as `compare` describes them."""
    interval = Bootstrap(len(first), seed).difference(first, second)
    wer, other = total(second).rate, total(first).rate
    return {
        "wer": wer,
        "other_wer": other,
        "difference": wer - other,
        "low": interval.low,
        "high": interval.high,
        "better": interval.below,
    }
