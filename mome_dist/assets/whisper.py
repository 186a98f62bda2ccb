"""Whisper from CTranslate2 to a plain Hugging Face directory.

CTranslate2 names tensors by their place in its graph and fuses the query, key and value projections; here they are
split and renamed, and the configuration is read off the shapes. Feature extractor, tokenizer and generation settings
are written beside the weights, so `WhisperForConditionalGeneration.from_pretrained` and `generate` work offline.

Whisper: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mome_dist.assets.ctranslate2 import CTranslate2Model, read_model
from mome_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

Weights = dict[str, NDArray[np.float32]]

_HEAD_WIDTH = 64  # of every published Whisper
_MULTILINGUAL_VOCABULARY = 51865  # English-only models have one entry fewer
_LANGUAGE_TOKEN = re.compile(r"<\|[a-z]{2,3}\|>")


def convert(source: Path, target: Path) -> None:
    """Convert ``model.bin``, ``config.json`` and ``tokenizer.json`` in `source` into a float32 Whisper in `target`.

    Raises:
        UserError: a file is missing or damaged, or the model is not a Whisper.
    """
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = read_model(source / "model.bin")
    if model.spec != "WhisperSpec":
        raise UserError(f"{source / 'model.bin'} holds a {model.spec}, not a WhisperSpec")
    weights = rename_weights(model)
    special = _special_tokens(source / "tokenizer.json")
    config = _read_config(model, weights, special)

    whisper = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}
    missing, unexpected = whisper.load_state_dict(state, strict=False)
    # Keys have no bias in Whisper and the output projection is tied to the embedding: nothing else may be absent.
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise UserError(f"the model does not fit Whisper: missing {missing}, unexpected {unexpected}")
    whisper.tie_weights()
    whisper.generation_config = _generation_config(source / "config.json", config, special)
    whisper.save_pretrained(target)

    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    _write_tokenizer(source / "tokenizer.json", target)


def rename_weights(model: CTranslate2Model) -> Weights:
    """Return the weights under Hugging Face's names, dequantised, with the fused attention projections split.

    Raises:
        UserError: a variable is missing, or a key projection has a bias (Whisper has none, so nothing could hold it).
    """
    return dict(_iterate_weights(model))


def _iterate_weights(model: CTranslate2Model) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for conv in ("conv1", "conv2"):
        yield from _linear(model, f"encoder/{conv}", f"model.encoder.{conv}")
    for side in ("encoder", "decoder"):
        for layer in range(_count_layers(model, side)):
            source, target = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            yield from _norm(model, f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            yield from _attention(model, f"{source}/self_attention", f"{target}.self_attn", is_self=True)
            if side == "decoder":
                yield from _norm(model, f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                yield from _attention(model, f"{source}/attention", f"{target}.encoder_attn", is_self=False)
            yield from _norm(model, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            yield from _linear(model, f"{source}/ffn/linear_0", f"{target}.fc1")
            yield from _linear(model, f"{source}/ffn/linear_1", f"{target}.fc2")
        yield from _norm(model, f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", model.dense(f"{side}/position_encodings/encodings")
    yield "model.decoder.embed_tokens.weight", model.dense("decoder/embeddings/weight")


def _linear(model: CTranslate2Model, source: str, target: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield f"{target}.weight", model.dense(f"{source}/weight")
    yield f"{target}.bias", model.dense(f"{source}/bias")


def _norm(model: CTranslate2Model, source: str, target: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield f"{target}.weight", model.dense(f"{source}/gamma")
    yield f"{target}.bias", model.dense(f"{source}/beta")


def _attention(
    model: CTranslate2Model, source: str, target: str, *, is_self: bool
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Split the fused projections: linear_0 is [q; k; v] in self-attention, else q, with linear_1 being [k; v]."""
    weights, biases = ([model.dense(f"{source}/linear_0/{kind}")] for kind in ("weight", "bias"))
    if not is_self:
        weights.append(model.dense(f"{source}/linear_1/weight"))
        biases.append(model.dense(f"{source}/linear_1/bias"))
    query, key, value = np.split(np.concatenate(weights), 3)
    query_bias, key_bias, value_bias = np.split(np.concatenate(biases), 3)
    if np.abs(key_bias).max() > 1e-6:
        raise UserError(f"the key projection of {source} has a bias, which Whisper cannot hold")
    yield f"{target}.q_proj.weight", query
    yield f"{target}.q_proj.bias", query_bias
    yield f"{target}.k_proj.weight", key
    yield f"{target}.v_proj.weight", value
    yield f"{target}.v_proj.bias", value_bias
    yield from _linear(model, f"{source}/linear_{1 if is_self else 2}", f"{target}.out_proj")


def _count_layers(model: CTranslate2Model, side: str) -> int:
    prefix = f"{side}/layer_"
    numbers = {name.removeprefix(prefix).split("/")[0] for name in model.variables if name.startswith(prefix)}
    return sum(number.isdigit() for number in numbers)


def _special_tokens(tokenizer_file: Path) -> dict[str, int]:
    """Return the ids of the tokens written ``<|...|>``."""
    entries = _read_json(tokenizer_file)["added_tokens"]
    special = {entry["content"]: int(entry["id"]) for entry in entries}
    for required in ("<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"):
        if required not in special:
            raise UserError(f"{tokenizer_file} has no token {required}")
    return special


def _read_config(model: CTranslate2Model, weights: Weights, special: dict[str, int]) -> WhisperConfig:
    from transformers import WhisperConfig

    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    end = special["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        encoder_layers=_count_layers(model, "encoder"),
        decoder_layers=_count_layers(model, "decoder"),
        encoder_attention_heads=width // _HEAD_WIDTH,
        decoder_attention_heads=width // _HEAD_WIDTH,
        encoder_ffn_dim=weights["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=weights["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        decoder_start_token_id=special["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,  # these two live in the generation settings
        begin_suppress_tokens=None,
    )


def _generation_config(settings_file: Path, config: WhisperConfig, special: dict[str, int]) -> GenerationConfig:
    from transformers import GenerationConfig

    settings = _read_json(settings_file)
    is_multilingual = config.vocab_size >= _MULTILINGUAL_VOCABULARY
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    # Read by Whisper's own `generate`; they are no fields of a general GenerationConfig.
    generation.no_timestamps_token_id = special["<|notimestamps|>"]
    generation.prev_sot_token_id = special["<|startofprev|>"]
    generation.is_multilingual = is_multilingual
    generation.alignment_heads = settings["alignment_heads"]
    if is_multilingual:
        languages = {text: number for text, number in special.items() if _LANGUAGE_TOKEN.fullmatch(text)}
        generation.lang_to_id = languages
        generation.task_to_id = {task: special[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return generation


def _write_tokenizer(tokenizer_file: Path, target: Path) -> None:
    shutil.copyfile(tokenizer_file, target / "tokenizer.json")
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
