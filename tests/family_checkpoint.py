"""A published checkpoint of Llama-AVSR, Llama-SMoP or Omni-AVSR, of any size: its names, its shapes, its arithmetic.

It shares no code with `mome_dist`: the LLM's layers are computed one by one on the modules of transformers, low-rank
terms before heads are split, projectors clip by clip, experts token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Parts
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.tiny_llms import SIZES, llama3, qwen2

PROMPTS = {
    "audio": "Transcribe speech to text .",
    "video": "Transcribe video to text .",
    "audiovisual": "Transcribe speech and video to text .",
}
RESERVED = ("<r0>", "<r1>", "<r2>", "<r3>")
WORDS = ("Transcribe", "speech", "video", "and", "to", "text", ".", "ship", "sea", "blue")
WIDTH, MIDDLE, RANK = 32, 12, 4


def llm_directory(path: Path, architecture: str = "llama") -> Path:
    """Write a plain LLM with a tokenizer that has reserved tokens, and none of the authors' tokens."""
    start = {"bos_token": "<s>"} if architecture == "llama" else {}
    ends = (
        {"eos_token": "</s>"} if architecture == "llama" else dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    )
    special = ["<unk>", *start.values(), ends["eos_token"], *RESERVED]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Parts([WhitespaceSplit(), Split(".", "isolated")])
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **start, **ends)
    # Qwen2.5 has more rows than tokens.
    rows = len(tokenizer) + (0 if architecture == "llama" else 7)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
    model = (llama3 if architecture == "llama" else qwen2)(vocab_size=rows, num_hidden_layers=2, **ids, **rope)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Published(nn.Module):
    """The authors' model without its encoders, whose features it is given.

    Args:
        llm, tokenizer: plain ones; tokens are added here.
        inputs: width of what each projector of a stream reads, by stream; one number is a projector without a number.
        norm: whether projectors end in a layer norm.
        experts: of a mixture in the place of projectors.
        own: each task has a low-rank term, with or without a shared one beside it.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: Any,
        inputs: dict[str, int | Sequence[int]],
        norm: bool = False,
        experts: int | None = None,
        own: bool = False,
        shared: bool = False,
        prompts: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.llm, self.tokenizer, self.own, self.shared = llm, tokenizer, own, shared
        markers = ["<audio>", "</audio>", "<video>", "</video>"]
        if llm.config.model_type == "llama":
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(markers, special_tokens=True)
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        hidden = llm.config.hidden_size
        with torch.no_grad():
            if llm.config.model_type == "llama":
                llm.model.embed_tokens.weight[-5:].normal_(std=0.3)

        def projector(width: int) -> nn.Sequential:
            parts = [nn.Linear(width, MIDDLE), nn.ReLU(), nn.Linear(MIDDLE, hidden)]
            return nn.Sequential(*parts, *([nn.LayerNorm(hidden)] if norm else []))

        if experts is not None:
            self.audiovisual_proj = nn.Module()
            self.audiovisual_proj.gate = nn.Linear(WIDTH, experts, bias=False)
            self.audiovisual_proj.experts = nn.ModuleList([projector(WIDTH) for _ in range(experts)])
        else:
            for stream, widths in inputs.items():
                several = not isinstance(widths, int)
                made = nn.ModuleList(map(projector, widths)) if several else projector(widths)  # type: ignore[arg-type]
                self.add_module(f"{stream}_proj", made)
        for layer in llm.model.layers:
            attention = layer.self_attn
            for name, projection in (("Q", attention.q_proj), ("V", attention.v_proj)):
                for part, a, b in (("down", hidden, RANK), ("up", RANK, projection.out_features)):
                    if own:
                        terms = nn.ModuleDict({task: nn.Linear(a, b, bias=False) for task in PROMPTS})
                        attention.add_module(f"lora_{part}_{name}", terms)
                        if shared:
                            attention.add_module(f"lora_{part}_{name}_shared", nn.Linear(a, b, bias=False))
                    else:
                        attention.add_module(f"lora_{part}_{name}", nn.Linear(a, b, bias=False))
        if prompts:
            for task, prompt in PROMPTS.items():
                self.register_buffer(f"prompt_{task}", self._embed(self._ids(prompt))[None].detach().clone())
        with torch.no_grad():
            for name, value in self.named_parameters():
                if ("_proj." in name and not name.startswith("llm.")) or "lora_" in name:
                    value.normal_(std=0.3)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _embed(self, ids: list[int]) -> Tensor:
        return self.llm.get_input_embeddings()(torch.tensor(ids))

    def _project(self, stream: str, tokens: Tensor, number: int | None) -> Tensor:
        if not hasattr(self, "audiovisual_proj"):
            projector = getattr(self, f"{stream}_proj")
            return (projector if number is None else projector[number])(tokens)
        rows, mixture = [], cast(Any, self.audiovisual_proj)
        for token in tokens:
            probabilities = mixture.gate(token).softmax(dim=-1)
            best = sorted(range(len(probabilities)), key=probabilities.tolist().__getitem__, reverse=True)[:2]
            total = sum(probabilities[e] for e in best)
            rows.append(torch.stack([probabilities[e] / total * mixture.experts[e](token) for e in best]).sum(dim=0))
        return torch.stack(rows)

    @torch.no_grad()
    def logits(
        self, task: str, speech: dict[str, tuple[Tensor, int, bool, int | None]], text: list[int], scale: float = 0.125
    ) -> Tensor:
        """[1 + text, vocabulary] from the end of the prefix on.

        Args:
            speech: of each stream the features of a clip, the rate, whether frames are stacked, and the projector.
        """
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        pieces = [self._embed(start)] if start else []
        for stream, (features, rate, stacked, number) in speech.items():
            whole = features[: len(features) // rate * rate].view(-1, rate, features.shape[1])
            tokens = self._project(stream, whole.flatten(1) if stacked else whole.mean(dim=1), number)
            marks = [self.tokenizer.convert_tokens_to_ids(mark) for mark in (f"<{stream}>", f"</{stream}>")]
            pieces += [self._embed(marks[:1]), tokens, self._embed(marks[1:])]
        x = torch.cat([*pieces, self._embed(self._ids(PROMPTS[task]) + text)])[None]
        for layer in self.llm.model.layers:
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), task, scale)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.llm.lm_head(self.llm.model.norm(x))[0, -1 - len(text) :]

    def _attention(self, part: Any, h: Tensor, task: str, scale: float) -> Tensor:
        def low(name: str) -> Tensor:
            down, up = getattr(part, f"lora_down_{name}"), getattr(part, f"lora_up_{name}")
            product = up[task](down[task](h)) if self.own else up(down(h))
            if self.shared:
                product = product + getattr(part, f"lora_up_{name}_shared")(
                    getattr(part, f"lora_down_{name}_shared")(h)
                )
            return scale * product

        length, config = h.shape[1], self.llm.config
        q, k, v = part.q_proj(h) + low("Q"), part.k_proj(h), part.v_proj(h) + low("V")
        q, k, v = (each.view(1, length, -1, part.head_dim).transpose(1, 2) for each in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *self.llm.model.rotary_emb(h, torch.arange(length)[None]))
        repeats = config.num_attention_heads // config.num_key_value_heads
        mixed = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), is_causal=True
        )
        return part.o_proj(mixed.transpose(1, 2).reshape(1, length, -1))


assert SIZES["hidden_size"] == WIDTH
