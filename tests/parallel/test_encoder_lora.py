"""LoRA on the encoders: every layout trains it as autograd through one graph does, and what was trained stays."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist import evaluate
from mome_dist.checkpoint.format import CheckpointReader, find_checkpoint
from mome_dist.checkpoint.reshard import reshard
from mome_dist.config import RunConfig, load_config
from mome_dist.data.corpus import Corpus
from mome_dist.data.parts import Parts
from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.parallel.layout import Layout
from mome_dist.preflight import validate
from mome_dist.training import loop
from mome_dist.training.batches import BatchBuilder
from mome_dist.verification.compare import compare
from mome_dist.verification.run import EPSILON, Outcome, merged
from tests.parallel.adapting import adapt, adapt_in_one_graph, save_lively_encoder
from tests.parallel.runs import Lab, lines, losses_by_view
from tests.parallel.worlds import run_world

VIDEO = "video_encoder.lora={rank: 4, alpha: 8, targets: [q_proj, k_proj, v_proj, output_dense]}"
# Both streams and both together in every step; auxiliary losses that weigh in.
BOTH = [
    "data.features=online",
    VIDEO,
    "audio_encoder.lora={rank: 2, alpha: 4}",
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[16]",
    "task.avsr_video_rates=[5]",
    "task.views_per_step=null",
    "data.accumulation=2",
    "mome.balance_loss=0.1",
    "mome.z_loss=0.01",
    "optimizer.gradient_clipping=0.5",
    "parallel=single",
]
OPTIMIZERS = {
    "sgd": ["optimizer=sgd", "optimizer.learning_rate=0.1"],
    "adamw": ["optimizer.learning_rate=1e-2", f"optimizer.epsilon={EPSILON}"],
}
# Quick whole runs.
LIPS = ["data.features=online", "task=vsr", "task.views_per_step=2", "data.bucket_batches=1", "parallel=single"]
STEPS = 3

Reference = Callable[[str, int], Outcome]


@pytest.fixture(scope="module")
def lab(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lively = tmp_path_factory.mktemp("lively")
    save_lively_encoder(Corpus.open(lab.corpus), lively)
    return dataclasses.replace(lab, video_encoder=lively)


@pytest.fixture(scope="module")
def one_graph(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The outcome of autograd in one graph, by optimiser and number of clips that are encoded together."""

    @cache
    def outcome(optimizer: str, clips_together: int) -> Outcome:
        overrides = lab.overrides(tmp_path_factory.mktemp("graph"), *BOTH, *OPTIMIZERS[optimizer])
        return run_world(adapt_in_one_graph, 1, overrides, lab.cache, STEPS, clips_together)[0]

    return outcome


# From the second step on, features that differ by the rounding of fp32 sums are rounded to float16, and one near the
# middle of two values may go the other way: by 2^-11 of itself. Whatever its weight in a gradient, that sums over 50
# tokens and more of a stream, each of one frame at least: 2^-11 / 50 = 1e-5 of the sum. Two of them in the same weight
# are 2e-5. (With features that are not rounded, weights agree to 6e-7.)
AFTER_ROUNDING = 2e-5


# Clips are encoded one by one where ranks share them: an encoder's sums depend on the shape of its batch in their last
# bits, and one of these may decide how a feature is rounded to float16.
@pytest.mark.parametrize(
    ("world", "optimizer", "clips_together", "more"),
    [
        (1, "sgd", 8, []),
        (2, "sgd", 1, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (2, "sgd", 1, ["parallel.pp=2", "parallel.virtual=2", "deepspeed=zero0"]),
        (4, "sgd", 1, ["parallel.tp=2", "deepspeed=zero2", "parallel.recompute=full"]),
        (4, "adamw", 1, ["parallel.ep=2", "parallel.pp=2"]),
    ],
)
def test_every_layout_trains_as_one_graph_does(
    lab: Lab,
    one_graph: Reference,
    tmp_path: Path,
    world: int,
    optimizer: str,
    clips_together: int,
    more: list[str],
) -> None:
    """Losses, norms, all gradients of the first step, and all weights after three."""
    overrides = lab.overrides(tmp_path, *BOTH, *OPTIMIZERS[optimizer], *more)
    outcome = merged(run_world(adapt, world, overrides, lab.cache, STEPS, clips_together))
    adapted = [name for name in outcome.gradients if name.startswith("lora.")]
    # 2 layers of 4 targets of the video encoder, 2 of 2 of Whisper.
    assert len(adapted) == 2 * (2 * 4 + 2 * 2) and all(outcome.gradients[name].any() for name in adapted)
    reference = one_graph(optimizer, clips_together)
    apart = [each for each in compare(outcome, reference).mismatches if each.what != "weight"]
    comparison = compare(outcome, reference, AFTER_ROUNDING)
    assert not apart and not comparison.mismatches, (apart[:5], comparison.mismatches[:5])


def test_more_ranks_than_clips(lab: Lab, tmp_path: Path) -> None:
    """One of the two has no share of the only clip, and adds nothing."""
    single = [*LIPS, VIDEO, "data.batch_size=1", "training.steps=4"]
    # Comparing the gradients of views leaves those of the encoder alone.
    comparing = {1: "mome.conflict_every=0", 2: "mome.conflict_every=2"}
    one, two = (lab.train(tp, tmp_path / str(tp), *single, each, tp=tp) for tp, each in comparing.items())
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(lines(tmp_path / "2/conflicts.jsonl")) == 2


def test_a_stream_that_is_dropped_everywhere_trains_nothing(lab: Lab, tmp_path: Path) -> None:
    dropped = ["task=avsr", "augmentation.modality_dropout.video=1", "optimizer=sgd", "training.steps=2"]
    lab.train(2, tmp_path, *LIPS, VIDEO, *dropped)
    with CheckpointReader(find_checkpoint(tmp_path)) as reader:
        terms = [name for name in reader.names("model/lora.") if name.endswith("lora_b")]
        assert len(terms) == 8 and not any(reader.read(name).any() for name in terms)


def test_a_damaged_validation_clip_is_left_out(lab: Lab, tmp_path: Path) -> None:
    """Though no cache of features met it before."""
    corpus = Corpus.open(shutil.copytree(lab.corpus, tmp_path / "corpus"))
    utterance = corpus.split("validation")[1]
    offset, size = utterance.members["mp4"]
    with (corpus.directory / utterance.shard).open("r+b") as shard:
        shard.seek(offset + size // 2)
        shard.write(bytes(64))
    damaged = dataclasses.replace(lab, corpus=corpus.directory)
    more = ["training.steps=1", "training.validate_every=1"]
    with pytest.raises(RuntimeError, match=rf"{utterance.id}\.mp4: its bytes have changed"):
        damaged.train(1, tmp_path / "strict", *LIPS, VIDEO, *more)
    damaged.train(1, tmp_path / "lenient", *LIPS, VIDEO, *more, "data.max_damaged_utterances=1")
    assert lines(tmp_path / "lenient/metrics.jsonl")[-1]["validation"]


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses and directory of a run, with a checkpoint halfway."""
    output = tmp_path_factory.mktemp("whole")
    more = ["training.steps=10", "training.save_every=5", "training.validate_every=10"]
    return lab.train(1, output, *LIPS, VIDEO, *more), output


def test_it_begins_as_the_run_without(lab: Lab, whole: tuple[list[float], Path], tmp_path: Path) -> None:
    """B starts at zero; after a step the features are others."""
    frozen, (adapted, _) = lab.train(1, tmp_path, *LIPS, "training.steps=2"), whole
    assert frozen[0] == adapted[0] and frozen[1] != adapted[1]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_resume_continues_at_any_layout(lab: Lab, whole: tuple[list[float], Path], tmp_path: Path, tp: int) -> None:
    losses, run = whole
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints/step-000010")
    (broken / "checkpoints/latest").write_text("step-000005")
    rest = lab.train(tp, broken, *LIPS, VIDEO, "training.steps=10", "training.validate_every=10", tp=tp)
    np.testing.assert_allclose(rest, losses[5:], rtol=1e-5)
    validation, again = (lines(folder / "metrics.jsonl")[-1]["validation"] for folder in (run, broken))
    for view in validation:
        np.testing.assert_allclose(again[view], validation[view], rtol=1e-5)
    with CheckpointReader(find_checkpoint(run)) as one, CheckpointReader(find_checkpoint(broken)) as other:
        assert len(one.names("model/lora.video.")) == len(one.names("optimizer/exp_avg/lora.video.")) == 16
        assert set(one.names("model/")) == set(other.names("model/"))
        assert tp == 2 or (one.content == other.content and rest == losses[5:])


def test_checkpoints_are_converted_with_it(whole: tuple[list[float], Path], tmp_path: Path) -> None:
    reshard(whole[1], tmp_path / "native", "deepspeed", Layout(2, 2, 1, 1), 1)
    reshard(tmp_path / "native", tmp_path / "back", "canonical", Layout(1, 1, 1, 2), 1)
    with CheckpointReader(find_checkpoint(whole[1])) as before, CheckpointReader(tmp_path / "back") as after:
        assert before.content == after.content and after.names("model/lora.") == before.names("model/lora.") != []


def _validation(run: LoadedRun) -> dict[str, float]:
    """Losses over the validation split, of clips that the run's own encoders encode as decoding does."""
    corpus = Corpus.open(run.config.data.corpus)
    utterances = corpus.split("validation")
    with torch.no_grad():
        clips = run.encoders()["video"]([torch.from_numpy(corpus.video(each)) for each in utterances])
        features = {each.id: clip.half() for each, clip in zip(utterances, clips, strict=True)}
        readers = {"video": features.__getitem__}
        builder = BatchBuilder(utterances, run.sequences, readers, Parts(), 0, 1, run.device, Layout.for_world(1))
        step = builder.build(range(len(utterances)), run.views)
        return losses_by_view(run, step)


def _decoded(run: Path, target: Path, cache_directory: Path) -> list[dict[str, float]]:
    """Validation losses of a run, of its export and of the run before training, each in one process."""
    os.environ["MOME_DIST_CACHE"] = str(cache_directory)
    export_adapter(run, target)
    return [_validation(loaded) for loaded in (load_run(run), load_run(target), load_run(run, weights=False))]


def test_decoding_and_exports_have_the_trained_encoder(
    lab: Lab, whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    run, exported, untrained = run_world(_decoded, 1, whole[1], tmp_path / "export", lab.cache)[0]
    trained = lines(whole[1] / "metrics.jsonl")[-1]["validation"]
    assert exported == run and run.keys() == trained.keys()
    for view, loss in trained.items():
        np.testing.assert_allclose(run[view], loss, rtol=1e-5)
        assert abs(untrained[view] / loss - 1) > 1e-3
    card = (tmp_path / "export/README.md").read_text()
    assert (
        "LoRA of the video encoder: `{rank: 4, alpha: 8," in card and "with projectors from encoders with LoRA" in card
    )


@pytest.mark.parametrize("key", ["training.resume=true", "training.init_from"])
@pytest.mark.parametrize("other", ["video_encoder.lora={rank: 4, alpha: 9}", "video_encoder.lora=null"])
def test_other_terms_are_refused(
    lab: Lab, whole: tuple[list[float], Path], tmp_path: Path, key: str, other: str
) -> None:
    run = whole[1] if key.endswith("true") else tmp_path
    more = [] if key.endswith("true") else [f"{key}={whole[1]}"]
    refusal = r"was trained with video_encoder\.lora=\{rank: 4, alpha: 8, .*set it back, or "
    with pytest.raises(RuntimeError, match=refusal + (r"name another training\.init_from" if more else "start anew")):
        lab.train(1, run, *LIPS, other, *more)


def test_a_run_may_start_from_the_weights_of_another(lab: Lab, whole: tuple[list[float], Path], tmp_path: Path) -> None:
    """It may be one with the same terms and the same encoder, or one without any, its projectors kept."""
    start = [*LIPS, VIDEO, "training.steps=3"]
    assert lab.train(1, tmp_path / "same", *start, f"training.init_from={whole[1]}")[0] < whole[0][0]
    save_lively_encoder(Corpus.open(lab.corpus), tmp_path / "encoder", seed=1)
    other = [f"training.init_from={whole[1]}", f"video_encoder.path={tmp_path / 'encoder'}"]
    with pytest.raises(RuntimeError, match="was trained with another video_encoder"):
        lab.train(1, tmp_path / "other", *start, *other)
    frozen = lab.train(1, tmp_path / "frozen", *LIPS, "training.steps=2")
    kept = ["projector.trainable=false", f"training.init_from={tmp_path / 'frozen'}"]
    assert lab.train(1, tmp_path / "adapted", *start, *kept)[0] < frozen[0]
    with CheckpointReader(find_checkpoint(tmp_path / "adapted")) as reader:
        assert all(reader.read(name).any() for name in reader.names("model/lora."))


def test_evaluation_has_no_untrained_encoder(
    whole: tuple[list[float], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([f"checkpoint={whole[1]}", "baselines=[untrained]"]) != 0
    assert "baselines=untrained: clips are encoded once, with the LoRA" in capsys.readouterr().err


def _train_while_the_encoder_moves(overrides: list[str], cache_directory: Path) -> None:
    os.environ["MOME_DIST_CACHE"] = str(cache_directory)
    validate_anew = loop._validate

    def nudging(config: RunConfig, trainer: loop.Trainer, step: int) -> dict[str, float]:
        with torch.no_grad():
            trainer.encoders["video"].get_submodule("front_end.stem").get_parameter("weight")[0, 0, 0, 0] += 1e-3
        return validate_anew(config, trainer, step)

    loop._validate = nudging
    config = load_config(overrides)
    loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))


def test_the_ledger_sees_a_frozen_weight_of_the_encoder_move(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(tmp_path, *LIPS, VIDEO, "training.steps=2", "training.validate_every=2")
    with pytest.raises(RuntimeError, match=r"frozen parameter video_encoder: front_end\.stem\.weight changed"):
        run_world(_train_while_the_encoder_moves, 1, overrides, lab.cache)
