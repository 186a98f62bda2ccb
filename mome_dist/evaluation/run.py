"""Evaluation of a trained model on a split, in any views and conditions, on any number of processes.

Utterances are put into batches of similar length once, and whole batches are dealt to the ranks: every number is
computed from the same batch whatever the number of ranks, so the results are identical. A batch's sound is encoded once
for each noise and ratio, its video once for each corruption, and both serve every view.

The chance level is the word error rate with the speech shuffled among the utterances. Decoding depends on an
utterance's speech alone, so shuffling the hypotheses is the same and costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from mome_dist.config.schema import DecodingConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import SAMPLES_PER_FRAME
from mome_dist.data.noise import NoiseSource
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import ActivationRecorder, Activations
from mome_dist.evaluation.conditions import Case, ClipReader, Condition, cases_of, open_sources
from mome_dist.evaluation.decoding import batches_by_length, check_view, decode_batch, prefixes_of
from mome_dist.evaluation.outcome import CaseResult, Share, score
from mome_dist.evaluation.peak_memory import peak_bytes, reset_peak
from mome_dist.parallel.plain_world import World
from mome_dist.progress import progress
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


class Evaluation(NamedTuple):
    """What an evaluation found: a result for each case, expert activations (None of a model without experts), and a
    record of each mixture with noise."""

    results: list[CaseResult]
    activations: Activations | None
    mixtures: list[dict[str, Any]]


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
    conditions: Sequence[Condition] = (Condition(),),
    noise_split: str = "train",
    seed: int = 0,
    chance: bool = False,
    untrained_state: ModelState | None = None,
    console: Console | None = None,
) -> Evaluation | None:
    """Decode and score utterances in every view under every condition that the view notices.

    Args:
        run: the trained model with its encoders; the same on every rank.
        conditions: what is done to the clips.
        noise_split: of the corpus, that babble is made from.
        seed: of noise, corruptions and the shuffle of the chance level.
        chance: compute the chance level.
        untrained_state: parameters of the model before training (its `state_dict`); None leaves that baseline out. It
            is decoded under the first condition of each view only.
        console: where rank 0 shows progress.

    Returns:
        None on ranks other than 0.

    Raises:
        UserError: no utterance, a view that the model or the corpus cannot serve, or too few utterances for chance.
    """
    check_servable(run.model, utterances, views)
    shuffled = derangement(len(utterances), seed) if chance else None
    plan = _Plan(corpus, utterances, views, conditions, open_sources(conditions, corpus, noise_split, seed), seed)
    share = _decode_share(run, plan, decoding, world, untrained_state, console)
    shares = world.gather(share, "decoding")  # batches differ, and so does the time they take
    if shares is None:
        return None
    counted = [part.counts for part in shares if part.counts is not None]
    names, momes = tuple(map(str, views)), run.model.momes
    return Evaluation(
        score(plan.cases, utterances, shares, shuffled),
        Activations(torch.stack(counted).sum(dim=0), names, momes[0].router.top_k) if momes else None,
        [mixture for part in shares for mixture in part.mixtures],
    )


def check_servable(model: MoMESpeechLM, utterances: Sequence[Utterance], views: Sequence[View]) -> None:
    """Raise UserError unless the model can read the views and the utterances have their streams."""
    if not utterances:
        raise UserError("there is no utterance to evaluate; raise limit, or choose another split.")
    for view in views:
        check_view(model.projectors, view, model.terms, model.router)
        for stream in streams_of(view):
            length = "samples" if stream == "audio" else "frames"
            missing = next((utterance.id for utterance in utterances if not getattr(utterance, length)), None)
            if missing is not None:
                raise UserError(f"rates: {view} needs {stream}, which utterance {missing!r} lacks.")


class _Plan:
    """What is decoded: the same on every rank.

    Attributes:
        cases: in the order of the tables.
        first: of each view, the case that counts activations and decodes the untrained model.
    """

    def __init__(
        self,
        corpus: Corpus,
        utterances: Sequence[Utterance],
        views: Sequence[View],
        conditions: Sequence[Condition],
        sources: Mapping[str, NoiseSource],
        seed: int,
    ) -> None:
        self.corpus, self.utterances, self.sources, self.seed = corpus, utterances, sources, seed
        self.cases = cases_of(views, conditions)
        self.views = list(views)
        self.first = {view: next(case for case in self.cases if case.view == view) for view in views}

    def by_sound(self) -> list[list[Case]]:
        """Cases that hear the same, together: sound is encoded once for them and then let go."""
        groups: dict[tuple[str | None, float | None], list[Case]] = {}
        for case in self.cases:
            groups.setdefault((case.condition.noise, case.condition.snr), []).append(case)
        return list(groups.values())

    def readers(self, batch: Sequence[int]) -> list[ClipReader]:
        """Readers of the utterances of a batch."""
        return [ClipReader(self.corpus, self.utterances[index], self.sources, self.seed) for index in batch]


class _Features(NamedTuple):
    """Features of one stream of a batch, and how long the encoder took."""

    clips: list[Tensor]
    seconds: float


def _decode_share(
    run: SpeechRun,
    plan: _Plan,
    decoding: DecodingConfig,
    world: World,
    untrained_state: ModelState | None,
    console: Console | None,
) -> Share:
    """Decode this rank's batches."""
    # One order for all cases, so that a batch's features serve them all.
    lengths = [max(u.samples, u.frames * SAMPLES_PER_FRAME) for u in plan.utterances]
    mine = batches_by_length(lengths, decoding.batch_size)[world.rank :: world.size]
    encoders, share = run.encoders(), Share()
    recorder = ActivationRecorder(run.model.momes, plan.views) if run.model.momes else None
    total = len(mine) * (len(plan.cases) + (len(plan.views) if untrained_state else 0))
    with progress(console, "decoding", total, unit="batches") as shown:
        for batch in mine:
            readers, seen = plan.readers(batch), {}  # type: list[ClipReader], dict[str | None, _Features]
            for cases in plan.by_sound():
                heard: _Features | None = None
                for case in cases:
                    view, condition = case
                    streams: dict[str, _Features] = {}
                    if view.audio_rate is not None:
                        heard = heard or _hear(encoders["audio"], readers, condition, share, world.device)
                        streams["audio"] = heard
                    if view.video_rate is not None:
                        if condition.corruption not in seen:
                            seen[condition.corruption] = _see(encoders["video"], readers, condition, world.device)
                        streams["video"] = seen[condition.corruption]
                    first = case == plan.first[view]
                    _decode_case(run, case, batch, streams, decoding, recorder if first else None, share, world.device)
                    shown.advance()
                    if untrained_state is not None and first:
                        with _parameters(run.model, untrained_state):
                            share.untrained |= _texts(run, case, batch, _write(run, view, streams, decoding, None))
                        shown.advance()
    share.counts = None if recorder is None else recorder.result().counts
    return share


def _decode_case(
    run: SpeechRun,
    case: Case,
    batch: Sequence[int],
    streams: Mapping[str, _Features],
    decoding: DecodingConfig,
    recorder: ActivationRecorder | None,
    share: Share,
    device: torch.device,
) -> None:
    reset_peak(device)
    started = _now(device)
    written = _write(run, case.view, streams, decoding, recorder)
    share.decode_seconds[case] += _now(device) - started
    peak = peak_bytes(device)
    if peak is not None:
        share.peak_memory[case] = max(peak, share.peak_memory.get(case, 0))
    share.encode_seconds[case] += sum(features.seconds for features in streams.values())
    audio, video = _clips(streams)
    share.prefix_tokens[case] += sum(map(len, prefixes_of(run.sequences, case.view, audio, video)))
    share.tokens[case] += sum(map(len, written))
    share.texts |= _texts(run, case, batch, written)


def _clips(streams: Mapping[str, _Features]) -> tuple[list[Tensor], list[Tensor]]:
    audio, video = (streams[name].clips if name in streams else [] for name in ("audio", "video"))
    return audio, video


def _write(
    run: SpeechRun,
    view: View,
    streams: Mapping[str, _Features],
    decoding: DecodingConfig,
    recorder: ActivationRecorder | None,
) -> list[list[int]]:
    return decode_batch(run.model, run.sequences, view, *_clips(streams), decoding, recorder)


def _texts(
    run: SpeechRun, case: Case, batch: Sequence[int], written: Sequence[list[int]]
) -> dict[tuple[Case, int], str]:
    return {(case, index): run.sequences.codec.decode(ids) for index, ids in zip(batch, written, strict=True)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _hear(
    encoder: Encoder, readers: Sequence[ClipReader], condition: Condition, share: Share, device: torch.device
) -> _Features:
    sounds = [reader.audio(condition) for reader in readers]
    if condition.noise is not None:
        share.mixtures += [reader.mixture(condition, sound) for reader, sound in zip(readers, sounds, strict=True)]
    return _encode(encoder, sounds, device)


def _see(encoder: Encoder, readers: Sequence[ClipReader], condition: Condition, device: torch.device) -> _Features:
    return _encode(encoder, [reader.video(condition.corruption) for reader in readers], device)


def _encode(encoder: Encoder, clips: Sequence[NDArray[Any]], device: torch.device) -> _Features:
    raw = [torch.from_numpy(clip).to(device) for clip in clips]
    started = _now(device)
    with torch.no_grad():
        features = list(encoder(raw))
    return _Features(features, _now(device) - started)


@contextmanager
def _parameters(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Give a model other parameters for a while. The frozen LLM is not among them, so this is cheap."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(kept)
