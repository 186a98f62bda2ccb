"""Checks of a whole configuration before any process group, model or GPU hour: values, layout, files.

No torch here: a launcher runs this before it starts anything, in a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from mome_dist.config.deepspeed.file import deepspeed_of
from mome_dist.config.derived import (
    check_joined,
    check_llm_terms,
    check_reads,
    encoder_sections,
    layout_of,
    least_parts,
    lora_of,
    router_of,
    streams_joined,
    streams_of,
)
from mome_dist.config.load import load_training
from mome_dist.config.models import is_rank, settle_arguments, settle_evaluation, settle_models
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import check_learning, check_texts, check_values
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.noise import open_noise
from mome_dist.data.order import Order, check_shares, order_of
from mome_dist.errors import UserError
from mome_dist.llm.directory import check_directory
from mome_dist.llm.division import check_division
from mome_dist.llm.tokens import TokenTable
from mome_dist.moe.forms.registry import find_form
from mome_dist.origins import origin_of
from mome_dist.parallel.layout import Layout
from mome_dist.paths import has_home
from mome_dist.planning.encoder_shapes import encoder_shape
from mome_dist.planning.job import dispatches
from mome_dist.speech.geometry import expected_geometry
from mome_dist.trained import EXPORT, find_trained


def validate_overrides(module: str, overrides: Sequence[str], world_size: int) -> list[str]:
    """What a launcher calls before it starts ``world_size`` processes of ``module``, whatever module that is.

    Args:
        overrides: all arguments of the module, options of its own among them.

    Returns:
        What to give to the processes: the same, with the commits of models of the hub, which are now in the cache.

    Raises:
        UserError: for anything that the processes would refuse.
    """
    if module == "mome_dist.evaluate":
        return settle_evaluation(overrides)
    if module != "mome_dist.train":
        return settle_arguments(module, overrides)
    config = load_training(overrides)
    pinned = settle_models(config)
    validate(config, world_size)
    return [*overrides, *pinned]


def check_experts(config: RunConfig, layout: Layout) -> None:
    """Check that routed experts, their router and a layout go together.

    Raises:
        UserError: naming the keys.
    """
    mome = config.mome
    if not mome.experts:
        return
    if mome.routed_experts == 1:
        raise UserError(
            "mome.routed_experts=1 leaves the router nothing to choose: set mome.routed_experts=0 and one more of "
            "mome.shared_experts, which every token uses without a router."
        )
    if mome.dispatch == "local" and layout.ep > 1:
        raise UserError(
            f"mome.dispatch=local keeps every expert on every rank, but parallel.ep={layout.ep} spreads them: set "
            "parallel.ep=1, or mome.dispatch=gather."
        )
    router, form = router_of(config), find_form(mome.expert)
    if router.settings.reads_experts and form.common:
        raise UserError(
            f"mome.router.name={router.name} reads the experts' own maps of the hidden states, but mome.expert="
            f"{mome.expert} has one map for all of them: choose another router, or mome.expert=bottleneck."
        )
    able = [name for name in form.dispatches if name in router.settings.dispatches]
    if not dispatches(layout, mome.experts, router, mome.expert) or mome.dispatch not in ("auto", *able):
        raise UserError(
            f"mome.expert={mome.expert} with mome.router.name={router.name} works with mome.dispatch="
            f"{' or '.join(able) or 'none of its values'} only, but it is {mome.dispatch} with "
            f"parallel.ep={layout.ep}: change one of them."
        )


def validate(config: RunConfig, world_size: int) -> Layout:
    """Check a configuration for a number of processes; return its layout.

    Raises:
        UserError: naming the first wrong key or file, and the fix.
    """
    check_values(config)
    check_texts(config)
    check_learning(config)
    layout = layout_of(config, world_size)
    shape, tokens, tags = check_directory(config.llm.path), TokenTable.read(config.llm.path), asdict(config.llm.tags)
    tokens.check_tags(tags)
    tokens.check_prompts(config.task.prompts, tags)
    check_experts(config, layout)
    check_reads(config, layout)
    if not config.projector.trainable and config.training.init_from is None:
        raise UserError(
            "projector.trainable=false would keep random projectors: name the run that trained them with "
            "training.init_from, or set projector.trainable=true."
        )
    learning = config.mome.placed or config.projector.trainable or config.llm.lora is not None
    if not learning and not lora_of(config):
        raise UserError(
            "mome.placement=none and projector.trainable=false leave nothing to train: set projector.trainable=true, "
            "choose another mome, or give the LLM or an encoder a LoRA (llm.lora, audio_encoder.lora, "
            "video_encoder.lora)."
        )
    if config.llm.sink_loss and shape.layers < 2:
        raise UserError(
            f"llm.sink_loss={config.llm.sink_loss} is of all layers but the last, and {config.llm.path} has one: set "
            "it to 0."
        )
    check_division(shape, layout, config.mome.experts, config.llm.pad_heads)
    check_llm_terms(config, layout, shape)
    _check_batches(config, layout)
    _check_start(config)
    check_wandb(config.training.wandb_project)
    deepspeed_of(config, layout.dp)
    check_encoders(config)
    if streams_joined(config):
        check_joined(config, {stream: encoder_shape(config, stream).width for stream in streams_of(config)})
    if config.data.validation_split == config.data.test_split:
        raise UserError(
            f"data.validation_split and data.test_split are both {config.data.test_split!r}: the best checkpoint would "
            "be chosen on the test split. Name another validation split."
        )
    corpus = Corpus.open(config.data.corpus)
    if "video" in streams_of(config):
        check_geometry(config.video_encoder.path, corpus)
    validation_batches(config, corpus.split(config.data.validation_split), layout)
    _, steps = settled_order(config, corpus.split(config.data.train_split), layout)
    if 0 < steps <= config.optimizer.warmup_steps and not is_rank():
        note = f"optimizer.warmup_steps={config.optimizer.warmup_steps} is no shorter than the run's {steps} steps"
        print(f"note: {note}: its learning rate does not reach optimizer.learning_rate.", file=sys.stderr, flush=True)
    _note_repeats(config, len(corpus.split(config.data.train_split)))
    for split in (config.data.train_split, config.data.validation_split):
        place = f"{corpus.directory}, split {split!r}, utterance"
        tokens.check_texts((f"{place} {utterance.id!r}", utterance.text) for utterance in corpus.split(split))
    if config.augmentation.noise.source is not None:
        open_noise(config.augmentation.noise.source, corpus, config.data.train_split)
    return layout


def _check_start(config: RunConfig) -> None:
    """Check that what a new run starts from is there, or its own newest checkpoint."""
    given = config.training.init_from
    if given is None or (Path(given) / "adapter_config.json").is_file():
        return
    try:
        found = find_trained(given)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from error
    if found.kind == EXPORT:
        raise UserError(
            f"training.init_from={given} is an export; a run starts from a run, a checkpoint, or an adapter of PEFT."
        )


def _note_repeats(config: RunConfig, utterances: int) -> None:
    """Tell of pools that are larger than the split (`mome_dist.data.order.BatchOrder`)."""
    batch, pool = config.data.batch_size, config.data.bucket_batches
    if batch is None or pool == 1 or batch * pool <= utterances or is_rank():
        return
    print(
        f"note: data.bucket_batches={pool} batches of {batch} are more than the {utterances} utterances of split "
        f"{config.data.train_split!r}: a batch may hold an utterance twice, which then counts double in that step; "
        f"data.bucket_batches={max(1, utterances // batch)} avoids most of it.",
        file=sys.stderr,
        flush=True,
    )


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
    check_shares(order, steps, least_parts(config, layout), layout.dp)
    return order, steps


def validation_batches(config: RunConfig, utterances: Sequence[Utterance], layout: Layout) -> list[list[int]]:
    """The global batches of a validation, indices of utterances; none if there is no validation.

    Batches hold clips of similar length, as many of each batch as of the others, and about as much as in training.

    Raises:
        UserError: if there are too few utterances for every rank to have one.
    """
    data, unit = config.data, least_parts(config, layout) * layout.dp
    if config.training.validate_every == 0:
        return []
    lengths = [utterance.length for utterance in utterances[: data.validation_utterances]]
    if len(lengths) < unit:
        raise UserError(
            f"validation uses {len(lengths)} utterances of split {data.validation_split!r}, but "
            f"{unit} are needed, one for each of {layout.dp} data-parallel ranks in every microbatch "
            f"(data.accumulation={data.accumulation}): raise data.validation_utterances, lower data.accumulation, or "
            "set training.validate_every=0."
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


def _check_batches(config: RunConfig, layout: Layout) -> None:
    unit = config.data.fixed_accumulation * layout.dp
    if config.data.batch_size is not None and config.data.batch_size % unit:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not a multiple of {unit}: {layout.dp} data-parallel ranks, "
            f"data.accumulation={config.data.accumulation}."
        )
    microbatches = least_parts(config, layout)
    if layout.virtual > 1 and microbatches % layout.pp:
        raise UserError(
            f"parallel.virtual={layout.virtual}: the interleaved schedule needs a multiple of parallel.pp={layout.pp} "
            f"microbatches a step, but data.accumulation={microbatches}: choose a multiple, or auto."
        )


def check_encoders(config: RunConfig) -> None:
    """Check that the encoders of the streams in use are there.

    Raises:
        UserError: naming the key, and the command that makes one.
    """
    for section in encoder_sections(config):
        path = Path(getattr(config, section).path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"{section}.path={str(path)!r} holds no encoder (no config.json): {origin_of(section, path)}."
            )


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
        f"{expected!r}: prepare it again with --geometry {expected} (mome-dist prepare), or choose another encoder."
    )


def check_wandb(project: str | None) -> None:
    """Refuse to log to Weights & Biases where wandb could not start.

    Raises:
        UserError: wandb is not installed, or this user has no home directory.
    """
    if project is None:
        return
    if find_spec("wandb") is None:
        raise UserError(
            f"training.wandb_project={project!r}: wandb is not installed here: run `pip install "
            "'mome_dist[wandb]'`, or set training.wandb_project=null."
        )
    if not has_home():
        raise UserError(
            f"training.wandb_project={project!r}: wandb reads settings from the home directory, but HOME is not "
            f"set and user {os.getuid()} has none: set HOME, or training.wandb_project=null."
        )
