"""Checks of the values of a configuration that need no file and no number of processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mome_dist.config.derived import lora_of, rates_of, router_of, streams_of, views_of, widths_of
from mome_dist.config.graphs import check_graphs
from mome_dist.config.schema import DecodingConfig, RunConfig, TaskConfig, TrainingConfig
from mome_dist.errors import UserError
from mome_dist.moe.forms.registry import FORMS, find_form
from mome_dist.speech.views import streams_read

# Linear layers of the encoders' Transformers, by the last parts of their names (Whisper's and Hubert's).
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LORA_TARGETS = {"audio": (*ATTENTION, "fc1", "fc2"), "video": (*ATTENTION, "intermediate_dense", "output_dense")}


def check_values(config: RunConfig) -> None:
    """Check the values of a configuration that need no file and no number of processes.

    Raises:
        UserError: naming the first wrong key, and the fix.
    """
    _check_choices(config, "")
    _check_numbers(config)
    _check_task(config)
    _check_router(config)
    _check_augmentation(config)
    _check_lora(config)
    _check_llm_lora(config)
    _check_projector(config)
    check_graphs(config)


def _check_choices(section: Any, prefix: str) -> None:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{key}.")
        choices = field.metadata.get("choices")
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                raise UserError(f"{key}={item!r}: choose from {', '.join(choices)}.")


def check_texts(config: RunConfig) -> None:
    """Refuse an empty text where a training has to name something; what was trained so can still be loaded.

    Raises:
        UserError: naming the key.
    """
    named = {
        "name": config.name,
        "output_dir": config.output_dir,
        "training.init_from": config.training.init_from,
        "training.wandb_project": config.training.wandb_project,
        "training.wandb_entity": config.training.wandb_entity,
        "training.wandb_group": config.training.wandb_group,
        **{f"training.wandb_tags[{place}]": tag for place, tag in enumerate(config.training.wandb_tags)},
        **{f"task.prompts.{task}": prompt for task, prompt in config.task.prompts.items()},
    }
    for key, text in named.items():
        if text is not None and not text.strip():
            raise UserError(f"{key} is empty: {'give a text' if 'prompts' in key else 'name one'}, or leave it out.")
    _check_wandb(config.training)


def _check_wandb(training: TrainingConfig) -> None:
    """What Weights & Biases would refuse once the run has started, or nobody would see."""
    project = training.wandb_project
    if project is None:
        given = {
            "wandb_entity": training.wandb_entity,
            "wandb_group": training.wandb_group,
            "wandb_tags": training.wandb_tags,
            "wandb_mode": "" if training.wandb_mode == "auto" else training.wandb_mode,
        }
        for key, value in given.items():
            if value:
                raise UserError(
                    f"training.{key}={value} is of a run on Weights & Biases, and there is none: name its project with "
                    "training.wandb_project, or leave it out."
                )
        return
    if len(project) > 128 or set(project) & set("/\\#?%:"):
        raise UserError(
            f"training.wandb_project={project!r}: a project has at most 128 characters, and none of / \\ # ? % :; its "
            "user or team is named by training.wandb_entity."
        )
    for tag in training.wandb_tags:
        if len(tag) > 64:
            raise UserError(f"training.wandb_tags: {tag!r} is longer than 64 characters, which a tag may have.")


def _check_numbers(config: RunConfig) -> None:
    at_least: dict[str, tuple[float | None, float]] = {
        "mome.routed_experts": (config.mome.routed_experts, 0),
        "mome.top_k": (config.mome.top_k, 1),
        "mome.shared_experts": (config.mome.shared_experts, 0),
        "mome.bottleneck": (config.mome.bottleneck, 1),
        "mome.balance_loss": (config.mome.balance_loss, 0),
        "mome.z_loss": (config.mome.z_loss, 0),
        "mome.bias_rate": (config.mome.bias_rate, 0),
        "llm.sink_loss": (config.llm.sink_loss, 0),
        "mome.min_capacity": (config.mome.min_capacity, 1),
        "projector.hidden_size": (config.projector.hidden_size, 1),
        "data.batch_size": (config.data.batch_size, 1),
        "data.max_frames": (config.data.max_frames, 1),
        "data.accumulation": (config.data.fixed_accumulation, 1),
        "data.microbatch_tokens": (config.data.microbatch_tokens, 1),
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
        "data.validation_utterances": (config.data.validation_utterances, 1),
        "optimizer.learning_rate": (config.optimizer.learning_rate, 0),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
        "optimizer.epsilon": (config.optimizer.epsilon, 0),
        "optimizer.warmup_steps": (config.optimizer.warmup_steps, 0),
        "optimizer.final_fraction": (config.optimizer.final_fraction, 0),
        "optimizer.gradient_clipping": (config.optimizer.gradient_clipping, 0),
        "parallel.timeout_seconds": (config.parallel.timeout_seconds, 1),
    }
    for key, (value, least) in at_least.items():
        if value is not None and not least <= value < math.inf:
            raise UserError(
                f"{key}={value}: must be {'a finite number' if value == math.inf else f'at least {least}'}."
            )
    if config.optimizer.final_fraction > 1:
        raise UserError(
            f"optimizer.final_fraction={config.optimizer.final_fraction}: the rate ends at this share of its peak, so "
            "it is from 0 to 1."
        )
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={betas}: give two numbers of at least 0 and below 1, such as [0.9,0.98].")
    if (config.data.batch_size is None) == (config.data.max_frames is None):
        raise UserError(
            f"data.batch_size={config.data.batch_size} and data.max_frames={config.data.max_frames}: a batch is either "
            "a number of utterances or a budget of video frames; set one of them and the other to null."
        )
    if isinstance(config.data.accumulation, str) and config.data.accumulation != "auto":
        raise UserError(f"data.accumulation={config.data.accumulation!r}: give a number of microbatches, or auto.")
    if config.data.accumulation != "auto" and config.data.microbatch_tokens is not None:
        raise UserError(
            f"data.microbatch_tokens={config.data.microbatch_tokens} cuts batches only with data.accumulation=auto, "
            f"but that is {config.data.accumulation}: set one of them."
        )
    if config.mome.expert not in FORMS:
        raise UserError(f"mome.expert={config.mome.expert!r}: choose from {', '.join(FORMS)}.")
    if not config.mome.routed_experts and not config.mome.shared_experts:
        raise UserError("mome.routed_experts=0 and mome.shared_experts=0 leave no expert: raise one, or set mome=none.")
    if config.mome.routed_experts > 1 and config.mome.top_k > config.mome.routed_experts:
        raise UserError(
            f"mome.top_k={config.mome.top_k} is more than mome.routed_experts={config.mome.routed_experts}: a token "
            "cannot use more experts than there are."
        )
    _check_widths(config)
    for key in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(config.mome, key)
        if factor is not None and factor <= 0:
            raise UserError(f"mome.{key}={factor}: must be above 0, or null to drop nothing.")
    check_decoding(config.decoding)


def _check_widths(config: RunConfig) -> None:
    mome = config.mome
    if mome.widths is not None:
        if mome.width_rule != "equal":
            raise UserError(f"mome.widths and mome.width_rule={mome.width_rule} are both given: set one of them.")
        if len(mome.widths) != mome.routed_experts or min(mome.widths) < 1:
            raise UserError(
                f"mome.widths={mome.widths}: give {mome.routed_experts} numbers of at least 1, one of each expert."
            )
    widths = widths_of(config)
    if widths is not None and not find_form(mome.expert).narrows:
        able = ", ".join(name for name in FORMS if find_form(name).narrows)
        raise UserError(
            f"mome.expert={mome.expert} has equal widths only: set mome.width_rule=equal, or one of {able}."
        )
    if widths is None and mome.balance_by_width and mome.experts:
        raise UserError("mome.balance_by_width=true has no effect on equal widths: set mome.width_rule or mome.widths.")


def _check_task(config: RunConfig) -> None:
    task = config.task
    if not task.tasks:
        raise UserError("task.tasks is empty: name at least one of asr, vsr, avsr.")
    for key in ("asr_audio_rates", "vsr_video_rates", "avsr_audio_rates", "avsr_video_rates"):
        rates = getattr(task, key)
        if not rates or min(rates) < 1:
            raise UserError(f"task.{key}={rates}: give rates of at least 1 (frames per token).")
    views = len(views_of(config))
    if task.views_per_step is not None and not 1 <= task.views_per_step <= views:
        raise UserError(f"task.views_per_step={task.views_per_step}: must be null or from 1 to {views}.")
    for name in task.tasks:
        if name not in task.prompts:
            raise UserError(f"task.prompts has no prompt for {name!r}.")
    if task.sampling == "rates":
        _check_rates(task)
    _check_weights(config)


def _check_rates(task: TaskConfig) -> None:
    """Refuse rates that one of the tasks does not have, where all train at the same drawn ones."""
    if task.views_per_step is not None:
        raise UserError(
            f"task.views_per_step={task.views_per_step} would have no effect: with task.sampling=rates a step has one "
            "view of each task. Set it to null, or task.sampling=views."
        )
    for key, other, task_of_key in (
        ("asr_audio_rates", "avsr_audio_rates", "asr"),
        ("vsr_video_rates", "avsr_video_rates", "vsr"),
    ):
        mine, theirs = getattr(task, key), getattr(task, other)
        if {task_of_key, "avsr"} <= set(task.tasks) and sorted(mine) != sorted(theirs):
            raise UserError(
                f"task.{key}={mine} and task.{other}={theirs}: with task.sampling=rates every task is trained at the "
                "drawn rates; make them equal, or set task.sampling=views."
            )


def _check_weights(config: RunConfig) -> None:
    weights = dataclasses.asdict(config.task.weights)
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"task.weights.{name}={weight}: a weight is a number of at least 0.")
    views = views_of(config)
    weighed = [view for view in views if weights[view.task]]
    if not weighed:
        raise UserError(
            f"task.weights gives each of task.tasks={config.task.tasks} a weight of 0: nothing would train on speech."
        )
    for view in views:
        for stream in streams_read([view]):
            rate = getattr(view, f"{stream}_rate")
            trained = {getattr(each, f"{stream}_rate") for each in weighed} - {None}
            adapts = config.projector.trainable or stream in lora_of(config)
            if adapts and (not trained or (config.projector.per_rate and rate not in trained)):
                raise UserError(
                    f"task.weights.{view.task}=0 leaves the {stream} projector"
                    f"{f' of rate {rate}' if config.projector.per_rate else ''} without a task to train on: leave "
                    f"{view.task} out of task.tasks, or give it a weight."
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


def _check_router(config: RunConfig) -> None:
    """Refuse what the run's kind of router does not have, or cannot do."""
    mome, spec = config.mome, router_of(config)
    kind, router = spec.settings, f"mome.router.name={spec.name}"
    if not mome.experts:
        return
    _check_choices(kind, "mome.router.")
    if problem := kind.problem(mome.routed_experts, mome.top_k):
        raise UserError(f"mome.router.{problem}")
    allowed = {"score": kind.scores, "renormalize": kind.renormalizes, "dispatch": ("auto", *kind.dispatches)}
    for key, values in allowed.items():
        if getattr(mome, key) not in values:
            names = " or ".join(str(value).lower() for value in values)
            raise UserError(f"mome.{key}={str(getattr(mome, key)).lower()} does not go with {router}: set {names}.")
    if mome.bias_rate > 0 and not kind.takes_bias:
        raise UserError(f"mome.bias_rate={mome.bias_rate} does not go with {router}, which takes no bias: set 0.")
    if not kind.batch_invariant and config.decoding.batch_size > 1:
        raise UserError(
            f"decoding.batch_size={config.decoding.batch_size} does not go with {router}, whose choice for a clip "
            "depends on those beside it: set 1."
        )


def check_learning(config: RunConfig) -> None:
    """Refuse a run whose routers would learn nothing; what was trained so can still be loaded.

    Raises:
        UserError: naming the keys.
    """
    mome = config.mome
    if mome.experts and mome.top_k == 1 and mome.renormalize:
        raise UserError(
            "mome.top_k=1 and mome.renormalize=true: the gate of one expert, divided by itself, is always 1, so that "
            "its router learns nothing from the task. Set mome.renormalize=false, or mome.top_k=2."
        )


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


def _check_projector(config: RunConfig) -> None:
    projector, mixture = config.projector, config.projector.mixture
    stacked = projector.compression == "stack"
    if mixture is None:
        if stacked and not projector.per_rate:
            raise UserError(
                "projector.compression=stack needs projector.per_rate=true: the input width grows with the rate."
            )
        return
    if projector.per_rate:
        raise UserError(
            "projector.per_rate=true and projector.mixture exclude each other: the experts of a mixture serve all "
            "rates. Set projector.per_rate=false, or projector.mixture=null."
        )
    several = {stream: rates for stream, rates in rates_of(config).items() if len(rates) > 1}
    if stacked and several:
        found = ", ".join(f"{stream} at rates {rates}" for stream, rates in several.items())
        raise UserError(
            f"projector.compression=stack makes inputs as wide as the rate, but the experts of projector.mixture read "
            f"inputs of one width, and the tasks read {found}: set projector.compression=pool, or one rate a stream."
        )
    if not 2 <= mixture.top_k <= mixture.experts:
        raise UserError(
            f"projector.mixture.top_k={mixture.top_k}: must be from 2 to projector.mixture.experts={mixture.experts}; "
            "the gate of one expert alone is 1, which teaches a router nothing."
        )
    for key in ("balance_loss", "z_loss"):
        if getattr(mixture, key) < 0:
            raise UserError(f"projector.mixture.{key}={getattr(mixture, key)}: must be at least 0.")


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


def _check_llm_lora(config: RunConfig) -> None:
    lora = config.llm.lora
    if lora is None:
        return
    if (lora.rank is None) == (lora.reduction is None):
        raise UserError(
            f"llm.lora.rank={lora.rank} and llm.lora.reduction={lora.reduction}: set one of them, the rank itself or "
            "what the hidden size is divided by for it, and the other to null."
        )
    for key in ("rank", "reduction"):
        value = getattr(lora, key)
        if value is not None and value < 1:
            raise UserError(f"llm.lora.{key}={value}: must be at least 1.")
    if not 0 < lora.scale < math.inf:
        raise UserError(f"llm.lora.scale={lora.scale}: must be above 0; the terms are multiplied by it.")
    if not lora.terms or len(set(lora.terms)) != len(lora.terms):
        raise UserError(f"llm.lora.terms={lora.terms}: name one or more of shared, task, rates, none of them twice.")
