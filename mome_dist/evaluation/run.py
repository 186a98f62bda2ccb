"""Evaluation of a trained model on a split, in any views, on any number of processes.

Utterances are put into batches of similar length once, and whole batches are dealt to the ranks: every number is
computed from the same batch whatever the number of ranks, so the results are identical. A batch's speech is encoded
once and decoded in every view.

The chance level is the word error rate with the speech shuffled among the utterances. Decoding depends on an
utterance's speech alone, so shuffling the hypotheses is the same and costs nothing.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from mome_dist.config.schema import DecodingConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import ActivationRecorder, Activations
from mome_dist.evaluation.decoding import batches_by_length, check_view, decode_batch
from mome_dist.evaluation.wer import WordErrors, corpus_word_errors
from mome_dist.evaluation.world import World
from mome_dist.moe.local import LocalMoME
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder
from mome_dist.speech.views import View

Encoder = Callable[[Sequence[Tensor]], Sequence[Tensor]]
ModelState = Mapping[str, Tensor]


class SpeechRun(Protocol):
    """What an evaluation needs of a loaded run."""

    @property
    def model(self) -> MoMESpeechLM:
        """In eval mode."""

    @property
    def sequences(self) -> SequenceBuilder:
        """Lays out prefixes."""

    def encoders(self) -> Mapping[str, Encoder]:
        """For "audio" and "video" as far as the run has them: raw clips to features [T, d]."""


@dataclass
class ViewResult:
    """Scores and costs of one view.

    Attributes:
        hypotheses: decoded texts in the order of the utterances.
        errors: of the trained model; chance and untrained: of the baselines, None where not asked for.
        untrained_hypotheses: likewise.
        tokens: written, end tokens not counted.
        decode_seconds, encode_seconds: summed over ranks; encoding counts the streams that the view reads.
        speech_seconds: length of all clips.
    """

    view: View
    hypotheses: list[str]
    errors: WordErrors
    chance: WordErrors | None
    untrained: WordErrors | None
    untrained_hypotheses: list[str] | None
    tokens: int
    decode_seconds: float
    encode_seconds: float
    speech_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Text tokens written a second by one process, prefix included in the time."""
        return self.tokens / self.decode_seconds

    @property
    def real_time_factor(self) -> float:
        """Seconds of one process (encoders and LLM) for a second of speech; below 1 is faster than real time."""
        return (self.encode_seconds + self.decode_seconds) / self.speech_seconds


@dataclass
class _Share:
    """What one rank found out; texts by (view, utterance index)."""

    texts: dict[tuple[View, int], str] = field(default_factory=dict)
    untrained: dict[tuple[View, int], str] = field(default_factory=dict)
    tokens: Counter[View] = field(default_factory=Counter)
    decode_seconds: defaultdict[View, float] = field(default_factory=partial(defaultdict, float))
    encode_seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    counts: Tensor | None = None


def streams_of(view: View) -> list[str]:
    """The streams that a view reads."""
    rates = {"audio": view.audio_rate, "video": view.video_rate}
    return [stream for stream, rate in rates.items() if rate is not None]


def derangement(count: int, seed: int) -> list[int]:
    """A random permutation of ``range(count)`` that leaves nothing in place (Sattolo's algorithm: one cycle).

    Raises:
        UserError: fewer than two elements.
    """
    if count < 2:
        raise UserError("baselines: chance shuffles speech among utterances and needs at least two of them.")
    generator = np.random.default_rng(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(generator.integers(last))
        order[last], order[other] = order[other], order[last]
    return order


def evaluate_run(
    run: SpeechRun,
    corpus: Corpus,
    utterances: Sequence[Utterance],
    views: Sequence[View],
    decoding: DecodingConfig,
    world: World,
    *,
    chance_seed: int | None = None,
    untrained_state: ModelState | None = None,
    console: Console | None = None,
) -> tuple[list[ViewResult], Activations] | None:
    """Decode and score utterances in every view.

    Args:
        run: the trained model with its encoders; the same on every rank.
        chance_seed: compute the chance level with this shuffle; None leaves it out.
        untrained_state: parameters of the model before training (its `state_dict`); None leaves that baseline out.
        console: where rank 0 shows progress.

    Returns:
        One result a view, and expert activations; None on ranks other than 0.

    Raises:
        UserError: no utterance, a view that the model or the corpus cannot serve, or too few utterances for chance.
    """
    check_servable(run.model, utterances, views)
    shuffled = derangement(len(utterances), chance_seed) if chance_seed is not None else None
    share = _decode_share(run, corpus, utterances, views, decoding, world, untrained_state, console)
    shares = world.gather(share)
    if shares is None:
        return None
    counts = torch.stack([part.counts for part in shares if part.counts is not None]).sum(dim=0)
    activations = Activations(counts, tuple(map(str, views)), run.model.mome[0].top_k)  # type: ignore[arg-type]
    return [_score(view, utterances, shares, shuffled, untrained_state is not None) for view in views], activations


def check_servable(model: MoMESpeechLM, utterances: Sequence[Utterance], views: Sequence[View]) -> None:
    """Raise UserError unless the model can read the views and the utterances have their streams."""
    if not utterances:
        raise UserError("there is no utterance to evaluate; raise limit, or choose another split.")
    for view in views:
        check_view(model.projectors, view)
        for stream in streams_of(view):
            length = "samples" if stream == "audio" else "frames"
            missing = next((utterance.id for utterance in utterances if not getattr(utterance, length)), None)
            if missing is not None:
                raise UserError(f"rates: {view} needs {stream}, which utterance {missing!r} lacks.")


def _decode_share(
    run: SpeechRun,
    corpus: Corpus,
    utterances: Sequence[Utterance],
    views: Sequence[View],
    decoding: DecodingConfig,
    world: World,
    untrained_state: ModelState | None,
    console: Console | None,
) -> _Share:
    """Decode this rank's batches."""
    # One order for all views, so that a batch's features serve them all.
    batches = batches_by_length([max(u.samples, u.frames * SAMPLES_PER_FRAME) for u in utterances], decoding.batch_size)
    mine = batches[world.rank :: world.size]
    encoders = run.encoders()
    share, recorder = _Share(), ActivationRecorder(cast("list[LocalMoME]", list(run.model.mome)), views)
    streams = sorted({stream for view in views for stream in streams_of(view)})
    with _progress(console, len(mine) * len(views) * (1 if untrained_state is None else 2)) as advance:
        for batch in mine:
            clips = [utterances[index] for index in batch]
            features = {name: _encode(encoders[name], name, corpus, clips, share, world.device) for name in streams}
            for view in views:
                started = _now(world.device)
                written = _write(run, view, features, decoding, recorder)
                share.decode_seconds[view] += _now(world.device) - started
                share.tokens[view] += sum(map(len, written))
                share.texts |= _texts(run, view, batch, written)
                advance()
            if untrained_state is not None:
                with _parameters(run.model, untrained_state):
                    for view in views:
                        share.untrained |= _texts(run, view, batch, _write(run, view, features, decoding, None))
                        advance()
    share.counts = recorder.result().counts
    return share


def _write(
    run: SpeechRun,
    view: View,
    features: Mapping[str, list[Tensor]],
    decoding: DecodingConfig,
    recorder: ActivationRecorder | None,
) -> list[list[int]]:
    audio, video = features.get("audio", []), features.get("video", [])
    return decode_batch(run.model, run.sequences, view, audio, video, decoding, recorder)


def _texts(
    run: SpeechRun, view: View, batch: Sequence[int], written: Sequence[list[int]]
) -> dict[tuple[View, int], str]:
    return {(view, index): run.sequences.codec.decode(ids) for index, ids in zip(batch, written, strict=True)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _encode(
    encoder: Encoder, stream: str, corpus: Corpus, clips: Sequence[Utterance], share: _Share, device: torch.device
) -> list[Tensor]:
    read = corpus.audio if stream == "audio" else corpus.video
    raw = [torch.from_numpy(read(utterance)).to(device) for utterance in clips]
    started = _now(device)
    with torch.no_grad():
        features = list(encoder(raw))
    share.encode_seconds[stream] += _now(device) - started
    return features


@contextmanager
def _parameters(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Give a model other parameters for a while. The frozen LLM is not among them, so this is cheap."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(kept)


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("[bold]decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None) as progress:
        bar = progress.add_task("decoding", total=total)
        yield lambda: progress.advance(bar)


def _score(
    view: View,
    utterances: Sequence[Utterance],
    shares: Sequence[_Share],
    shuffled: Sequence[int] | None,
    with_untrained: bool,
) -> ViewResult:
    """Put the ranks' shares of one view together and count errors."""
    texts = {key: text for share in shares for key, text in share.texts.items()}
    untrained = {key: text for share in shares for key, text in share.untrained.items()}
    indices = range(len(utterances))
    references = [utterance.text for utterance in utterances]
    hypotheses = [texts[view, index] for index in indices]
    before = [untrained[view, index] for index in indices] if with_untrained else None
    return ViewResult(
        view=view,
        hypotheses=hypotheses,
        errors=corpus_word_errors(references, hypotheses),
        chance=corpus_word_errors(references, [hypotheses[i] for i in shuffled]) if shuffled is not None else None,
        untrained=corpus_word_errors(references, before) if before is not None else None,
        untrained_hypotheses=before,
        tokens=sum(share.tokens[view] for share in shares),
        decode_seconds=sum(share.decode_seconds[view] for share in shares),
        encode_seconds=sum(share.encode_seconds[stream] for share in shares for stream in streams_of(view)),
        speech_seconds=sum(max(u.samples / SAMPLE_RATE, u.frames / FPS) for u in utterances),
    )
