"""Keep known, harmless notices of the libraries out of a run's output, so that what is printed is worth reading."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before the first import of Megatron-Core, DeepSpeed or transformers."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Apex and Transformer Engine are optional; Megatron-Core says in five places that it runs without them.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    warnings.filterwarnings("ignore", message="full scope is deprecated.*")
    # Renamed in the newest torch; DeepSpeed and Megatron-Core call the old name.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.*` is deprecated.*")
    # Layers with a MoME slot are subclasses of Megatron's, which it reports for every layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
