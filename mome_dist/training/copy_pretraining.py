"""Pre-train a small LLM to read a stretched, damaged sentence and write it out clean.

A speech LLM's prefix is a sentence spoken slowly: every word lasts several tokens, some are wrong, some are silence,
and it may come twice, heard and seen. A small LLM that has only seen sentences cannot use such a prefix when frozen;
one that was pre-trained to denoise it can. Sequences have the form that MoME will use, with words in place of speech:

    <bos> <audio> w1 w1 <blank> w2 .. </audio> <video> w1 w7 w2 .. </video> prompt w1 w2 .. <eos>

with the loss on the sentence and ``<eos>`` only. Half of the sentences are the training split's, half are spliced from
them word by word (position by position, sentences of one length); no sentence of another split is ever shown.

Data parallelism: a step's rows are a pure function of the seed and the step and are dealt out to the ranks; gradients
are sums over all label tokens of the global batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mome_dist.llm import tiny
from mome_dist.llm.precision import fast_precision
from mome_dist.parallel.plain_world import World
from mome_dist.training.pretraining_settings import CopySettings
from mome_dist.training.step_progress import StepReport, ignore

IGNORED = -100
MAX_STRETCH = (1, 1, 2, 4)
SUBSTITUTION_RATES = (0.0, 0.0, 0.1, 0.25)
BLANK_RATE = 0.3
TASK_SHARES = {"asr": 0.4, "vsr": 0.4, "avsr": 0.2}


class CopyTask:
    """Makes rows: token ids and the position where the labels start.

    Args:
        tokenizer: of `tiny.word_tokenizer`.
        texts: sentences to train on.
        held_out: sentences that splicing must never produce.
        splice_share: probability that a sentence is spliced.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: Iterable[str],
        held_out: Iterable[str] = (),
        splice_share: float = 0.5,
    ) -> None:
        self._splice_share = splice_share
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tiny.SPECIAL_TOKENS}
        self._prompts = {task: self._words(tokenizer, prompt) for task, prompt in tiny.PROMPTS.items()}
        self._sentences = [self._words(tokenizer, text) for text in texts]
        self._held_out = {tuple(self._words(tokenizer, text)) for text in held_out}
        self._by_length: dict[int, list[list[int]]] = defaultdict(list)
        for sentence in self._sentences:
            self._by_length[len(sentence)].append(sentence)
        self._vocabulary = sorted({word for sentence in self._sentences for word in sentence})

    @staticmethod
    def _words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def row(self, seed: Sequence[int]) -> tuple[list[int], int]:
        """Return (ids, start of the labels); a pure function of ``seed``."""
        draw = np.random.default_rng(list(seed))
        sentence = self._sentence(draw)
        task = str(draw.choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))
        ids = [self._ids[tiny.BOS]]
        if task in ("asr", "avsr"):
            ids += [self._ids[tiny.AUDIO_OPEN], *self._stretch(sentence, draw), self._ids[tiny.AUDIO_CLOSE]]
        if task in ("vsr", "avsr"):
            ids += [self._ids[tiny.VIDEO_OPEN], *self._stretch(sentence, draw), self._ids[tiny.VIDEO_CLOSE]]
        ids += self._prompts[task]
        return [*ids, *sentence, self._ids[tiny.EOS]], len(ids)

    def _sentence(self, draw: np.random.Generator) -> list[int]:
        sentence = self._sentences[draw.integers(len(self._sentences))]
        if draw.random() >= self._splice_share:
            return sentence
        peers = self._by_length[len(sentence)]
        sources = draw.integers(len(peers), size=len(sentence))
        spliced = [peers[source][position] for position, source in enumerate(sources)]
        return sentence if tuple(spliced) in self._held_out else spliced

    def _stretch(self, sentence: Sequence[int], draw: np.random.Generator) -> list[int]:
        """Repeat words, put some blanks before them, and replace some repetitions by other words."""
        longest = int(draw.choice(MAX_STRETCH))
        substitution = float(draw.choice(SUBSTITUTION_RATES))
        stretched: list[int] = []
        for word in sentence:
            if draw.random() < BLANK_RATE:
                stretched += [self._ids[tiny.BLANK]] * int(draw.integers(1, longest + 1))
            for _ in range(int(draw.integers(1, longest + 1))):
                wrong = draw.random() < substitution
                stretched.append(self._vocabulary[draw.integers(len(self._vocabulary))] if wrong else word)
        return stretched


class CopyTrainer:
    """Model and optimiser of one pre-training run on one rank; products are bf16 where rank 0's device has them."""

    def __init__(self, model: LlamaForCausalLM, task: CopyTask, settings: CopySettings, world: World) -> None:
        self.model, self.task, self.settings, self.world = model.to(world.device), task, settings, world
        self.bf16 = world.agree(fast_precision() == "bf16")
        model.set_attn_implementation("eager")  # on rows this short a quarter faster than SDPA on a CPU
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def train(self, report: StepReport = ignore) -> None:
        """Take every step."""
        self.model.train()
        for step in range(self.settings.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            loss, accuracy = self.gradients(step)
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            self.optimizer.step()
            report(step, loss, accuracy)
        self.model.eval()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to a twentieth at ``settings.steps``."""
        warmup = min(1.0, (step + 1) / self.settings.warmup_steps)
        return self.settings.learning_rate * warmup * max(0.05, 1.0 - step / self.settings.steps)

    def gradients(self, step: int) -> tuple[float, float]:
        """Fill every gradient with that of the global batch; return its mean loss and token accuracy."""
        self.optimizer.zero_grad(set_to_none=False)
        rows = [self.task.row((self.settings.seed, step, i)) for i in range(self.settings.batch_size)]
        total = sum(len(ids) - start for ids, start in rows)
        rows.sort(key=lambda row: len(row[0]))  # rows of like length share a forward pass and pad little
        sums = torch.zeros(2, device=self.world.device)
        # Two forward passes a rank: short rows together, long rows together.
        mine = rows[self.world.rank :: self.world.size]
        for part in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):
            if part:
                loss, right = self._sums(part)
                (loss / total).backward()
                sums += torch.stack([loss.detach(), right]) / total
        for parameter in self.parameters:
            if parameter.grad is None:  # a rank without a row
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_([*(parameter.grad for parameter in self.parameters if parameter.grad is not None), sums])
        loss_value, accuracy = sums.tolist()
        return loss_value, accuracy

    @torch.no_grad()
    def accuracy(self, task: CopyTask, rows: int = 256) -> float:
        """Token accuracy, given the true words before it, over ``rows`` rows of another task, over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        mine = [task.row((self.settings.seed, i)) for i in range(self.world.rank, rows, self.world.size)]
        for start in range(0, len(mine), self.settings.batch_size):
            part = mine[start : start + self.settings.batch_size]
            labels = sum(len(ids) - first for ids, first in part)
            sums += torch.stack([self._sums(part)[1].double(), torch.tensor(float(labels), dtype=torch.float64)])
        self.world.sum_([sums])
        return float(sums[0] / sums[1])

    def _sums(self, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Return summed cross-entropy and number of right tokens over the labels of ``rows``."""
        length = max(len(ids) for ids, _ in rows)
        ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
        labels_BS = torch.full((len(rows), length), IGNORED)
        for row, (ids, start) in enumerate(rows):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
            labels_BS[row, start : len(ids)] = torch.tensor(ids[start:])
        # Padding stands on the right, where causal attention never looks back from a label.
        kept_BS = labels_BS[:, 1:] != IGNORED
        labels = labels_BS[:, 1:][kept_BS].to(self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
            hidden_BSH = self.model.model(input_ids=ids_BS[:, :-1].to(self.world.device), use_cache=False)[0]
            logits = self.model.lm_head(hidden_BSH[kept_BS.to(self.world.device)]).float()
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum().float()
