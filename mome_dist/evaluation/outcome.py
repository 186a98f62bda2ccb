"""What an evaluation found out about each case: texts, errors and costs, put together from the shares of the ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from mome_dist.data.corpus import Utterance
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.evaluation.conditions import Case
from mome_dist.evaluation.wer import WordErrors, corpus_word_errors, total, word_errors


@dataclass
class Share:
    """What one rank found out; texts by (case, utterance index), seconds of encoding by case."""

    texts: dict[tuple[Case, int], str] = field(default_factory=dict)
    untrained: dict[tuple[Case, int], str] = field(default_factory=dict)
    tokens: Counter[Case] = field(default_factory=Counter)
    prefix_tokens: Counter[Case] = field(default_factory=Counter)
    decode_seconds: defaultdict[Case, float] = field(default_factory=partial(defaultdict, float))
    encode_seconds: defaultdict[Case, float] = field(default_factory=partial(defaultdict, float))
    peak_memory: dict[Case, int] = field(default_factory=dict)
    mixtures: list[dict[str, Any]] = field(default_factory=list)
    counts: Tensor | None = None


@dataclass(frozen=True)
class CaseResult:
    """Scores and costs of one case.

    Attributes:
        hypotheses: decoded texts in the order of the utterances.
        by_utterance: errors of each utterance.
        chance, untrained: errors of the baselines, None where not asked for.
        untrained_hypotheses: likewise.
        tokens: written, end tokens not counted.
        prefix_tokens: that the LLM read before it wrote: speech, tags and prompt.
        decode_seconds, encode_seconds: summed over ranks; encoding counts the streams that the view reads, as if each
            case had encoded them for itself.
        peak_memory: bytes, of the rank that needed most; None where the system does not say.
        speech_seconds: length of all clips.
    """

    case: Case
    hypotheses: list[str]
    by_utterance: list[WordErrors]
    chance: WordErrors | None
    untrained: WordErrors | None
    untrained_hypotheses: list[str] | None
    tokens: int
    prefix_tokens: int
    decode_seconds: float
    encode_seconds: float
    peak_memory: int | None
    speech_seconds: float

    @property
    def errors(self) -> WordErrors:
        """Over all utterances."""
        return total(self.by_utterance)

    @property
    def tokens_per_second(self) -> float:
        """Text tokens written a second by one process, prefix included in the time."""
        return self.tokens / self.decode_seconds

    @property
    def real_time_factor(self) -> float:
        """Seconds of one process (encoders and LLM) for a second of speech; below 1 is faster than real time."""
        return (self.encode_seconds + self.decode_seconds) / self.speech_seconds


def score(
    cases: Sequence[Case], utterances: Sequence[Utterance], shares: Sequence[Share], shuffled: Sequence[int] | None
) -> list[CaseResult]:
    """Put the ranks' shares together and count errors.

    Args:
        shuffled: whose speech each utterance gets for the chance level; None leaves it out.
    """
    texts = {key: text for share in shares for key, text in share.texts.items()}
    untrained = {key: text for share in shares for key, text in share.untrained.items()}
    return [_score(case, utterances, shares, texts, untrained, shuffled) for case in cases]


def _score(
    case: Case,
    utterances: Sequence[Utterance],
    shares: Sequence[Share],
    texts: Mapping[tuple[Case, int], str],
    untrained: Mapping[tuple[Case, int], str],
    shuffled: Sequence[int] | None,
) -> CaseResult:
    indices = range(len(utterances))
    references = [utterance.text for utterance in utterances]
    hypotheses = [texts[case, index] for index in indices]
    before = [untrained[case, index] for index in indices] if (case, 0) in untrained else None
    peaks = [share.peak_memory[case] for share in shares if case in share.peak_memory]
    return CaseResult(
        case=case,
        hypotheses=hypotheses,
        by_utterance=[word_errors(*pair) for pair in zip(references, hypotheses, strict=True)],
        chance=corpus_word_errors(references, [hypotheses[i] for i in shuffled]) if shuffled is not None else None,
        untrained=corpus_word_errors(references, before) if before is not None else None,
        untrained_hypotheses=before,
        tokens=sum(share.tokens[case] for share in shares),
        prefix_tokens=sum(share.prefix_tokens[case] for share in shares),
        decode_seconds=sum(share.decode_seconds[case] for share in shares),
        encode_seconds=sum(share.encode_seconds[case] for share in shares),
        peak_memory=max(peaks, default=None),
        speech_seconds=sum(max(u.samples / SAMPLE_RATE, u.frames / FPS) for u in utterances),
    )
