"""The configuration of an export as transformers has it, without the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mome_dist.transformers_auto import MODEL_TYPE


class MoMESpeechConfig(PreTrainedConfig):
    """The ``config.json`` of an export.

    Its keys are attributes: ``views`` (that it was trained on), ``llm``, ``parameters`` (sizes), ``frozen`` (names and
    fingerprints of the frozen models), ``tokens`` (identity of the tokenizer), ``config`` (what rebuilds the model and
    decodes with it, as a run's ``config.yaml`` has it) and so on; `mome_dist.checkpoint.adapter` writes them.
    """

    model_type = MODEL_TYPE
    # What mome_dist wrote, in its order; everything else is transformers' own.
    _KEYS = (
        *("name", "step", "views", "source", "versions", "llm", "parameters", "frozen", "own_tags", "tokens"),
        "config",
    )

    def document(self) -> dict[str, Any]:
        """What `mome_dist.checkpoint.adapter.write_adapter` is given to write the same again."""
        return {key: getattr(self, key) for key in self._KEYS if hasattr(self, key)}
