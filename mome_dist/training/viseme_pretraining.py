"""Pre-train the video encoder to name the viseme of every frame.

A corpus that knows which viseme each video frame shows (a generator's own alignment, or a forced aligner's) gives a
dense target: 25 labels a second instead of one sentence a clip. Two minutes of it on two CPU cores give features from
which speech can be read; end to end, the same encoder learns nothing in that time.

Data parallelism: each batch is cut into groups of ``group_size`` clips and the groups are dealt out to the ranks. A
group is one forward pass, so BatchNorm sees the same clips whatever the number of ranks ("ghost batch normalisation",
Hoffer et al., 2017), and gradients are sums over all frames of the global batch. At the end the BatchNorm statistics
are measured anew with the final weights on a fixed set of training clips ("precise BatchNorm", Wu and Johnson, 2021),
and so are the mean and variance of the features, which the encoder stores to standardise its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.errors import UserError
from mome_dist.parallel.plain_world import World
from mome_dist.speech.video_encoder import VideoEncoder, VideoEncoderConfig
from mome_dist.training.pretraining_settings import VisemeSettings
from mome_dist.training.step_progress import StepReport, ignore

Clip = tuple[Tensor, Tensor]
"""Frames uint8 [T, H, W] and their visemes int64 [T]."""


class ClipCache:
    """Decoded clips of a corpus, kept in memory up to a budget. Beyond it clips are decoded again at each use."""

    def __init__(self, corpus: Corpus, budget_bytes: int = 1 << 30) -> None:
        if corpus.viseme_names is None:
            raise UserError(
                f"{corpus.directory} has no visemes: pre-train on a corpus whose manifest has 'viseme_names', "
                "such as that of mome-dist prepare synthetic."
            )
        self.corpus = corpus
        self.classes = len(corpus.viseme_names)
        self._free = budget_bytes
        self._clips: dict[str, Clip] = {}

    def __call__(self, utterance: Utterance) -> Clip:
        """Return the frames and visemes of an utterance. Raises UserError where they do not match."""
        if utterance.id in self._clips:
            return self._clips[utterance.id]
        frames = torch.from_numpy(self.corpus.video(utterance))
        visemes = torch.tensor(self.corpus.metadata(utterance).get("visemes", []), dtype=torch.int64)
        if len(visemes) != len(frames) or not bool(((visemes >= 0) & (visemes < self.classes)).all()):
            raise UserError(
                f"{self.corpus.directory}: utterance {utterance.id!r} has {len(frames)} frames but its metadata does "
                f"not hold as many visemes in 0..{self.classes - 1}. Make the corpus again."
            )
        if frames.numel() <= self._free:
            self._free -= frames.numel()
            self._clips[utterance.id] = frames, visemes
        return frames, visemes


class VisemeTrainer:
    """Encoder, classifier and optimiser of one pre-training run on one rank."""

    def __init__(
        self,
        clips: Callable[[Utterance], Clip],
        classes: int,
        utterances: Sequence[Utterance],
        settings: VisemeSettings,
        world: World,
        config: VideoEncoderConfig | None = None,
    ) -> None:
        if len(utterances) < settings.batch_size:
            raise UserError(
                f"Viseme pre-training: batch_size={settings.batch_size} exceeds the {len(utterances)} training clips."
            )
        self.clips, self.utterances, self.settings, self.world = clips, utterances, settings, world
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        self.encoder = VideoEncoder(config).to(world.device)
        self.classifier = nn.Linear(self.encoder.width, classes).to(world.device)
        self.parameters = [*self.encoder.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def train(self, report: StepReport = ignore) -> VideoEncoder:
        """Take every step, measure the final statistics and return the encoder, in eval mode."""
        for step in range(self.settings.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            loss, accuracy = self.gradients(step)
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            self.optimizer.step()
            report(step, loss, accuracy)
        self.calibrate()
        return self.encoder

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay towards zero at ``settings.steps``."""
        warmup = min(1.0, (step + 1) / self.settings.warmup_steps)
        return self.settings.learning_rate * warmup * max(0.02, 1.0 - step / self.settings.steps)

    def gradients(self, step: int) -> tuple[float, float]:
        """Fill every parameter's gradient with that of the global batch; return its mean loss and frame accuracy.

        The loss is the mean over all frames of the batch, so a group's share depends on its frames, not on its rank.
        """
        self.encoder.train()
        self.optimizer.zero_grad(set_to_none=False)
        batch = self.batch(step)
        total = sum(min(utterance.frames, self.settings.window_frames) for utterance in batch)
        sums = torch.zeros(2, device=self.world.device)
        size = self.settings.group_size
        for start in range(self.world.rank * size, len(batch), self.world.size * size):
            group = [self.augment(batch[i], step, i) for i in range(start, start + size)]
            labels = torch.cat([visemes for _, visemes in group]).to(self.world.device)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.bf16):
                features = torch.cat(self.encoder([frames for frames, _ in group]))
            logits = self.classifier(features.float())
            loss = F.cross_entropy(logits, labels, reduction="sum") / total
            loss.backward()
            sums += torch.stack([loss.detach(), (logits.argmax(-1) == labels).float().sum() / total])
        for parameter in self.parameters:
            if parameter.grad is None:  # a rank without a group
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_([*(parameter.grad for parameter in self.parameters if parameter.grad is not None), sums])
        loss_value, accuracy = sums.tolist()
        return loss_value, accuracy

    def batch(self, step: int) -> list[Utterance]:
        """The utterances of a step: a pure function of the seed and the step."""
        steps_per_epoch = len(self.utterances) // self.settings.batch_size
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.utterances))
        start = position * self.settings.batch_size
        return [self.utterances[i] for i in order[start : start + self.settings.batch_size]]

    def augment(self, utterance: Utterance, step: int, position: int) -> Clip:
        """Cut a random window and a random crop and flip half of the clips; fixed by (seed, step, position)."""
        draw = np.random.default_rng([self.settings.seed, step, position])
        frames, visemes = self.clips(utterance)
        first = int(draw.integers(max(1, len(frames) - self.settings.window_frames + 1)))
        crop = self.encoder.config.crop
        top, left = (int(draw.integers(extent - crop + 1)) for extent in frames.shape[1:])
        window = slice(first, first + self.settings.window_frames)
        frames = frames[window, top : top + crop, left : left + crop]
        return (frames.flip(-1) if draw.random() < 0.5 else frames), visemes[window]

    @torch.no_grad()
    def calibrate(self) -> None:
        """Measure the BatchNorm statistics and the features' mean and deviation with the final weights."""
        picked = np.random.default_rng([self.settings.seed]).permutation(len(self.utterances))
        clips = [self.utterances[i] for i in picked[: self.settings.calibration_clips]]
        size = self.settings.group_size
        groups = [clips[i : i + size] for i in range(0, len(clips), size)]
        mine = groups[self.world.rank :: self.world.size]

        norms = [module for module in self.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over groups
        self.encoder.train()
        for group in mine:
            self.encoder([self.clips(utterance)[0] for utterance in group])
        statistics = [
            buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
        for buffer in statistics:
            buffer.mul_(len(mine) / len(groups))
        self.world.sum_(statistics)
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(len(groups))

        self.encoder.eval()
        moments = torch.zeros(2, self.encoder.width, dtype=torch.float64, device=self.world.device)
        frames = sum(utterance.frames for utterance in clips)
        for group in mine:
            features = torch.cat(self.encoder([self.clips(utterance)[0] for utterance in group])).double()
            moments += torch.stack([features.sum(0), features.square().sum(0)]) / frames
        self.world.sum_([moments])
        self.encoder.feature_mean.copy_(moments[0])
        self.encoder.feature_std.copy_((moments[1] - moments[0].square()).clamp_min(1e-6).sqrt())

    @torch.no_grad()
    def accuracy(self, utterances: Sequence[Utterance]) -> float:
        """Fraction of frames whose viseme is named right, over whole clips, in eval mode, over all ranks.

        Call it after `train`: the classifier was trained on features before they were standardised.
        """
        self.encoder.eval()
        counts = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        mine = utterances[self.world.rank :: self.world.size]
        for start in range(0, len(mine), self.settings.group_size):
            group = [self.clips(utterance) for utterance in mine[start : start + self.settings.group_size]]
            features = torch.cat(self.encoder([frames for frames, _ in group]))
            features = features * self.encoder.feature_std + self.encoder.feature_mean
            labels = torch.cat([visemes for _, visemes in group]).to(self.world.device)
            right = (self.classifier(features).argmax(-1) == labels).sum()
            counts += torch.stack([right, torch.tensor(len(labels), device=right.device)])
        self.world.sum_([counts])
        right_count, frames = counts.tolist()
        return right_count / frames if frames else math.nan
