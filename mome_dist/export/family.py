"""From checkpoints of the authors of Llama-AVSR, Llama-MTSK, Llama-SMoP and Omni-AVSR to exports of this project.

Every tensor of a file is accounted for: it becomes one of ours; it is a frozen weight, which is compared with the model
that it is said to be and left out; or it is an error that names it.

The authors add tokens around speech to the LLM (and to Llama's tokenizer ``<pad>`` before them), whose random vectors
never train. An export holds these vectors (``tags.*``), and the model puts them in the place of the embeddings of the
tokens that ``llm.tags`` names. Their prefix is that of this project, so the logits are theirs, but for the rows of the
added tokens, which nothing decodes here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome_dist.checkpoint.format import fingerprint
from mome_dist.checkpoint.saved import Saved
from mome_dist.config import RunConfig, load_config
from mome_dist.config.derived import frozen_sections
from mome_dist.data.encoding import load_encoder
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_run
from mome_dist.export.family_file import LLM_LORA, MIXTURE, TASKS, VIDEO_LORA, Told, examine, read_state
from mome_dist.files import check_absent, sha256_of
from mome_dist.hub import HubModel, fetch
from mome_dist.inference.load import LoadedRun, assemble
from mome_dist.llm.tokens import TokenTable
from mome_dist.speech.avhubert import AVHubertEncoder
from mome_dist.speech.avhubert.conversion import convert
from mome_dist.speech.avhubert.settings import HEADS, PRE_NORM
from mome_dist.speech.clip_encoder import ClipEncoder
from mome_dist.speech.geometry import AVHUBERT
from mome_dist.speech.video_encoders import load_video_encoder
from mome_dist.speech.whisper import WhisperAudioEncoder

EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
ADDED = ("<audio>", "</audio>", "<video>", "</video>")
"""The tokens that the authors put around speech, in the order of our tags."""

_PART = {"a": "down", "b": "up"}
# Older versions of transformers store it.
_TABLE = re.compile(r"llm\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Frozen weights of an average over ten checkpoints, added up in bf16, are off by less, relative to their norm.
_ROUNDING = 2.0**-7


def convert_family(
    checkpoint: str | Path,
    target: str | Path,
    overrides: Sequence[str],
    rates: Mapping[str, Sequence[int] | None],
    own_video_encoder: Path | None = None,
) -> dict[str, Any]:
    """Write the export of a published checkpoint.

    Args:
        checkpoint: file of torch.
        target: directory to make; it appears whole or not at all.
        overrides: of the configuration, with the last word: the frozen models (``llm=llama3_2_1b``), and what no tensor
            tells (``llm.lora.scale``, ``projector.mixture.top_k``).
        rates: of each stream in the authors' order, None where it is told.
        own_video_encoder: directory to make of the file's AV-HuBERT, which then takes the place of the one that the
            configuration names: the statistics of its batch norms go on moving while the authors train the rest.

    Returns:
        As `mome_dist.export.adapter.export_adapter`.

    Raises:
        UserError: naming a tensor that is missing, unknown or of a wrong shape, or a frozen model that is another one.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    check_absent(target, "an export")
    if own_video_encoder is not None:
        check_absent(own_video_encoder, "an export")
    tensors = read_state(checkpoint)
    told = examine(tensors, _Widths(overrides), rates)
    config = load_config([*told.overrides, *overrides])
    for section in frozen_sections(config):
        _find(config, section)
    if own_video_encoder is not None and "video" not in told.streams:
        raise UserError(
            f"--own-video-encoder {own_video_encoder}: the checkpoint reads no video; leave the option out."
        )
    try:
        if "video" in told.streams:
            _check_video(tensors, config, own_video_encoder)
        if "audio" in told.streams:
            _check_audio(tensors, config)
        frozen = {section: fingerprint(getattr(config, section).path) for section in frozen_sections(config)}
        saved = Saved(checkpoint, config, 0, frozen, None, {}, sha256_of(checkpoint))
        run = assemble(saved, weights=False)
        _fill(run, tensors, told)
        _check_llm(run, tensors)
        return export_run(run, saved, target)
    except BaseException:
        if own_video_encoder is not None:
            shutil.rmtree(own_video_encoder, ignore_errors=True)
        raise


class _Widths(dict[str, int]):
    """Widths of the encoders that a command line names, found when they are asked for."""

    def __init__(self, overrides: Sequence[str]) -> None:
        super().__init__()
        self._overrides = overrides

    def __missing__(self, stream: str) -> int:
        config = load_config(self._overrides)
        _find(config, f"{stream}_encoder")
        return load_encoder(config, stream, torch.device("cpu")).width


def _find(config: RunConfig, section: str) -> None:
    """Check that a frozen model is there; one of the hub is fetched."""
    part = getattr(config, section)
    if (model := HubModel.parse(f"{section}.path", part.path)) is not None:
        part.path = str(fetch(f"{section}.path", model, False))
    if not Path(part.path).is_dir():
        raise UserError(
            f"{section}.path={part.path} does not exist: name the {section.replace('_', ' ')} that the checkpoint was "
            "trained with."
        )


def _fill(run: LoadedRun, tensors: Mapping[str, Tensor], told: Told) -> None:
    """Give a model the weights of a checkpoint, all of them."""
    tags = run.sequences.codec.tags
    if len(set(tags.values())) < len(tags):
        raise UserError(
            f"llm.tags are {list(tags.values())}: here they have to be four different tokens, each of which gets a "
            "vector of its own; name unused ones."
        )
    run.model.own_tags(tags)
    rows = marker_rows(run.config.llm.path, _tensor(tensors, EMBEDDINGS).shape[0])
    expected = {name: value for name, value in run.model.state_dict().items() if not name.startswith("tags.")}
    sources = {name: sources_of(name, told) for name in expected}
    used = {theirs for names in sources.values() for theirs in names}
    if missing := sorted(used - tensors.keys()):
        raise UserError(f"The checkpoint lacks {_some(missing)}.")
    frozen = ("llm.", *(f"{stream}_encoder." for stream in told.streams))
    prompts = {f"prompt_{TASKS[task]}" for task in TASKS} if told.name == "omni_avsr" else set()
    rest = tensors.keys() - used - prompts
    ours = {f"llm.{name}" for name in run.model.llm.state_dict()} | {HEAD}
    left_out = {name for name in rest if name.startswith(frozen) and ".lora_" not in name}
    left_out -= {
        name for name in left_out if name.startswith("llm.") and name not in ours and not _TABLE.fullmatch(name)
    }
    if unknown := sorted(rest - left_out):
        raise UserError(f"The checkpoint holds {_some(unknown)}, which has no place in a model of this family.")
    weights = {f"tags.{name}": tensors[EMBEDDINGS][row].float() for name, row in zip(tags, rows, strict=True)}
    for name, names in sources.items():
        stacked = name.startswith("projectors.mixture.experts.")
        shape = expected[name].shape[1:] if stacked else expected[name].shape
        for theirs in names:
            if tensors[theirs].shape != shape:
                raise UserError(
                    f"The checkpoint's {theirs} has shape {list(tensors[theirs].shape)}; with this LLM and these "
                    f"encoders it is {list(shape)}."
                )
        values = [tensors[theirs].float() for theirs in names]
        weights[name] = torch.stack(values) if stacked else values[0]
    run.model.load_state_dict(weights)
    _check_prompts(run, tensors)


def sources_of(name: str, told: Told) -> list[str]:
    """The published names that a tensor of ours is made of: one, or those of all experts of a mixture."""
    parts = name.split(".")
    if parts[0] == "llm_lora":
        _, layer, projection, term, factor = parts
        suffix = f".{TASKS[term]}" if term in TASKS else "_shared" if "task" in told.terms else ""
        return [LLM_LORA.format(layer=layer, part=_PART[factor], projection=projection.upper(), term=suffix)]
    if parts[0] == "lora":  # lora.video.transformer.layers.N.attention.q_proj.lora_a
        projection, factor = parts[6][0].upper(), parts[7][-1]
        return [VIDEO_LORA.format(layer=parts[4], part=_PART[factor], projection=projection)]
    if parts[1] == "mixture":
        if parts[2] == "routers":
            return [f"{MIXTURE}.gate.weight"]
        return [f"{MIXTURE}.experts.{number}.{'.'.join(parts[4:])}" for number in range(told.experts or 0)]
    _, _, stream, key, *rest = parts  # projectors.streams.audio.rate4.0.weight
    number = [str(told.rates[stream].index(int(key.removeprefix("rate"))))] if told.per_rate else []
    return [".".join([f"{stream}_proj", *number, *rest])]


def marker_rows(llm: str | Path, rows: int) -> list[int]:
    """The rows of the authors' embeddings that are their tokens around speech.

    Args:
        llm: directory of the plain LLM.
        rows: of their embeddings.

    Raises:
        UserError: if there are not as many rows as their tokenizer then has tokens.
    """
    table = TokenTable.read(llm)
    ids = dict(table.ids)
    added = ADDED if table.bos is None else ("<pad>", *ADDED)  # Qwen2 has a token for padding, and no start token
    for token in added:
        ids.setdefault(token, max(ids.values()) + 1)
    if rows != (count := max(ids.values()) + 1):
        raise UserError(
            f"The checkpoint's {EMBEDDINGS} has {rows} rows; the tokenizer in {llm} with {', '.join(added)} has "
            f"{count} tokens: name the LLM that it was trained with, llm=NAME or llm.path=DIR."
        )
    return [ids[token] for token in ADDED]


def _check_prompts(run: LoadedRun, tensors: Mapping[str, Tensor]) -> None:
    """The prompts that a file holds, as embeddings, are those of the configuration."""
    for task, ids in run.sequences.fixed_ids()["prompts"].items():
        name = f"prompt_{TASKS[task]}"
        if name in tensors and not _alike(tensors[name][0], tensors[EMBEDDINGS][torch.tensor(ids)]):
            raise UserError(f"{name} of the checkpoint is another text than task.prompts.{task}: set that.")


def _check_llm(run: LoadedRun, tensors: Mapping[str, Tensor]) -> None:
    own = {f"llm.{name}": value for name, value in run.model.llm.state_dict().items()}
    tied = run.model.llm.config.tie_word_embeddings
    there = {name for name in own if name in tensors}
    if there != {EMBEDDINGS} and (missing := sorted(own.keys() - there - ({HEAD} if tied else set()))):
        raise UserError(f"The checkpoint lacks {_some(missing)}.")
    for name in sorted(there):
        theirs, ours = tensors[name], own[name]
        if name in (EMBEDDINGS, HEAD):
            count = min(len(theirs), len(ours), 1 + max(TokenTable.read(run.config.llm.path).ids.values()))
            theirs, ours = theirs[:count], ours[:count]
        _compare(name, theirs, ours, f"llm.path={run.config.llm.path}")


def _check_audio(tensors: Mapping[str, Tensor], config: RunConfig) -> None:
    encoder = load_encoder(config, "audio", torch.device("cpu"))
    assert isinstance(encoder, WhisperAudioEncoder)
    own = {f"audio_encoder.{name}": value for name, value in encoder.encoder.state_dict().items()}
    found = {name: value for name, value in tensors.items() if name.startswith("audio_encoder.")}
    if not found:
        return
    if unlike := sorted(own.keys() ^ found.keys()):
        raise UserError(
            f"The checkpoint {'lacks' if unlike[0] in own else 'holds'} {_some(unlike)}, unlike "
            f"audio_encoder.path={config.audio_encoder.path}: name the Whisper that it was trained with."
        )
    for name, value in found.items():
        _compare(name, value, own[name], f"audio_encoder.path={config.audio_encoder.path}")


def _check_video(tensors: Mapping[str, Tensor], config: RunConfig, own: Path | None) -> None:
    """Compare AV-HuBERT, or make a directory of the file's own and let the configuration name it."""
    encoder: ClipEncoder = load_video_encoder(config.video_encoder.path)
    prefix = "video_encoder."
    lora = re.compile(VIDEO_LORA.format(layer=r"\d+", part="(down|up)", projection="[QV]"))
    found = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and not lora.fullmatch(name)
    }
    place = f"video_encoder.path={config.video_encoder.path}"
    if not found:
        if own is not None:
            raise UserError(f"--own-video-encoder {own}: the checkpoint holds no AV-HuBERT of its own.")
        return
    if not isinstance(encoder, AVHubertEncoder):
        raise UserError(f"{place} is no AV-HuBERT; make one of the published file with mome-dist convert avhubert.")
    theirs = convert(found, {}, {HEADS: encoder.config.heads, PRE_NORM: True}).encoder
    ours, moved = encoder.state_dict(), []
    for name, value in theirs.state_dict().items():
        if "running_" not in name and not name.endswith("num_batches_tracked"):
            _compare(f"video_encoder ({name} here)", value, ours[name], place)
        elif "running_" in name and not _alike(value, ours[name]):
            moved.append(name)
    if own is not None:
        theirs.save_pretrained(own, {"geometry": AVHUBERT, "source": {"model": "of a checkpoint of its family"}})
        config.video_encoder.path = str(own)
    elif moved:
        raise UserError(
            f"The checkpoint's AV-HuBERT is that of {place}, but for the statistics of its batch norms ({_some(moved)} "
            "here), which moved in training: keep it in a directory of its own, with --own-video-encoder DIR."
        )


def _compare(name: str, theirs: Tensor, ours: Tensor, place: str) -> None:
    if theirs.shape != ours.shape or not _alike(theirs, ours):
        raise UserError(f"The checkpoint's {name} is not that of {place}: name the model that it was trained with.")


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= _ROUNDING * other.norm())


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"The checkpoint lacks {name}, which holds the vectors of the tokens around speech.")
    return tensors[name]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
