"""Import of Hugging Face Llama weights: every rank reads from the safetensors files only the slices that it holds.

Layouts: Megatron-Core stores queries, keys and values of one key-value group together and the gate and up projections
of SwiGLU one after the other; tensor parallelism cuts both by rows, the output projections by columns.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from mome_dist.errors import UserError
from mome_dist.llm.megatron import FrozenLLM
from mome_dist.llm.shape import LLMShape


class SafetensorsReader:
    """Tensors of a Hugging Face directory by name, one file or sharded with an index. Use as a context manager."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        self._stack, self._open = ExitStack(), {}  # type: ExitStack, dict[str, Any]
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        else:
            raise UserError(f"llm.path: {self.directory} has neither {single.name} nor {index.name}.")

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def slice(self, name: str, shape: tuple[int, ...]) -> Any:
        """A lazily read tensor; index it to read a part.

        Raises:
            UserError: if it is missing, its file is missing, or its shape is not ``shape``.
        """
        if name not in self._files:
            raise UserError(f"llm.path: {self.directory} has no tensor {name!r}; the directory is incomplete.")
        path = self.directory / self._files[name]
        if not path.is_file():
            raise UserError(f"llm.path: {path}, which holds {name!r}, does not exist; the directory is incomplete.")
        if path.name not in self._open:
            self._open[path.name] = self._stack.enter_context(safe_open(path, framework="pt"))
        part = self._open[path.name].get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise UserError(
                f"llm.path: {name!r} in {path} has shape {part.get_shape()}, config.json asks {list(shape)}."
            )
        return part

    def __contains__(self, name: str) -> bool:
        return name in self._files


@torch.no_grad()
def load_weights(model: FrozenLLM, shape: LLMShape, directory: str | Path) -> None:
    """Fill this rank's frozen weights from a Hugging Face directory.

    Raises:
        UserError: for a missing or wrong file or tensor, by name.
    """
    with SafetensorsReader(directory) as reader:
        _Importer(model, shape, reader).run()


class _Importer:
    def __init__(self, model: FrozenLLM, shape: LLMShape, reader: SafetensorsReader) -> None:
        self.model, self.shape, self.reader = model, shape, reader
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()

    def _rows(self, name: str, rows: int, columns: int) -> Tensor:
        part = rows // self.tp
        return self.reader.slice(name, (rows, columns))[self.tp_rank * part : (self.tp_rank + 1) * part]

    def _columns(self, name: str, rows: int, columns: int) -> Tensor:
        part = columns // self.tp
        return self.reader.slice(name, (rows, columns))[:, self.tp_rank * part : (self.tp_rank + 1) * part]

    def _vector(self, name: str) -> Tensor:
        return self.reader.slice(name, (self.shape.hidden_size,))[:]

    def run(self) -> None:
        shape, model = self.shape, self.model
        embedding = "model.embed_tokens.weight"
        if model.pre_process:
            rows = self._rows(embedding, shape.vocabulary, shape.hidden_size)
            model.embedding.word_embeddings.weight.copy_(rows)
        for layer in model.decoder.layers:
            self._layer(layer, f"model.layers.{layer.layer_number - 1}")
        if model.post_process:
            head = embedding if shape.tied_embeddings and "lm_head.weight" not in self.reader else "lm_head.weight"
            model.output_layer.weight.copy_(self._rows(head, shape.vocabulary, shape.hidden_size))
            model.decoder.final_layernorm.weight.copy_(self._vector("model.norm.weight"))

    def _layer(self, layer: Any, name: str) -> None:
        shape = self.shape
        width, head = shape.hidden_size, shape.head_size
        layer.self_attention.linear_qkv.weight.copy_(self._grouped_qkv(f"{name}.self_attn"))
        output = layer.self_attention.linear_proj.weight.zero_()
        start, stop = (group * shape.heads // shape.kv_heads * head for group in self._real_groups())
        o_proj = self.reader.slice(f"{name}.self_attn.o_proj.weight", (width, shape.heads * head))
        output[:, : stop - start].copy_(o_proj[:, start:stop])
        gate = self._rows(f"{name}.mlp.gate_proj.weight", shape.ffn_size, width)
        up = self._rows(f"{name}.mlp.up_proj.weight", shape.ffn_size, width)
        layer.mlp.linear_fc1.weight.copy_(torch.cat([gate, up]))
        layer.mlp.linear_fc2.weight.copy_(self._columns(f"{name}.mlp.down_proj.weight", width, shape.ffn_size))
        layer.input_layernorm.weight.copy_(self._vector(f"{name}.input_layernorm.weight"))
        layer.pre_mlp_layernorm.weight.copy_(self._vector(f"{name}.post_attention_layernorm.weight"))

    def _real_groups(self) -> tuple[int, int]:
        """First and last (excluded) key-value group of the model on this rank; groups beyond them are padding."""
        local = self.model.config.num_query_groups // self.tp
        first = min(self.tp_rank * local, self.shape.kv_heads)
        return first, min(first + local, self.shape.kv_heads)

    def _grouped_qkv(self, name: str) -> Tensor:
        """Rows of this rank's groups, each with its queries, its key and its value; groups of padding are zero."""
        shape = self.shape
        head, queries = shape.head_size, shape.heads // shape.kv_heads
        first, last = self._real_groups()
        local = self.model.config.num_query_groups // self.tp
        rows = torch.zeros(local, (queries + 2) * head, shape.hidden_size)
        offset = 0
        for projection, heads in (("q_proj", queries), ("k_proj", 1), ("v_proj", 1)):
            size = heads * head
            whole = self.reader.slice(f"{name}.{projection}.weight", (shape.kv_heads * size, shape.hidden_size))
            part = whole[first * size : last * size].reshape(last - first, size, shape.hidden_size)
            rows[: last - first, offset : offset + size] = part
            offset += size
        return rows.flatten(0, 1)


def embedding_scale(directory: str | Path) -> float:
    """Root mean square of the LLM's token embeddings, over the first 4096 rows: the size of input that it knows."""
    shape = LLMShape.from_directory(directory)
    with SafetensorsReader(directory) as reader:
        rows = reader.slice("model.embed_tokens.weight", (shape.vocabulary, shape.hidden_size))[:4096]
    return float(rows.float().square().mean().sqrt())
