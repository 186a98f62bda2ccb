"""A whole run directory, small and untrained, made in a second: frozen parts, configuration and one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from mome_dist.checkpoint.format import CONFIG, Part, describe_part, fingerprint, index_of, merge_parts
from mome_dist.checkpoint.save import file_facts, publish_checkpoint
from mome_dist.config import save_config
from mome_dist.config.schema import (
    AudioEncoderConfig,
    DataConfig,
    DecodingConfig,
    LLMConfig,
    MoMEConfig,
    ProjectorConfig,
    RunConfig,
    TaskConfig,
    VideoEncoderConfig,
)
from mome_dist.data.corpus import Corpus
from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
from mome_dist.model.shared import build_reference
from mome_dist.sharing import Sharing
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.speech.video_encoder import VideoEncoderConfig as VideoShape
from mome_dist.speech.whisper import WhisperAudioEncoder
from tests.whisper_directory import whisper_directory

WIDTHS = {"audio": 16, "video": 16}
STEP = 7


def make_run(
    root: Path,
    corpus: Path,
    lips: ClipEncoder | None = None,
    change: Callable[[RunConfig], None] = lambda config: None,
) -> Path:
    """Write frozen models and a run into ``root``; return the run directory.

    Args:
        lips: another video encoder than the usual one, as wide as ``WIDTHS`` says.
        change: what the configuration has otherwise.
    """
    config = _config(root, corpus)
    change(config)
    _frozen_models(root, Corpus.open(corpus), lips)
    model = build_reference(config, WIDTHS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # What training would change: experts that add something, and speech that outweighs the prompt.
        for name, parameter in model.named_parameters():
            scale = 0.3 if ".up_" in name or "router" in name else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    run = root / "runs" / config.name
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    add_checkpoint(run, config, model, STEP)
    return run


def add_checkpoint(run: Path, config: RunConfig, model: MoMESpeechLM, step: int) -> Path:
    """Publish a checkpoint of a run, its newest now."""
    aside = run / "checkpoints/aside"
    aside.mkdir(parents=True)
    save_config(config, aside / CONFIG)
    tensors = {f"model/{name}": value.contiguous() for name, value in model.state_dict().items()}
    part = aside / "part-00000.safetensors"
    save_file(tensors, part)
    described = {
        # Of low-rank terms alone a checkpoint has always said how ranks share them.
        name: describe_part(value, Part(part.name, None, None), Sharing(0) if "llm_lora" in name else None)
        for name, value in tensors.items()
    }
    frozen = {name: fingerprint(getattr(config, name).path) for name in ("llm", "audio_encoder", "video_encoder")}
    files = {path.name: file_facts(path) for path in (part, aside / CONFIG)}
    index = index_of({"step": step, "frozen": frozen}, files, merge_parts([described]))
    final = aside.with_name(f"step-{step:06d}")
    publish_checkpoint(aside, final, index)
    return final


def _config(root: Path, corpus: Path) -> RunConfig:
    return RunConfig(
        name="small",
        output_dir=str(root / "runs" / "small"),
        llm=LLMConfig(path=str(root / "llm"), precision="fp32", attention="eager"),
        audio_encoder=AudioEncoderConfig(path=str(root / "whisper"), padding="clip"),
        video_encoder=VideoEncoderConfig(path=str(root / "lips")),
        projector=ProjectorConfig(hidden_size=24),
        mome=MoMEConfig(routed_experts=6, top_k=2, shared_experts=1, bottleneck=3),
        task=TaskConfig(
            tasks=["asr", "vsr", "avsr"], avsr_audio_rates=[4], avsr_video_rates=[5], asr_audio_rates=[4, 16]
        ),
        data=DataConfig(corpus=str(corpus)),
        decoding=DecodingConfig(num_beams=1, max_new_tokens=6, batch_size=3),
    )


def _frozen_models(root: Path, corpus: Corpus, lips: ClipEncoder | None) -> None:
    tokenizer = word_tokenizer([utterance.text for name in corpus.split_names for utterance in corpus.split(name)])
    llama = tiny_llama(tokenizer, hidden=32, layers=2, heads=2, kv_heads=1, ffn_width=64)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" not in name:
                parameter *= 8  # what a position writes must depend on what it reads
    save_llm(llama, tokenizer, root / "llm")
    whisper_directory(root / "whisper", WIDTHS["audio"], layers=1)
    torch.manual_seed(0)
    shape = VideoShape(trunk_widths=(4, 8), width=WIDTHS["video"], heads=2, ffn_width=32, position_kernel=5)
    (lips or VideoEncoder(shape)).save_pretrained(root / "lips")
    assert WhisperAudioEncoder.from_pretrained(root / "whisper").width == WIDTHS["audio"]
