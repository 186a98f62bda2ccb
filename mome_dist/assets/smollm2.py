"""SmolLM2 from GGUF to a plain Hugging Face directory.

Transformers reads the GGUF file (dequantising it), and the model is saved again without its quantisation settings, as
bfloat16 safetensors with tokenizer: from then on it loads like any Llama checkpoint, without `gguf`.

SmolLM2: Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025.
"""

from __future__ import annotations

from pathlib import Path

from mome_dist.errors import UserError


def convert(source: Path, target: Path) -> None:
    """Convert the one ``*.gguf`` file in `source` into a `LlamaForCausalLM` directory (bfloat16) in `target`.

    Raises:
        UserError: `source` holds no or several GGUF files, or one that is no Llama model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    candidates = sorted(source.glob("*.gguf"))
    if len(candidates) != 1:
        raise UserError(f"{source} holds {len(candidates)} GGUF files instead of one")
    name = candidates[0].name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32, local_files_only=True)
    if quantised.config.model_type != "llama":
        raise UserError(f"{name} holds a {quantised.config.model_type} model, not a llama")

    # A fresh config and model drop everything that would make Transformers treat the copy as quantised.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings.update(dtype="bfloat16", eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
