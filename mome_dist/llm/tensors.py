"""Tensors of a Hugging Face directory, read as far as they are needed. Nothing here needs Megatron-Core."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mome_dist.llm.directory import EMBEDDING, TensorIndex
from mome_dist.llm.shape import LLMShape, unreadable


class SafetensorsReader:
    """Tensors of a Hugging Face directory by name, one file or sharded with an index. Use as a context manager."""

    def __init__(self, directory: str | Path) -> None:
        self.index = TensorIndex(directory)
        self._stack, self._open = ExitStack(), {}  # type: ExitStack, dict[Path, Any]

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def slice(self, name: str, shape: tuple[int, ...]) -> Any:
        """A lazily read tensor; index it to read a part.

        Raises:
            UserError: if the tensor or its file is missing or damaged, or if its shape is not ``shape``.
        """
        path = self.index.find(name, shape)
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise unreadable(path, error) from error
        return self._open[path].get_slice(name)


def embedding_scale(directory: str | Path) -> float:
    """Root mean square of the LLM's token embeddings, over the first 4096 rows: the size of input that it knows."""
    shape = LLMShape.from_directory(directory)
    with SafetensorsReader(directory) as reader:
        rows = reader.slice(EMBEDDING, (shape.vocabulary, shape.hidden_size))[:4096]
    return float(rows.float().square().mean().sqrt())
