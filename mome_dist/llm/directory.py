"""What a Hugging Face directory holds, from its safetensors headers alone: no weight is read, and no torch is needed.

A safetensors file starts with the length of its header (unsigned 64-bit, little endian), then the header in JSON: for
every tensor its type, shape and place. That is enough to tell a missing, misshapen or cut-off file from a good one in
milliseconds, before any process group is opened. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape, unreadable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it; ``dtype`` in the format's own spelling, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: if the file is missing, is no safetensors file, or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            opening = file.read(8)
            length = int.from_bytes(opening, "little")
            header = file.read(length) if length <= _MAX_HEADER else b""
            size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    if opening == b"version ":
        raise UserError(f"llm.path: {path} is a Git LFS pointer, not the file itself; run 'git lfs pull' there.")
    if size < 8 + length <= 8 + _MAX_HEADER:
        raise UserError(f"llm.path: {path} is cut off in its header after {size} bytes; fetch it again.")
    try:
        described: dict[str, Any] = json.loads(header)
        described.pop("__metadata__", None)
        tensors = {name: TensorInfo(facts["dtype"], tuple(facts["shape"])) for name, facts in described.items()}
        end = max((facts["data_offsets"][1] for facts in described.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"llm.path: {path} is no safetensors file; fetch it again.") from error
    if size != 8 + length + end:
        raise UserError(
            f"llm.path: {path} has {size} bytes, its header asks {8 + length + end}: it is damaged or its download "
            "was cut off; fetch it again."
        )
    return tensors


class TensorIndex:
    """Which file of a directory holds which tensor: one ``model.safetensors``, or shards with an index.

    Headers are read when a tensor of their file is first asked for.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    @cached_property
    def _files(self) -> dict[str, str]:
        """File name by tensor name."""
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.is_file():  # the order in which transformers looks
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        if not index.is_file():
            pickled = any(self.directory.glob("pytorch_model*.bin"))
            raise UserError(
                f"llm.path: {self.directory} has neither {SINGLE} nor {INDEX}; "
                + ("save its pytorch_model.bin as safetensors." if pickled else "fetch the weights.")
            )
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = sorted(set(files.values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"llm.path: {index} is no index of shards; fetch it again.") from error
        for name in named:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"llm.path: {index} names {name!r}, which is no file name; fetch it again.")
        missing = [name for name in named if not (self.directory / name).is_file()]
        if missing:
            raise UserError(
                f"llm.path: {index} names {', '.join(missing[:3])}{' ...' if missing[3:] else ''}, which "
                f"{'do' if missing[1:] else 'does'} not exist ({len(missing)} of {len(named)} shards); fetch "
                f"{'them' if missing[1:] else 'it'}."
            )
        return files

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            self._headers[file] = read_header(self.directory / file)
        return self._headers[file]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def find(self, name: str, shape: tuple[int, ...]) -> Path:
        """The file that holds a tensor.

        Raises:
            UserError: if the tensor or its file is missing or damaged, or if its shape is not ``shape``.
        """
        if name not in self._files:
            raise UserError(f"llm.path: {self.directory} has no tensor {name!r}; it is incomplete, fetch it again.")
        path = self.directory / self._files[name]
        info = self._header(path.name).get(name)
        if info is None:
            raise UserError(f"llm.path: {path} has no tensor {name!r}, which {INDEX} puts there; fetch both again.")
        if info.shape != shape:
            raise UserError(
                f"llm.path: {name!r} in {path} has shape {list(info.shape)}, but config.json asks {list(shape)}; "
                "use the config.json that belongs to these weights."
            )
        if info.dtype not in _FLOATS:
            raise UserError(
                f"llm.path: {name!r} in {path} has type {info.dtype}; give the model in bf16, fp16 or fp32."
            )
        return path

    def output_name(self, shape: LLMShape) -> str:
        """The tensor that is the output layer: its own, or the embeddings where they are tied."""
        return EMBEDDING if shape.tied_embeddings and OUTPUT not in self else OUTPUT


def layer_tensors(shape: LLMShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one layer, counted from zero."""
    hidden, head = shape.hidden_size, shape.head_size
    rows = {"q": shape.heads * head, "k": shape.kv_heads * head, "v": shape.kv_heads * head}
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        **{f"self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()},
        **{f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items() if shape.qkv_bias},
        "self_attn.o_proj.weight": (hidden, shape.heads * head),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (shape.ffn_size, hidden),
        "mlp.up_proj.weight": (shape.ffn_size, hidden),
        "mlp.down_proj.weight": (hidden, shape.ffn_size),
    }
    return {f"model.layers.{layer}.{name}": size for name, size in tensors.items()}


def check_directory(directory: str | Path) -> LLMShape:
    """Check that a directory holds a whole, supported model; return its shape. Reads headers only.

    Raises:
        UserError: naming the first wrong file, key or tensor, and the fix.
    """
    shape, index = LLMShape.from_directory(directory), TensorIndex(directory)
    embedding = (shape.vocabulary, shape.hidden_size)
    tensors = {EMBEDDING: embedding, FINAL_NORM: (shape.hidden_size,), index.output_name(shape): embedding}
    for layer in range(shape.layers):
        tensors |= layer_tensors(shape, layer)
    for name, size in tensors.items():
        index.find(name, size)
    return shape
