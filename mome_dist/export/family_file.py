"""What a checkpoint of the authors of Llama-AVSR, Llama-MTSK, Llama-SMoP and Omni-AVSR tells by its names and shapes.

Such a file is the state of their whole model: the frozen LLM, Whisper's encoder and AV-HuBERT beside what trained.
Names of what trained:

    audio_proj.0.weight             the only projector of a stream; 0 and 2 are linear maps, 3 is a layer norm
    audio_proj.1.0.weight           the same of the second rate
    audiovisual_proj.gate.weight    the router of a mixture, audiovisual_proj.experts.E.0.weight a map of expert E
    llm.model.layers.N.self_attn.lora_down_Q.weight, lora_up_Q, lora_down_V, lora_up_V
                                    A and B of queries and values; lora_down_Q.TASK where each task has its own, with
                                    TASK audio, video or audiovisual, and lora_down_Q_shared beside it
    video_encoder.encoder.layers.N.self_attn.lora_down_Q.weight, ...
                                    the same of AV-HuBERT

Source: github.com/umbertocappellazzo, repositories Llama-AVSR, Omni-AVSR and Dr-SHAP-AV.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mome_dist.errors import UserError, first_line
from mome_dist.files import check_downloaded

STREAMS = ("audio", "video")
TASKS = {"asr": "audio", "vsr": "video", "avsr": "audiovisual"}
"""What the authors call each task."""

MIXTURE = "audiovisual_proj"
LLM_LORA = "llm.model.layers.{layer}.self_attn.lora_{part}_{projection}{term}.weight"
VIDEO_LORA = "video_encoder.encoder.layers.{layer}.self_attn.lora_{part}_{projection}.weight"
# Where a frozen encoder's width shows: the layer norm at its end.
_WIDTHS = {"audio": "audio_encoder.layer_norm.weight", "video": "video_encoder.encoder.layer_norm.weight"}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: a state, or a Lightning checkpoint that holds one. No code of the file runs.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    path = Path(path)
    check_downloaded(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as tensors ({first_line(error)}); download it again.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = {str(name).removeprefix("model."): value for name, value in content["state_dict"].items()}
    if not isinstance(content, dict) or not content or not all(isinstance(each, Tensor) for each in content.values()):
        raise UserError(f"{path} holds no state of a model, tensors by name.")
    return {str(name): value for name, value in content.items()}


@dataclass(frozen=True)
class Told:
    """What names and shapes say of a model.

    Attributes:
        name: of the kind of model.
        streams: that it reads.
        per_rate: whether projectors are numbered, one for each rate.
        rates: of each stream, in the order of the numbers.
        experts: of the mixture of projectors; None without one.
        terms: "shared" and "task", the low-rank terms of the LLM that are summed; none if it has none.
        overrides: the configuration, as a command line writes it.
    """

    name: str
    streams: tuple[str, ...]
    per_rate: bool
    rates: dict[str, list[int]]
    experts: int | None
    terms: tuple[str, ...]
    overrides: list[str]


def examine(
    tensors: Mapping[str, Tensor], widths: Mapping[str, int], given: Mapping[str, Sequence[int] | None]
) -> Told:
    """What a checkpoint is.

    Args:
        tensors: by name.
        widths: of the encoders' features, for those that are not in the file.
        given: rates of each stream, in the authors' order; None where the file tells them.

    Raises:
        UserError: if it is none of theirs, or rates are missing or do not fit.
    """
    streams: tuple[str, ...] = STREAMS
    experts = 1 + _highest(tensors, rf"{MIXTURE}\.experts\.(\d+)\.") or None
    projectors = {stream: 1 + _highest(tensors, rf"{stream}_proj\.(\d+)\.0\.weight") for stream in STREAMS}
    if experts is not None:
        first = dict.fromkeys(STREAMS, f"{MIXTURE}.experts.0.")
    else:
        streams = tuple(stream for stream in STREAMS if any(name.startswith(f"{stream}_proj.") for name in tensors))
        first = {stream: f"{stream}_proj." + ("0." if projectors[stream] else "") for stream in streams}
    if not streams:
        raise UserError(
            f"The checkpoint holds no audio_proj, video_proj or {MIXTURE}.experts: it is none of this family."
        )
    if idle := [stream for stream in STREAMS if stream not in streams and given.get(stream) is not None]:
        raise UserError(f"--{idle[0]}-rates: the checkpoint reads no {idle[0]}; leave the option out.")
    per_rate = experts is None and any(projectors[stream] for stream in streams)
    widths = {
        stream: tensors[name].shape[0] if (name := _WIDTHS[stream]) in tensors else widths[stream] for stream in streams
    }
    ratios = {stream: _ratios(tensors, stream, first[stream], widths[stream], projectors[stream]) for stream in streams}
    stacked = any(ratio > 1 for each in ratios.values() for ratio in each)
    rates = {stream: _rates(stream, ratios[stream] if stacked else None, given.get(stream)) for stream in streams}
    for stream in streams:
        if per_rate and len(rates[stream]) != projectors[stream]:
            raise UserError(
                f"The checkpoint has {projectors[stream]} projectors of {stream}: give as many rates, in the authors' "
                f"order, with --{stream}-rates; these are {rates[stream]}."
            )
    rank, terms = _llm_lora(tensors)
    together = "task" in terms or any(f"prompt_{task}" in tensors for task in TASKS.values())
    tasks = _tasks(streams) if together else ["avsr" if len(streams) > 1 else "asr" if "audio" in streams else "vsr"]
    name = "omni_avsr" if together else "llama_smop" if experts else "llama_mtsk" if per_rate else "llama_avsr"
    one = first[streams[0]]
    overrides = [
        f"name={name}",
        "mome=none",
        "audio_encoder.normalize=true",
        "decoding.num_beams=15",
        "decoding.max_new_tokens=32",
        f"task.tasks=[{','.join(tasks)}]",
        *(
            f"task.{task}_{stream}_rates=[{','.join(map(str, rates[stream]))}]"
            for task in tasks
            for stream in streams
            if TASKS[task] in (stream, "audiovisual")
        ),
        f"projector.hidden_size={_tensor(tensors, f'{one}0.weight').shape[0]}",
        f"projector.layer_norm={str(f'{one}3.weight' in tensors).lower()}",
        f"projector.per_rate={str(per_rate or (stacked and experts is None)).lower()}",
        f"projector.compression={'stack' if stacked else 'pool'}",
    ]
    if experts is not None:
        overrides.append(f"projector.mixture={{form:jejr,experts:{experts},top_k:2}}")
    if terms:
        overrides.append(f"llm.lora={{rank:{rank},scale:0.125,start:b_random,terms:[{','.join(terms)}]}}")
    if (a := VIDEO_LORA.format(layer=0, part="down", projection="Q")) in tensors:
        rank = len(tensors[a])
        # Their multiplier is 2, whatever the rank.
        overrides += [f"video_encoder.lora={{rank:{rank},alpha:{2 * rank}}}", "data.features=online"]
    return Told(name, streams, per_rate, rates, experts, terms, overrides)


def _llm_lora(tensors: Mapping[str, Tensor]) -> tuple[int, tuple[str, ...]]:
    """The rank and the kinds of the low-rank terms of the LLM; no kinds where it has none."""
    pattern = re.compile(
        r"llm\.model\.layers\.0\.self_attn\.lora_down_Q(_shared|\.(?:audio|video|audiovisual))?\.weight"
    )
    found = {match[1] or "": len(value) for name, value in tensors.items() if (match := pattern.fullmatch(name))}
    kinds = {"shared" if term in ("", "_shared") else "task" for term in found}
    return max(found.values(), default=0), tuple(sorted(kinds))


def _tasks(streams: Sequence[str]) -> list[str]:
    return [task for task, theirs in TASKS.items() if theirs in streams or len(streams) > 1]


def _ratios(tensors: Mapping[str, Tensor], stream: str, first: str, width: int, numbered: int) -> list[int]:
    """How many features the input of each projector of a stream is made of."""
    names = [f"{stream}_proj.{number}.0.weight" for number in range(numbered)] or [f"{first}0.weight"]
    inputs = [_tensor(tensors, name).shape[1] for name in names]
    for name, size in zip(names, inputs, strict=True):
        if size % width:
            raise UserError(
                f"{name} reads {size} values, which are no whole features of the {stream} encoder, each {width} wide: "
                f"name the encoder that it was trained with, {stream}_encoder.path=DIR."
            )
    return [size // width for size in inputs]


def _rates(stream: str, told: Sequence[int] | None, given: Sequence[int] | None) -> list[int]:
    if told is None and given is None:
        raise UserError(
            f"Average pooling leaves no trace of its rate in a checkpoint: give --{stream}-rates, such as "
            f"{'4,16' if stream == 'audio' else '2,5'}, in the authors' order."
        )
    if told is not None and given is not None and list(told) != list(given):
        raise UserError(f"--{stream}-rates {list(given)}: the checkpoint's projectors stack {list(told)} frames.")
    return list(given or () if told is None else told)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"The checkpoint lacks {name}, a matrix.")
    return tensors[name]


def _highest(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """The highest number that names have where the pattern's group is; -1 if no name fits."""
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)
