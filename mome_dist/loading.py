"""`mome_dist.load`, which imports torch when it is called and not before: launchers validate within a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mome_dist.extras import told_if_missing
from mome_dist.trained import find_trained

if TYPE_CHECKING:
    import torch

    from mome_dist.transcription.model import SpeechModel


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    select: str = "latest",
    llm: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    video_encoder: str | Path | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> SpeechModel:
    """Load what was trained, ready to write down what is said.

    Args:
        directory: of a run, of one of its checkpoints, or of an export.
        device: "cpu", "cuda:1" and the like; None: a GPU if there is one.
        precision: of the LLM, "fp32" or "bf16"; None: as in training.
        select: which checkpoint of a run: "latest", "best" (lowest validation loss) or "average:N" (mean of the N
            newest).
        llm, audio_encoder, video_encoder: directories of the frozen models, or ``hf://OWNER/NAME``; None: where the run
            had them, then the cache of assets. Hashes are compared.
        device_map: spreads the LLM over several devices (`mome_dist.llm.hugging_face.load_hugging_face`).

    Raises:
        UserError: in one line, for anything missing, damaged or mismatched, a device that is not there, or a package of
            the extra ``infer`` that is not installed.
    """
    find_trained(directory)  # what is missing is told before torch is imported
    with told_if_missing():
        from mome_dist.inference.load import load_run
        from mome_dist.transcription.model import SpeechModel, device_of

        given = {"llm": llm, "audio_encoder": audio_encoder, "video_encoder": video_encoder}
        frozen = {section: place for section, place in given.items() if place is not None}
        run = load_run(
            directory, device_of(device), frozen=frozen, select=select, device_map=device_map, precision=precision
        )
        return SpeechModel(run)
