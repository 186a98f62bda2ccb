"""Published checkpoints of the family as exports: the same logits, every tensor accounted for, faults by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

from mome_dist import transcribe
from mome_dist.commands import convert_family as command
from mome_dist.data.media import write_media_file
from mome_dist.errors import UserError
from mome_dist.export.family import convert_family
from mome_dist.export.family_file import read_state
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.speech.avhubert.conversion import convert
from mome_dist.speech.sequence import pack
from mome_dist.speech.views import View
from tests.avhubert_checkpoint import small
from tests.family_checkpoint import PROMPTS, RANK, RESERVED, WIDTH, Published, llm_directory
from tests.hub_server import files_of
from tests.whisper_directory import whisper_directory

TASKS = {"audio": "asr", "video": "vsr", "audiovisual": "avsr"}


@dataclass(frozen=True)
class Kind:
    """A published model, and what our configuration of it has to be."""

    name: str
    settings: dict[str, Any]
    rates: dict[str, list[int] | None]
    views: list[View]
    video_lora: bool = False
    llm: str = "llama"
    terms: list[str] = field(default_factory=lambda: ["shared"])
    stacked: bool = False


POOLED: dict[str, list[int] | None] = {"audio": [4, 16], "video": [2, 5]}
OMNI = [
    *(View("asr", rate, None) for rate in (4, 16)),
    *(View("vsr", None, rate) for rate in (2, 5)),
    *(View("avsr", audio, video) for audio in (4, 16) for video in (2, 5)),
]
NUMBERED: dict[str, Any] = {"audio": [WIDTH] * 2, "video": [WIDTH] * 2}
KINDS = {
    "stacked": Kind(
        "llama_avsr",
        {"inputs": {"audio": 4 * WIDTH, "video": 2 * WIDTH}},
        {"audio": None, "video": None},
        [View("avsr", 4, 2)],
        stacked=True,
    ),
    "lips": Kind(
        "llama_avsr",
        {"inputs": {"video": WIDTH}, "norm": True},
        {"audio": None, "video": [3]},
        [View("vsr", None, 3)],
        True,
    ),
    "speech": Kind(
        "llama_avsr", {"inputs": {"audio": 3 * WIDTH}}, {"audio": None}, [View("asr", 3, None)], stacked=True
    ),
    "one for all rates": Kind(
        "omni_avsr",
        {"inputs": {"audio": WIDTH, "video": WIDTH}, "norm": True, "prompts": True},
        POOLED,
        OMNI,
    ),
    "mtsk": Kind("llama_mtsk", {"inputs": NUMBERED, "norm": True}, POOLED, OMNI[4:]),
    "smop": Kind(
        "llama_smop", {"inputs": {}, "norm": True, "experts": 3}, {"audio": [4], "video": [2]}, [View("avsr", 4, 2)]
    ),
    "omni s": Kind("omni_avsr", {"inputs": NUMBERED, "prompts": True}, POOLED, OMNI, True),
    "omni t": Kind(
        "omni_avsr", {"inputs": NUMBERED, "own": True, "prompts": True}, POOLED, OMNI, True, "qwen", ["task"]
    ),
    "omni st": Kind(
        "omni_avsr",
        {"inputs": NUMBERED, "own": True, "shared": True, "prompts": True},
        # The authors' order need not be ours.
        {"audio": [16, 4], "video": [2, 5]},
        OMNI,
        True,
        terms=["shared", "task"],
    ),
}


@dataclass(frozen=True)
class Made:
    """The authors' model of a kind, the file that they would publish, and how it is converted."""

    theirs: Published
    state: dict[str, Tensor]
    frozen: list[str]
    kind: Kind


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    whisper_directory(root / "whisper", WIDTH)
    convert(small().state_dict(), {}, {"encoder_attention_heads": 4, "layer_norm_first": True}).encoder.save_pretrained(
        root / "avhubert", {"geometry": "avhubert"}
    )
    for architecture in ("llama", "qwen"):
        llm_directory(root / architecture, architecture)
    return root


def make(root: Path, kind: Kind) -> Made:
    llm = AutoModelForCausalLM.from_pretrained(root / kind.llm)
    theirs = Published(llm, AutoTokenizer.from_pretrained(root / kind.llm), **kind.settings).eval()
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    streams = {stream for view in kind.views for stream in ("audio", "video") if getattr(view, f"{stream}_rate")}
    if "audio" in streams:
        encoder = WhisperModel.from_pretrained(root / "whisper").encoder
        state |= {f"audio_encoder.{name}": value for name, value in encoder.state_dict().items()}
    if "video" in streams:
        state |= {f"video_encoder.{name}": value for name, value in small().state_dict().items()}
    if kind.video_lora:
        generator = torch.Generator().manual_seed(4)
        for layer in range(2):
            for projection in "QV":
                prefix = f"video_encoder.encoder.layers.{layer}.self_attn.lora"
                state[f"{prefix}_down_{projection}.weight"] = 0.2 * torch.randn(2, WIDTH, generator=generator)
                state[f"{prefix}_up_{projection}.weight"] = 0.2 * torch.randn(WIDTH, 2, generator=generator)
    names = ("audio_open", "audio_close", "video_open", "video_close")
    overrides = [
        f"llm.path={root / kind.llm}",
        "llm.precision=fp32",
        *(f'llm.tags.{name}="{token}"' for name, token in zip(names, RESERVED, strict=True)),
        *(f'task.prompts.{TASKS[task]}="{prompt}"' for task, prompt in PROMPTS.items()),
        f"audio_encoder.path={root / 'whisper'}",
        f"video_encoder.path={root / 'avhubert'}",
        "audio_encoder.precision=fp32",
        "video_encoder.precision=fp32",
    ]
    return Made(theirs, state, overrides, kind)


def write(made: Made, folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda state: None) -> Path:
    state = dict(made.state)
    change(state)
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {stream: torch.randn(count, WIDTH, generator=generator) for stream, count in (("audio", 37), ("video", 19))}


def theirs_speech(kind: Kind, view: View) -> dict[str, Any]:
    speech = {}
    for stream, clip in features().items():
        if (rate := getattr(view, f"{stream}_rate")) is not None:
            rates = kind.rates.get(stream)
            numbered = isinstance(kind.settings["inputs"].get(stream), list)
            speech[stream] = (clip, rate, kind.stacked, rates.index(rate) if numbered and rates else None)
    return speech


def our_logits(run: LoadedRun, view: View, text: str) -> tuple[Tensor, list[int]]:
    rates = {"audio": view.audio_rate, "video": view.video_rate}
    counts = {stream: len(clip) // (rates[stream] or 1) for stream, clip in features().items()}
    example = run.sequences.example(view, counts["audio"], counts["video"], text)
    clips = {stream: [clip] for stream, clip in features().items() if rates[stream]}
    with torch.no_grad():
        logits = run.model.label_logits(pack([(view, [example])]), clips)
    return logits, example.ids[example.prefix_length :]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_logits(name: str, frozen: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    made = make(frozen, kind)
    document = convert_family(write(made, tmp_path), tmp_path / "export", made.frozen, kind.rates)
    assert document["name"] == kind.name and sorted(document["views"]) == sorted(map(str, kind.views))
    run = load_run(tmp_path / "export")
    assert run.config.llm.lora is not None
    assert (run.config.llm.lora.rank, run.config.llm.lora.terms) == (RANK, kind.terms)
    assert run.config.projector.layer_norm is kind.settings.get("norm", False) and run.config.audio_encoder.normalize
    trained = {
        key: value.numel()
        for key, value in made.state.items()
        if "lora_" in key or (key.split(".")[0].endswith("_proj"))
    }
    assert document["parameters"]["trained"] == sum(trained.values())
    for view in kind.views:
        ours, ids = our_logits(run, view, "ship blue sea")
        task = {ours: theirs for theirs, ours in TASKS.items()}[view.task]
        theirs = made.theirs.logits(task, theirs_speech(kind, view), ids[:-1])
        known = min(theirs.shape[1], ours.shape[1])
        torch.testing.assert_close(ours[:, :known], theirs[:, :known], rtol=0, atol=1e-5)
    assert len({str(our_logits(run, view, "sea")[0][0]) for view in kind.views}) == len(kind.views), "views differ"
    # The same through transformers' own interface, which writes the same export again.
    model = AutoModel.from_pretrained(tmp_path / "export")
    for view in kind.views:
        assert torch.equal(our_logits(model.run, view, "ship blue sea")[0], our_logits(run, view, "ship blue sea")[0])
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys(), "also of an untrained model"
    model.save_pretrained(tmp_path / "again")
    contents = files_of(tmp_path / "export")
    assert files_of(tmp_path / "again") == contents
    adapters = {
        "shared": ["shared"],
        "task": ["asr", "vsr", "avsr"],
        "shared task": [f"shared+{t}" for t in TASKS.values()],
    }
    assert {name.split("/")[1] for name in contents if name.startswith("peft/")} == set(adapters[" ".join(kind.terms)])


def test_texts_are_theirs(frozen: Path, tmp_path: Path) -> None:
    made = make(frozen, KINDS["omni st"])
    convert_family(write(made, tmp_path), tmp_path / "export", made.frozen, made.kind.rates)
    run, view = load_run(tmp_path / "export"), View("avsr", 16, 2)
    clips, ids = features(), list[int]()
    for _ in range(6):
        logits = made.theirs.logits("audiovisual", theirs_speech(made.kind, view), ids)[-1]
        ids.append(int(logits[: run.model.llm.config.vocab_size].argmax()))
    written = run.model.generate(
        [run.sequences.prefix(view, len(clips["audio"]) // 16, len(clips["video"]) // 2)],
        view,
        [clips["audio"]],
        [clips["video"]],
        eos=run.sequences.codec.eos,
        limits=[6],
    )
    eos = run.sequences.codec.eos
    assert written == [ids[: ids.index(eos)] if eos in ids else ids] and written[0]


def test_the_vectors_of_tags_matter(frozen: Path, tmp_path: Path) -> None:
    made = make(frozen, KINDS["stacked"])
    convert_family(write(made, tmp_path), tmp_path / "export", made.frozen, made.kind.rates)
    run, view = load_run(tmp_path / "export"), made.kind.views[0]
    before = our_logits(run, view, "sea")[0]
    vectors = load_file(tmp_path / "export" / "model.safetensors")
    tokenizer = made.theirs.tokenizer
    for name, token in (("audio_open", "<audio>"), ("video_close", "</video>")):
        row = made.state["llm.model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(token)]
        assert torch.equal(vectors[f"tags.{name}"], row)
    with torch.no_grad():
        run.model.tags["video_close"].zero_()
    assert (our_logits(run, view, "sea")[0] - before).abs().max() > 1e-3


def test_the_video_encoder_is_theirs(frozen: Path, tmp_path: Path) -> None:
    """Its low-rank terms count twice; batch norms whose statistics have moved make another encoder."""
    made = make(frozen, KINDS["lips"])
    moved = "video_encoder.feature_extractor_video.resnet.trunk.layer2.0.bn1.running_mean"

    def move(state: dict[str, Tensor]) -> None:
        state[moved] = state[moved] + 0.5

    path, rates = write(made, tmp_path, move), made.kind.rates
    with pytest.raises(UserError, match=r"stages.1.0.norm1.running_mean here\), which moved.*--own-video-encoder DIR"):
        convert_family(path, tmp_path / "export", made.frozen, rates)
    convert_family(path, tmp_path / "export", made.frozen, rates, tmp_path / "own")
    run = load_run(tmp_path / "export")
    clip = torch.randint(0, 256, (9, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    reference = small()
    state = reference.state_dict()
    state[moved.removeprefix("video_encoder.")] += 0.5
    for layer in range(2):
        for letter in "qv":
            prefix = f"video_encoder.encoder.layers.{layer}.self_attn.lora"
            down, up = (made.state[f"{prefix}_{part}_{letter.upper()}.weight"] for part in ("down", "up"))
            state[f"encoder.layers.{layer}.self_attn.{letter}_proj.weight"] += 2 * up @ down
    reference.load_state_dict(state)
    with torch.no_grad():
        expected = reference((clip[:, 4:92, 4:92] / 255 - 0.421) / 0.165)
        (found,) = run.encoders()["video"]([clip])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_audio_is_heard_as_theirs_is(frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whisper hears clips of zero mean and unit variance, however loud they are; a file is transcribed."""
    made = make(frozen, KINDS["speech"])
    convert_family(write(made, tmp_path), tmp_path / "export", made.frozen, made.kind.rates)
    clip = 0.05 * torch.randn(20_000, generator=torch.Generator().manual_seed(2)) + 0.01
    whisper = WhisperModel.from_pretrained(frozen / "whisper").encoder.eval()
    normal = (clip - clip.mean()) / clip.std(correction=0)
    mel = WhisperFeatureExtractor()(normal.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        (found,) = load_run(tmp_path / "export").encoders()["audio"]([clip])
        expected = whisper(mel)[0][0, :62]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    write_media_file(tmp_path / "clip.mp4", clip.numpy(), np.zeros((30, 96, 96), dtype=np.uint8))
    assert transcribe.main([str(tmp_path / "export"), str(tmp_path / "clip.mp4"), "--audio-rate", "3"]) == 0
    assert "llama_avsr, step 0, asr(3): 1.2" in capsys.readouterr().err


def test_what_no_tensor_tells_can_be_said(frozen: Path, tmp_path: Path) -> None:
    made = make(frozen, KINDS["smop"])
    said = ["llm.lora.scale=0.25", "projector.mixture.top_k=3", "name=other"]
    document = convert_family(write(made, tmp_path), tmp_path / "export", [*made.frozen, *said], made.kind.rates)
    run, view = load_run(tmp_path / "export"), made.kind.views[0]
    mixture = run.config.projector.mixture
    assert document["name"] == "other" and mixture is not None and (mixture.form, mixture.top_k) == ("jejr", 3)
    usual, ids = our_logits(run, view, "sea")
    theirs = made.theirs.logits("audiovisual", theirs_speech(made.kind, view), ids[:-1], scale=0.25)
    assert (usual - theirs[:, : usual.shape[1]]).abs().max() > 1e-3, "three experts of a token, not two"
    assert run.model.projectors.mixture is not None
    run.model.projectors.mixture.top_k = 2
    ours = our_logits(run, view, "sea")[0]
    torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], rtol=0, atol=1e-5)


def test_frozen_weights_may_be_absent(omni: Made, tmp_path: Path) -> None:
    """But not the embeddings, which hold the vectors of the tokens around speech."""

    def strip(state: dict[str, Tensor]) -> None:
        for name in [*state]:
            frozen = name.startswith(("llm.", "audio_encoder.", "video_encoder.")) and "lora_" not in name
            if frozen and name != "llm.model.embed_tokens.weight":
                del state[name]

    for folder, change in (("whole", lambda state: None), ("less", strip)):
        (tmp_path / folder).mkdir()
        convert_family(write(omni, tmp_path, change), tmp_path / folder / "export", omni.frozen, omni.kind.rates)
    whole, less = (load_file(tmp_path / folder / "export" / "model.safetensors") for folder in ("whole", "less"))
    assert whole.keys() == less.keys() and all(torch.equal(whole[name], less[name]) for name in whole)


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a missing factor": (
        lambda state: state.pop("llm.model.layers.1.self_attn.lora_up_V_shared.weight"),
        "lacks llm.model.layers.1.self_attn.lora_up_V_shared.weight",
    ),
    "a missing projector": (lambda state: state.pop("audio_proj.1.2.bias"), "lacks audio_proj.1.2.bias"),
    "no embeddings": (
        lambda state: state.pop("llm.model.embed_tokens.weight"),
        "lacks llm.model.embed_tokens.weight, which holds the vectors",
    ),
    "a missing frozen weight": (lambda state: state.pop("llm.model.norm.weight"), "lacks llm.model.norm.weight"),
    "an unknown tensor": (lambda state: state.update(resampler=torch.zeros(2)), "holds resampler, which has no place"),
    "an unknown term": (
        lambda state: state.update({"video_encoder.encoder.layers.2.self_attn.lora_up_Q.weight": torch.zeros(32, 2)}),
        r"holds video_encoder.encoder.layers.2.self_attn.lora_up_Q.weight",
    ),
    "an unknown part of the LLM": (
        lambda state: state.update({"llm.model.layers.9.mlp.up_proj.weight": torch.zeros(2)}),
        "holds llm.model.layers.9.mlp.up_proj.weight",
    ),
    "an unknown part of Whisper": (
        lambda state: state.update({"audio_encoder.conv3.weight": torch.zeros(2)}),
        "holds audio_encoder.conv3.weight",
    ),
    "another shape": (
        lambda state: state.update({"llm.model.layers.0.self_attn.lora_up_V.video.weight": torch.zeros(8, RANK)}),
        r"lora_up_V.video.weight has shape \[8, 4\].* it is \[32, 4\]",
    ),
    "another LLM": (
        lambda state: state.update(
            {"llm.model.layers.0.mlp.up_proj.weight": 1.1 * state["llm.model.layers.0.mlp.up_proj.weight"]}
        ),
        "llm.model.layers.0.mlp.up_proj.weight is not that of llm.path=",
    ),
    "another Whisper": (
        lambda state: state.update({"audio_encoder.conv1.bias": state["audio_encoder.conv1.bias"] + 1}),
        "audio_encoder.conv1.bias is not that of audio_encoder.path=",
    ),
    "other tokens": (
        lambda state: state.update({"llm.model.embed_tokens.weight": state["llm.model.embed_tokens.weight"][:-1]}),
        "has 21 rows; .* has 22 tokens",
    ),
    "another prompt": (
        lambda state: state.update(prompt_video=state["prompt_video"].flip(1)),
        "prompt_video of the checkpoint is another text than task.prompts.vsr",
    ),
}


@pytest.fixture(scope="module")
def omni(frozen: Path) -> Made:
    return make(frozen, KINDS["omni st"])


@pytest.mark.parametrize("fault", REFUSED)
def test_faults_are_named(fault: str, omni: Made, tmp_path: Path) -> None:
    change, message = REFUSED[fault]
    with pytest.raises(UserError, match=message):
        convert_family(write(omni, tmp_path, change), tmp_path / "export", omni.frozen, omni.kind.rates)
    assert not (tmp_path / "export").exists()


def test_rates_are_asked_for(omni: Made, frozen: Path, tmp_path: Path) -> None:
    path = write(omni, tmp_path)
    with pytest.raises(UserError, match="give --audio-rates"):
        convert_family(path, tmp_path / "export", omni.frozen, {"audio": None, "video": [2, 5]})
    with pytest.raises(UserError, match="has 2 projectors of video: give as many rates"):
        convert_family(path, tmp_path / "export", omni.frozen, {"audio": [4, 16], "video": [2]})
    made = make(frozen, KINDS["stacked"])
    with pytest.raises(UserError, match=r"--audio-rates \[3\]: the checkpoint's projectors stack \[4\] frames"):
        convert_family(write(made, tmp_path), tmp_path / "export", made.frozen, {"audio": [3], "video": None})


def test_options_without_effect_are_refused(frozen: Path, tmp_path: Path) -> None:
    made = make(frozen, KINDS["speech"])
    path = write(made, tmp_path)
    with pytest.raises(UserError, match="--video-rates: the checkpoint reads no video"):
        convert_family(path, tmp_path / "export", made.frozen, {"video": [2]})
    with pytest.raises(UserError, match=r"--own-video-encoder .*: the checkpoint reads no video"):
        convert_family(path, tmp_path / "export", made.frozen, {}, tmp_path / "own")
    assert not (tmp_path / "own").exists() and not (tmp_path / "export").exists()


def test_the_command(omni: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Lightning checkpoint holds the same under a name."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in omni.state.items()}, "epoch": 7}, path)
    arguments = [str(path), str(tmp_path / "export"), "--audio-rates", "16,4", "--video-rates", "2,5", *omni.frozen]
    assert command.main(arguments) == 0
    assert "omni_avsr" in capsys.readouterr().out
    assert "by its authors" in (tmp_path / "export" / "README.md").read_text()
    assert json.loads((tmp_path / "export" / "config.json").read_text())["source"]["checkpoint"] == "last.ckpt"
    assert command.main(arguments) == 2 and "replaces nothing" in capsys.readouterr().err


def test_nothing_of_a_file_runs(tmp_path: Path) -> None:
    torch.save({"model": copy.copy}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        read_state(tmp_path / "bad.pth")
