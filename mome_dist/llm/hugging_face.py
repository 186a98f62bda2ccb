"""The frozen LLM in one process, as transformers has it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mome_dist.llm.directory import check_directory


def load_hugging_face(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a directory whose architecture is one of `mome_dist.llm.shape.ARCHITECTURES`, on the CPU.

    Nothing is fetched, nothing pickled is read, and no code in the directory is run. Decoding settings that come with
    a model (Qwen2.5 has a repetition penalty) are dropped: what decodes here is set by the run's configuration alone.

    Raises:
        UserError: for a wrong or incomplete directory, before anything is loaded.
    """
    check_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model.generation_config = GenerationConfig()
    return model
