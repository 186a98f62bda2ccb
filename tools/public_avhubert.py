"""Features of the public AV-HuBERT classes, for `tools/compare_avhubert.py`, which starts this in their environment.

    PYTHON public_avhubert.py REPOSITORY CHECKPOINT CLIPS.npz FEATURES.npz

Nothing of this project is imported here. The public code unpickles the checkpoint: give it files that you trust.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(repository: str, checkpoint: str, clips: str, features: str) -> None:
    """Encode every clip (uint8 [T, 96, 96]) without audio, as the public fine-tuned models do; write [T, width]."""
    submodule = Path(repository) / "fairseq"
    sys.path[:0] = [repository, *([str(submodule)] if (submodule / "fairseq").is_dir() else [])]
    import numpy as np
    import torch
    from avhubert.hubert import AVHubertConfig, AVHubertModel
    from avhubert.hubert_pretraining import AVHubertPretrainingConfig
    from avhubert.utils import CenterCrop, Compose, Normalize
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
    from omegaconf import OmegaConf

    state = load_checkpoint_to_cpu(checkpoint)
    settings = state.get("cfg")
    if settings is None:
        settings = convert_namespace_to_omegaconf(state["args"])
    OmegaConf.set_struct(settings, False)
    task = settings.get("task", {})
    inner = settings.model.get("w2v_args")
    if inner is not None:  # a fine-tuned model: its pictures are the outer task's
        inner = OmegaConf.create(inner) if OmegaConf.is_config(inner) else convert_namespace_to_omegaconf(inner)
        OmegaConf.set_struct(inner, False)
        settings, task = inner, OmegaConf.merge(inner.get("task", {}), task)
    # The public defaults, as far as a file names nothing; label_rate acts in pre-training only.
    root = OmegaConf.create({"model": settings.model, "task": task})
    root.model.setdefault("label_rate", 25)
    task_settings = merge_with_parent(AVHubertPretrainingConfig(), root.task)
    model = AVHubertModel(merge_with_parent(AVHubertConfig(), root.model), task_settings, [None])

    weights = state["model"]
    prefix = next((each for each in ("encoder.w2v_model.", "w2v_encoder.w2v_model.") if _any(weights, each)), "")
    training_only = ("final_proj.", "target_glu.", "label_embs_concat", "mask_emb")
    inside = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    inside = {name: value.float() for name, value in inside.items() if not name.startswith(training_only)}
    result = model.load_state_dict(inside, strict=False)
    wrong = [name for name in result.missing_keys if not name.startswith(training_only)] + result.unexpected_keys
    if wrong:
        raise SystemExit(f"the public model and the checkpoint differ in {', '.join(wrong[:5])}")
    model.remove_pretraining_modules()
    model.eval()

    size = task_settings.image_crop_size
    mean, std = task_settings.image_mean, task_settings.image_std
    transform = Compose([Normalize(0.0, 255.0), CenterCrop((size, size)), Normalize(mean, std)])
    found = {}
    with torch.no_grad():
        for name, clip in np.load(clips).items():
            pixels = torch.from_numpy(transform(clip).astype(np.float32))[None, None]
            found[name] = model.extract_finetune({"audio": None, "video": pixels})[0][0].numpy()
    np.savez(features, **found)


def _any(weights: dict, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
