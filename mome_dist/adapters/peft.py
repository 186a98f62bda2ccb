"""Low-rank terms of the LLM as PEFT's library reads them, and back.

A folder holds what tokens of some views use, ``adapter_config.json`` and ``adapter_model.safetensors``:
``peft.PeftModel.from_pretrained(llm, folder)`` adds it to the plain Hugging Face model. Terms that are summed become
one of their ranks together, their factors side by side, so that the product is the same sum. PEFT multiplies by
``lora_alpha / r``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.terms import SHARED, LowRankTerms
from mome_dist.errors import UserError
from mome_dist.files import save_tensors
from mome_dist.parallel.parts import NamedPart

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = re.compile(rf"{PREFIX}\.(\d+)\.([qv])\.(\w+)\.([ab])")
_THEIRS = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qv])_proj\.lora_([AB])\.weight")
# Keys of PEFT's configuration that change what is computed, with the values that mean what is computed here.
_PLAIN = {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "lora_bias": False}
_EMPTY = ("alpha_pattern", "rank_pattern", "layers_to_transform", "layer_replication", "modules_to_save")


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
        rank: of each projection.
        scale: that products are multiplied by, PEFT's ``lora_alpha / r``.
        factors: A, fp32 [rank, in], and B, fp32 [out, rank], by layer and "q" or "v".
    """

    rank: int
    scale: float
    factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]

    def write(self, directory: Path, llm: str) -> None:
        """Fill a new directory.

        Args:
            llm: the model that it belongs to, as PEFT's ``base_model_name_or_path``.
        """
        directory.mkdir(parents=True)
        tensors = {}
        for (layer, projection), pair in self.factors.items():
            for letter, tensor in zip("AB", pair, strict=True):
                name = f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{letter}.weight"
                tensors[name] = tensor.detach().float().cpu().contiguous()
        save_tensors(tensors, directory / WEIGHTS, {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": llm,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank * self.scale,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
            **_PLAIN,
        }
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_adapters(weights: Mapping[str, Tensor], terms: LowRankTerms) -> dict[str, PeftAdapter]:
    """The adapters that the views of a model use, by the names of the terms that each sums ("shared", "shared+avsr").

    Args:
        weights: of the layout-free model, among others those of its terms.
        terms: of the model.
    """
    found: dict[tuple[int, str], dict[tuple[str, str], Tensor]] = {}
    for name, tensor in weights.items():
        if match := _NAME.fullmatch(name):
            found.setdefault((int(match[1]), match[2]), {})[match[3], match[4]] = tensor
    adapters = {}
    for names in dict.fromkeys(tuple(terms.of(view)) for view in terms.views):
        factors = {
            place: (torch.cat([own[term, "a"] for term in names]), torch.cat([own[term, "b"] for term in names], dim=1))
            for place, own in sorted(found.items())
        }
        adapters["+".join(names)] = PeftAdapter(len(names) * terms.rank, terms.scale, factors)
    return adapters


def read_peft(directory: str | Path) -> PeftAdapter:
    """Read a folder that PEFT's ``save_pretrained`` or `PeftAdapter.write` made.

    Raises:
        UserError: for a missing or damaged file, another kind of adapter, or settings that compute something else.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{directory} cannot be read as an adapter of PEFT ({error}); it has {CONFIG} and {WEIGHTS}."
        ) from error
    if problem := next(_unlike(config), None):
        raise UserError(f"{directory / CONFIG}: {problem}; only plain LoRA of q_proj and v_proj can be read.")
    rank, found = int(config["r"]), dict[tuple[int, str, str], Tensor]()
    for name, tensor in tensors.items():
        match = _THEIRS.fullmatch(name)
        if match is None:
            raise UserError(f"{directory / WEIGHTS} holds {name}, which is no factor of q_proj or v_proj of a layer.")
        found[int(match[1]), match[2], match[3]] = tensor.float()
    places = sorted({(layer, projection) for layer, projection, _ in found})
    for layer, projection in places:
        shapes = [
            tuple(found[layer, projection, letter].shape) for letter in "AB" if (layer, projection, letter) in found
        ]
        if len(shapes) < 2 or shapes[0][0] != rank or shapes[1][1] != rank:
            raise UserError(
                f"{directory / WEIGHTS}: {projection}_proj of layer {layer} has factors of shapes {shapes}, but "
                f"{CONFIG} says r={rank}."
            )
    factors = {(layer, p): (found[layer, p, "A"], found[layer, p, "B"]) for layer, p in places}
    return PeftAdapter(rank, float(config["lora_alpha"]) / rank, factors)


def _unlike(config: Any) -> Iterator[str]:
    """What of PEFT's configuration means something else than `PeftAdapter`."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        yield "it is no adapter of type LORA"
        return
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        yield "r or lora_alpha is no number"
    targets = config.get("target_modules")
    if not isinstance(targets, list) or set(targets) != {"q_proj", "v_proj"}:
        yield f"target_modules={targets}"
    yield from (f"{key}={config[key]!r}" for key, plain in _PLAIN.items() if config.get(key, plain) != plain)
    yield from (f"{key}={config[key]!r}" for key in _EMPTY if config.get(key))


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (Path(directory) / CONFIG).is_file()


@torch.no_grad()
def start_from_peft(directory: str | Path, terms: LowRankTerms | None, parts: Iterable[NamedPart]) -> None:
    """Let the shared term of a model begin with an adapter of PEFT.

    Args:
        terms: of the LLM; None if it has none.
        parts: what this rank holds of the model.

    Raises:
        UserError: if the model has no such term, or one of another rank, scale or size.
    """
    adapter = read_peft(directory)
    if terms is None or SHARED not in terms.kinds:
        raise UserError(
            f"training.init_from={directory} is an adapter of PEFT for a term of all views, which the run does not "
            f"have: set llm.lora={{rank: {adapter.rank}, scale: {adapter.scale:g}, terms: [shared]}}."
        )
    if (terms.rank, terms.scale) != (adapter.rank, adapter.scale):
        raise UserError(
            f"training.init_from={directory} has rank {adapter.rank} and scale {adapter.scale:g}, the run's term rank "
            f"{terms.rank} and scale {terms.scale:g}: set llm.lora.rank={adapter.rank}, llm.lora.reduction=null and "
            f"llm.lora.scale={adapter.scale:g}."
        )
    for part in parts:
        match = _NAME.fullmatch(part.name)
        if match is None or match[3] != SHARED:
            continue
        pair = adapter.factors.get((int(match[1]), match[2]))
        whole = None if pair is None else pair["ab".index(match[4])]
        if whole is None or whole.shape != part.whole_shape:
            found = "nothing" if whole is None else f"shape {list(whole.shape)}"
            raise UserError(
                f"training.init_from={directory} has {found} for {part.name}, which has shape "
                f"{list(part.whole_shape)}: it belongs to another LLM."
            )
        part.value.copy_(part.here(whole))
