"""A training step as plain transformers and PEFT make it, the way public code of this family is written.

LoRA on the query and value projections of every layer, views one after another with their clips padded to the longest,
logits at every position, the loss of transformers, AdamW of torch. The same frozen LLM in the same precision reads the
same clips, and the projectors are of the same sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mome_dist.speech.sequence import AUDIO, VIDEO, Example
from mome_dist.speech.views import View

# Trains about as many numbers as a token uses of MoME's: four experts of 12 units and a shared one, and the router.
RANK = 45
IGNORED = -100  # the label that transformers' loss skips


class PeftStep:
    """The model and its optimiser.

    Args:
        llm: directory of the frozen LLM.
        widths: feature width of each stream.
        projector_size: width between a projector's two linear maps.
        dtype: of the LLM.
    """

    def __init__(self, llm: Path, widths: Mapping[str, int], projector_size: int, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, local_files_only=True)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self._model: Any = get_peft_model(base, config).train()
        self._embed, hidden_size = base.get_input_embeddings(), base.config.hidden_size
        self.projectors = nn.ModuleDict(
            {
                stream: nn.Sequential(
                    nn.Linear(width, projector_size),
                    nn.ReLU(),
                    nn.Linear(projector_size, hidden_size),
                    nn.LayerNorm(hidden_size),
                )
                for stream, width in widths.items()
            }
        )
        trained = [p for p in (*self._model.parameters(), *self.projectors.parameters()) if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def __call__(
        self, sequences: Sequence[tuple[View, Sequence[Example]]], features: Mapping[str, Sequence[Tensor]]
    ) -> float:
        """One step; the sum of the views' losses.

        Args:
            sequences: the clips of every view.
            features: of each stream, [frames, width] of every clip.
        """
        self._optimizer.zero_grad()
        loss = 0.0
        for view, examples in sequences:
            loss_of_view = self._loss(view, examples, features)
            loss_of_view.backward()
            loss += float(loss_of_view.detach())
        self._optimizer.step()
        return loss

    def _loss(self, view: View, examples: Sequence[Example], features: Mapping[str, Sequence[Tensor]]) -> Tensor:
        embedded, labels = [], []
        for clip, example in enumerate(examples):
            ids = torch.tensor(example.ids)
            embedded_TH = self._embed(ids.clamp(min=0)).detach()
            for stream, rate, placeholder in (("audio", view.audio_rate, AUDIO), ("video", view.video_rate, VIDEO)):
                if rate is not None:
                    pooled = F.avg_pool1d(features[stream][clip].t(), rate).t()
                    tokens = self.projectors[stream](pooled).to(embedded_TH.dtype)
                    embedded_TH = embedded_TH.index_put(((ids == placeholder).nonzero()[:, 0],), tokens)
            embedded.append(embedded_TH)
            labels.append(torch.where(torch.arange(len(ids)) < example.prefix_length, IGNORED, ids))
        inputs_BTH = pad_sequence(embedded, batch_first=True)
        mask_BT = pad_sequence([torch.ones(len(each), dtype=torch.long) for each in labels], batch_first=True)
        labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return self._model(inputs_embeds=inputs_BTH, attention_mask=mask_BT, labels=labels_BT).loss
