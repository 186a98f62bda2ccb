"""The frozen LLM in one process, as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mome_dist.errors import UserError, first_line
from mome_dist.llm.directory import check_directory

DeviceMap = str | Mapping[str, str | int]
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_hugging_face(
    directory: str | Path, dtype: torch.dtype, device_map: DeviceMap | None = None
) -> PreTrainedModel:
    """Load a directory whose architecture is one of `mome_dist.llm.shape.ARCHITECTURES`.

    Nothing is fetched, nothing pickled is read, and no code in the directory is run. Decoding settings that come with
    a model (Qwen2.5 has a repetition penalty) are dropped: what decodes here is set by the run's configuration alone.

    Args:
        directory: in Hugging Face's form, with safetensors files.
        dtype: of the parameters.
        device_map: spreads the model over the devices of this machine as transformers does: one of `PLACEMENTS`, or a
            mapping of module names ("model.layers.3") to devices, "cpu" or "disk"; weights on the disk are read when
            they are needed. None loads all of it on the CPU.

    Raises:
        UserError: for a wrong or incomplete directory, before anything is loaded, or a map that does not fit.
    """
    check_directory(directory)
    if isinstance(device_map, str) and device_map not in PLACEMENTS:
        raise UserError(
            f"decoding.device_map={device_map!r}: choose from {', '.join(PLACEMENTS)}, or map module names to devices, "
            "such as {'': cpu}."
        )
    spread = {} if device_map is None else {"device_map": device_map if isinstance(device_map, str) else {**device_map}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **spread
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        if device_map is None:
            raise
        # After the check of the directory, what is left to be wrong is the map.
        raise UserError(
            f"decoding.device_map={device_map!r} does not fit this LLM or machine: {first_line(error)}"
        ) from error
    model.generation_config = GenerationConfig()
    return model
