"""Where a frozen model comes from that is not there: what to run, by the name of its directory.

These are the directories that ``configs/llm``, ``configs/audio_encoder`` and ``configs/video_encoder`` name. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_FETCH = "run `mome-dist fetch {name}`"
_AVHUBERT = "run `mome-dist convert avhubert CHECKPOINT.pt` on the published checkpoint"
_PRETRAIN_VIDEO = "run `mome-dist pretrain video`"

MADE: Mapping[str, str] = {
    "smollm2-135m": _FETCH,
    "whisper-tiny.en": _FETCH,
    "tiny": "run `mome-dist pretrain llm`",
    "visemes": _PRETRAIN_VIDEO,
    "avhubert-base": _AVHUBERT,
    "avhubert-large": _AVHUBERT,
}
# By directory, the model of the Hugging Face hub; some licences have to be accepted there first.
HUB: Mapping[str, str] = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "whisper-medium.en": "openai/whisper-medium.en",
}
_OTHERWISE: Mapping[str, str] = {
    "llm": "give the directory of a Hugging Face Llama or Qwen2",
    "audio_encoder": "give the directory of a Hugging Face Whisper",
    "video_encoder": f"give the directory of an encoder (a small one: {_PRETRAIN_VIDEO}; AV-HuBERT: {_AVHUBERT})",
}


def origin_of(section: str, path: str | Path) -> str:
    """What to do about a model that is missing, for the end of a message.

    Args:
        section: of the configuration: "llm", "audio_encoder" or "video_encoder".
        path: where it was looked for.
    """
    name = Path(path).name
    if name in MADE:
        return f"{MADE[name].format(name=name)}, or set {section}.path"
    if name in HUB:
        return (
            f"set {section}.path=hf://{HUB[name]} (where its licence has to be accepted, after `hf auth login`), or "
            f"run `hf download {HUB[name]} --local-dir {path}`"
        )
    return f"{_OTHERWISE[section]}, or {section}.path=hf://OWNER/NAME for one on the hub"
