"""Import of Hugging Face weights: every rank reads from the safetensors files only the slices that it holds.

Layouts: Megatron-Core stores queries, keys and values of one key-value group together and the gate and up projections
of SwiGLU one after the other; tensor parallelism cuts both by rows, the output projections by columns. Groups that pad
the heads (`LLMShape.with_padded_heads`) have weights and biases of zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mome_dist.llm.directory import EMBEDDING, FINAL_NORM
from mome_dist.llm.megatron import FrozenLLM
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.slice_cache import SliceCache
from mome_dist.llm.tensors import SafetensorsReader


@torch.no_grad()
def load_weights(model: FrozenLLM, shape: LLMShape, directory: str | Path, cache: SliceCache | None = None) -> None:
    """Fill this rank's frozen weights from a Hugging Face directory.

    Args:
        model: as `mome_dist.llm.megatron.build_frozen_llm` made it, its slots still empty.
        shape: of the whole LLM, without padding.
        cache: where ready-made slices are kept between runs; the weights are the same bit for bit.

    Raises:
        UserError: for a missing or wrong file or tensor, by name.
    """
    parameters = dict(model.named_parameters())
    slicing = _slicing(model)
    if cache is not None and cache.read(slicing, parameters):
        return
    unfilled = {id(parameter) for parameter in parameters.values()}
    with SafetensorsReader(directory) as reader:
        for parameter in _Importer(model, shape, reader).fill():
            unfilled.remove(id(parameter))
    assert not unfilled, [name for name, parameter in parameters.items() if id(parameter) in unfilled]
    if cache is not None:
        cache.write(slicing, parameters)


def _slicing(model: FrozenLLM) -> dict[str, Any]:
    """What decides which slices of the source a rank holds, and in which form."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "layers": [layer.layer_number - 1 for layer in model.decoder.layers],
        "embedding": model.pre_process,
        "output": model.post_process,
        "key_value_groups": model.config.num_query_groups,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
    }


class _Importer:
    def __init__(self, model: FrozenLLM, shape: LLMShape, reader: SafetensorsReader) -> None:
        self.model, self.shape, self.reader = model, shape, reader
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        # This rank's key-value groups, padding included, and the ones of them that are the model's.
        self.groups = model.config.num_query_groups // self.tp
        self.first = min(self.tp_rank * self.groups, shape.kv_heads)
        self.last = min(self.first + self.groups, shape.kv_heads)

    def fill(self) -> Iterator[Tensor]:
        """Fill the parameters of this rank and yield each one that is done."""
        shape, model = self.shape, self.model
        if model.pre_process:
            yield model.embedding.word_embeddings.weight.copy_(
                self._rows(EMBEDDING, shape.vocabulary, shape.hidden_size)
            )
        for layer in model.decoder.layers:
            yield from self._layer(layer, f"model.layers.{layer.layer_number - 1}")
        if model.post_process:
            output = self.reader.index.output_name(shape)
            yield model.output_layer.weight.copy_(self._rows(output, shape.vocabulary, shape.hidden_size))
            yield model.decoder.final_layernorm.weight.copy_(self._vector(FINAL_NORM))

    def _layer(self, layer: Any, name: str) -> Iterator[Tensor]:
        shape, attention = self.shape, layer.self_attention
        width, head = shape.hidden_size, shape.head_size
        yield self._fill_grouped(attention.linear_qkv.weight, f"{name}.self_attn", "weight", (width,))
        if shape.qkv_bias:
            yield self._fill_grouped(attention.linear_qkv.bias, f"{name}.self_attn", "bias", ())
        output = attention.linear_proj.weight.zero_()
        start, stop = (group * shape.heads // shape.kv_heads * head for group in (self.first, self.last))
        o_proj = self.reader.slice(f"{name}.self_attn.o_proj.weight", (width, shape.heads * head))
        output[:, : stop - start].copy_(o_proj[:, start:stop])
        yield output
        gate_up = layer.mlp.linear_fc1.weight
        for half, projection in zip(gate_up.chunk(2), ("gate_proj", "up_proj"), strict=True):
            half.copy_(self._rows(f"{name}.mlp.{projection}.weight", shape.ffn_size, width))
        yield gate_up
        yield layer.mlp.linear_fc2.weight.copy_(self._columns(f"{name}.mlp.down_proj.weight", width, shape.ffn_size))
        yield layer.input_layernorm.weight.copy_(self._vector(f"{name}.input_layernorm.weight"))
        yield layer.pre_mlp_layernorm.weight.copy_(self._vector(f"{name}.post_attention_layernorm.weight"))

    def _fill_grouped(self, target: Tensor, attention: str, kind: str, columns: tuple[int, ...]) -> Tensor:
        """Rows of this rank's groups, each with its queries, its key and its value; groups of padding are zero.

        ``target`` is [groups * (queries + 2) * head_size, *columns], in place.
        """
        shape = self.shape
        queries, real = shape.heads // shape.kv_heads, self.last - self.first
        grouped = target.zero_().view(self.groups, (queries + 2) * shape.head_size, *columns)
        offset = 0
        for projection, heads in (("q_proj", queries), ("k_proj", 1), ("v_proj", 1)):
            size = heads * shape.head_size
            whole = self.reader.slice(f"{attention}.{projection}.{kind}", (shape.kv_heads * size, *columns))
            if real:
                part = whole[self.first * size : self.last * size].reshape(real, size, *columns)
                grouped[:real, offset : offset + size].copy_(part)
            offset += size
        return target

    def _rows(self, name: str, rows: int, columns: int) -> Tensor:
        part = rows // self.tp
        return self.reader.slice(name, (rows, columns))[self.tp_rank * part : (self.tp_rank + 1) * part]

    def _columns(self, name: str, rows: int, columns: int) -> Tensor:
        part = columns // self.tp
        return self.reader.slice(name, (rows, columns))[:, self.tp_rank * part : (self.tp_rank + 1) * part]

    def _vector(self, name: str) -> Tensor:
        return self.reader.slice(name, (self.shape.hidden_size,))[:]
