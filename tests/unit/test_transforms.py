"""Transforms: sizes, spans and shares are as documented, nothing is written in place, and seeds decide everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mome_dist.config.schema import AugmentationConfig, NoiseConfig, TimeMaskConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.noise import measure_snr
from mome_dist.data.transforms import (
    CORRUPTIONS,
    Augmentation,
    ModalityDropout,
    TimeMask,
    center_crop,
    corrupt,
    random_crop,
    random_flip,
)
from mome_dist.errors import UserError

PAPER = AugmentationConfig(
    crop=88,
    flip=0.5,
    video_time_mask=TimeMaskConfig(10, 25),
    audio_time_mask=TimeMaskConfig(6400, 16_000),
    noise=NoiseConfig(source="babble"),
)


def clip(frames: int = 60, seed: int = 0) -> np.ndarray:
    video = np.random.default_rng(seed).integers(256, size=(frames, 96, 96), dtype=np.uint8)
    video.setflags(write=False)
    return video


def test_a_random_crop_is_one_place_of_the_clip_and_every_place_occurs() -> None:
    video, places = clip(3), set()
    for seed in range(600):
        crop = random_crop(video, 88, np.random.default_rng(seed))
        (place,) = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(video[:, top : top + 88, left : left + 88], crop)
        ]
        places.add(place)
    assert len(places) > 70, "81 places, each missed with a chance of 0.06 %"
    np.testing.assert_array_equal(random_crop(video, 96, np.random.default_rng(0)), video)
    np.testing.assert_array_equal(center_crop(video, 88), video[:, 4:92, 4:92])
    with pytest.raises(UserError, match=r"96 x 96 pixels cannot be cropped to 100 x 100"):
        random_crop(video, 100, np.random.default_rng(0))


def test_a_flip_mirrors_half_of_the_clips() -> None:
    video, flipped = clip(2), 0
    for seed in range(400):
        result = random_flip(video, 0.5, np.random.default_rng(seed))
        if not np.array_equal(result, video):
            np.testing.assert_array_equal(result, video[:, :, ::-1])
            flipped += 1
    assert 140 < flipped < 260, "six standard deviations"
    assert random_flip(video, 0.0, np.random.default_rng(0)) is video


@pytest.mark.parametrize(("length", "spans"), [(1, 1), (25, 1), (26, 2), (60, 3), (400, 16)])
def test_longer_clips_have_more_spans_of_all_widths(length: int, spans: int) -> None:
    mask, widths, hidden = TimeMask(10, 25), set(), np.zeros(length)
    for seed in range(500):
        found = mask.spans(length, np.random.default_rng(seed))
        assert len(found) == spans
        for start, end in found:
            assert 0 <= start <= end <= length and end - start <= 10
            widths.add(end - start)
            hidden[start:end] += 1
    assert widths == set(range(min(length, 10) + 1)), "a misdrawn range would miss a width"
    assert hidden.all(), "every frame is hidden at times, the last one too"
    assert TimeMask(0, 25).spans(length, np.random.default_rng(0)) == []


def test_hidden_video_is_the_mean_frame_and_hidden_audio_the_mean_sample() -> None:
    video, mask = clip(), TimeMask(10, 25)
    hidden = mask.video(video, np.random.default_rng(1))
    spans = [span for span in mask.spans(60, np.random.default_rng(1)) if span[0] < span[1]]
    changed = np.zeros(60, bool)
    for start, end in spans:
        changed[start:end] = True
    assert changed.any() and not changed.all()
    np.testing.assert_array_equal(hidden[~changed], video[~changed])
    assert np.abs(hidden[changed] - video.mean(0)).max() <= 0.5
    audio = np.random.default_rng(0).normal(0.1, 0.1, 40_000).astype(np.float32)
    audio.setflags(write=False)
    quiet = TimeMask(6400, 16_000).audio(audio, np.random.default_rng(1))
    same = quiet == audio
    assert 0.5 < same.mean() < 1
    np.testing.assert_allclose(quiet[~same], audio.mean(), rtol=1e-5)


def test_modality_dropout_has_the_asked_shares_and_never_drops_both() -> None:
    dropout = ModalityDropout(audio=0.3, video=0.2, seed=0)
    left_out = [dropout.left_out(f"u{i}", "avsr(4,2)", draw) for i in range(500) for draw in range(4)]
    assert left_out.count("audio") / 2000 == pytest.approx(0.3, abs=0.05)
    assert left_out.count("video") / 2000 == pytest.approx(0.2, abs=0.05)
    assert left_out.count(None) == 2000 - left_out.count("audio") - left_out.count("video")
    again = [ModalityDropout(0.3, 0.2, 0).left_out(f"u{i}", "avsr(4,2)", d) for i in range(500) for d in range(4)]
    assert again == left_out
    other = [dropout.left_out(f"u{i}", "avsr(16,5)", d) for i in range(500) for d in range(4)]
    assert np.mean([a == b for a, b in zip(left_out, other, strict=True)]) < 0.5, "each view is drawn for itself"


def test_modality_dropout_moves_by_step_and_by_nothing_else() -> None:
    shared: dict[str, Any] = {"audio": 0.5, "video": 0.1, "seed": 0, "audio_to": 0.1, "video_to": 0.3, "steps": 8}
    ways: dict[str, list[float]] = {"constant": [0, 0, 0, 0, 0], "linear": [0, 0.25, 0.5, 1, 1]}
    ways["cosine"] = [0, (1 - math.sqrt(0.5)) / 2, 0.5, 1, 1]
    for schedule, found in ways.items():
        dropout = ModalityDropout(schedule=schedule, **shared)
        for step, way in zip((0, 2, 4, 8, 100), found, strict=True):
            assert dropout.at(step) == pytest.approx((0.5 - 0.4 * way, 0.1 + 0.2 * way)), (schedule, step)
    moving = ModalityDropout(schedule="linear", **shared)
    for step in (0, 3, 8):
        still = ModalityDropout(*moving.at(step), seed=0)
        for i in range(50):
            assert moving.left_out(f"u{i}", "avsr(4,2)", 1, step) == still.left_out(f"u{i}", "avsr(4,2)", 1)


@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_corruptions_get_worse_with_their_severity(kind: str) -> None:
    clips = [clip(50, seed) for seed in range(20)]

    def damage(severity: float) -> float:
        broken = [corrupt(video, kind, severity, f"u{i}") for i, video in enumerate(clips)]
        assert all(b.shape == v.shape and b.dtype == np.uint8 for b, v in zip(broken, clips, strict=True))
        return float(np.mean([np.mean(b != v) for b, v in zip(broken, clips, strict=True)]))

    assert damage(0.0) == 0
    assert 0 < damage(0.1) <= damage(0.5) < damage(1.0) + (kind == "blur")
    np.testing.assert_array_equal(corrupt(clips[0], kind, 0.5, "u"), corrupt(clips[0].copy(), kind, 0.5, "u"))
    with pytest.raises(UserError, match=r"severity 1\.5: choose from 0"):
        corrupt(clips[0], kind, 1.5, "u")
    with pytest.raises(UserError, match="corruption 'fog' is unknown: choose from occlusion, blur"):
        corrupt(clips[0], "fog", 0.5, "u")


def test_corruptions_break_the_share_that_they_say() -> None:
    video = np.full((200, 96, 96), 90, np.uint8)
    missing = (corrupt(video, "missing_frames", 0.3, "u") == 0).all((1, 2))
    assert missing.sum() == 60
    starts = np.flatnonzero(np.diff(missing.astype(int)) == 1)
    assert len(starts) < 25, "frames go missing in runs"
    whole = [corrupt(video, "missing_video", 0.3, f"u{i}").any() for i in range(400)]
    assert np.mean(whole) == pytest.approx(0.7, abs=0.1)
    occluded = corrupt(video, "occlusion", 0.5, "u")
    changed = (occluded != video).any(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert len(rows) == len(columns) == 48 == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1
    assert (occluded == occluded[0]).all(), "the patch stands still"
    sharp = clip(5)
    contrasts = [corrupt(sharp, "blur", severity, "u").std() for severity in (0.0, 0.05, 0.2, 1.0)]
    assert contrasts == sorted(contrasts, reverse=True) and contrasts[-1] < 0.1 * contrasts[0]


def transform_of(augmentation: Augmentation, stream: str) -> Callable[..., np.ndarray]:
    """What is done to a clip of a stream."""
    return augmentation.video if stream == "video" else lambda *clip: augmentation.audio(*clip)[0]


def test_an_augmented_clip_is_a_function_of_seed_utterance_and_draw(tiny_corpus: Corpus) -> None:
    first, second = tiny_corpus.split("train")[:2]
    augmentation = Augmentation.open(PAPER, tiny_corpus, "train", 0)
    other = Augmentation.open(PAPER, Corpus.open(tiny_corpus.directory), "train", 0)
    for stream in ("audio", "video"):
        raw = {each.id: getattr(tiny_corpus, stream)(each) for each in (first, second)}
        for clip in raw.values():
            clip.setflags(write=False)
        transform, again = transform_of(augmentation, stream), transform_of(other, stream)
        made = {(each.id, draw): transform(raw[each.id], each, draw) for each in (first, second) for draw in range(3)}
        for each in (second, first):  # another object, another order
            for draw in (2, 0, 1):
                np.testing.assert_array_equal(again(raw[each.id], each, draw), made[each.id, draw])
        assert len({value.tobytes() for value in made.values()}) == 6, "each draw is another one"
        reseeded = transform_of(Augmentation.open(PAPER, tiny_corpus, "train", 1), stream)
        assert not np.array_equal(reseeded(raw[first.id], first, 0), made[first.id, 0])
    assert made[first.id, 0].shape == (first.frames, 88, 88)


def test_ratios_are_drawn_evenly_and_zero_db_is_among_them(tiny_corpus: Corpus) -> None:
    augmentation = Augmentation.open(PAPER, tiny_corpus, "train", 0)
    utterance = tiny_corpus.split("train")[0]
    drawn = [augmentation.snr(utterance, draw) for draw in range(1400)]
    for snr in (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, None):
        assert 130 < drawn.count(snr) < 270, snr
    speech, plain = tiny_corpus.audio(utterance), AugmentationConfig(noise=NoiseConfig("babble", snr=[0.0]))
    mixed, line = Augmentation.open(plain, tiny_corpus, "train", 0).audio(speech, utterance, 7)
    noise = augmentation.noise.noise(utterance, 7)  # type: ignore[union-attr]
    assert measure_snr(speech, noise, mixed) == pytest.approx(0, abs=0.01)
    assert line is not None and (line["id"], line["draw"], line["snr"]) == (utterance.id, 7, 0.0)
    seldom = AugmentationConfig(noise=NoiseConfig("babble", snr=[0.0], probability=0.25))
    drawn = [Augmentation.open(seldom, tiny_corpus, "train", 0).snr(utterance, draw) for draw in range(400)]
    assert drawn.count(0.0) / 400 == pytest.approx(0.25, abs=0.12)


def test_no_augmentation_leaves_clips_as_they_are(tiny_corpus: Corpus) -> None:
    nothing, utterance = AugmentationConfig(), tiny_corpus.split("train")[0]
    assert not nothing.active and PAPER.active
    augmentation = Augmentation.open(nothing, tiny_corpus, "train", 0)
    audio, video = tiny_corpus.audio(utterance), tiny_corpus.video(utterance)
    assert augmentation.video(video, utterance, 1) is video
    same, line = augmentation.audio(audio, utterance, 1)
    assert same is audio and line is None
