"""What a rank needs before its first step: its stage of the model, features, batches, engine, and a resumed state."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.peft import is_peft, start_from_peft
from mome_dist.artefact import manifest_sha256
from mome_dist.checkpoint.format import find_checkpoint, fingerprint
from mome_dist.checkpoint.restore import (
    check_continues,
    check_frozen,
    check_llm_lora,
    check_lora,
    checkpoint_to_resume,
    restore_optimizer,
    restore_random_state,
    restore_weights,
    saved_config,
)
from mome_dist.checkpoint.save import CheckpointSaver
from mome_dist.config import RunConfig
from mome_dist.config.deepspeed.file import deepspeed_of
from mome_dist.config.derived import draws_of, llm_terms_of, lora_of, schedule_of, streams_of, views_of
from mome_dist.config.graphs import filled_tokens
from mome_dist.config.schema import AugmentationConfig
from mome_dist.cuda_graphs.kinds import graphs_of
from mome_dist.data.corpus import Corpus
from mome_dist.data.damage import check_damage, find_damage, forget_damage
from mome_dist.data.encoding import Encoder, load_encoder, split_features
from mome_dist.data.features import FeatureStore
from mome_dist.data.order import Order
from mome_dist.data.parts import Work
from mome_dist.data.prefetch import ClipLoader
from mome_dist.data.transforms import Augmentation, ModalityDropout
from mome_dist.engine.engine import Engine, check_settings
from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.slice_cache import SliceCache
from mome_dist.model.build import build_distributed
from mome_dist.model.distributed import DistributedMoME
from mome_dist.model.shared import build_sequences
from mome_dist.ownership import Ownership
from mome_dist.parallel.device import current_device
from mome_dist.parallel.layout import Coordinates, Layout
from mome_dist.parallel.whereabouts import report, wait_for_all
from mome_dist.paths import cache_root
from mome_dist.preflight import settled_order, validation_batches
from mome_dist.speech.lora import LoRATerms
from mome_dist.speech.views import ViewSchedule, streams_read
from mome_dist.training.adaptation import Adaptation
from mome_dist.training.batches import BatchBuilder, FeatureReader
from mome_dist.training.dispatch import settle_dispatch
from mome_dist.training.microbatches import settle_parts
from mome_dist.training.noise_log import NoiseLog
from mome_dist.training.online import OnlineEncoding, StepClips, StepFeatures

DESCRIBED_STEPS = 50  # at most, of those that an epoch and the tokens of a pass are judged by


@dataclass(frozen=True)
class Trainer:
    """Everything that the loop of one rank works with.

    Attributes:
        config: of the run, with ``training.steps`` settled.
        model, engine: this rank's.
        batches: builders for "train" and "validation".
        order: of the training split.
        validation: the global batches of a validation.
        saver: of checkpoints.
        start: steps already done.
        left_out: damaged utterances of both splits.
        online: encodes the clips of training steps; None where features are cached.
        validation_online: encodes the clips of a validation's batches for encoders that train; None if none does.
        encoders: that encode while the run trains, by stream; none on later pipeline stages.
    """

    config: RunConfig
    model: DistributedMoME
    engine: Engine
    batches: dict[str, BatchBuilder]
    order: Order
    validation: list[list[int]]
    saver: CheckpointSaver
    start: int
    left_out: int
    online: OnlineEncoding | None
    validation_online: OnlineEncoding | None
    encoders: dict[str, Encoder]


def prepare(
    config: RunConfig, layout: Layout, at: Coordinates, ownership: Ownership | None, console: Console
) -> Trainer:
    """Build a rank's part of a run and resume it from its newest checkpoint, if there is one.

    Args:
        ownership: of the run's directory, on rank 0.

    Raises:
        UserError: for missing or mismatched files.
    """
    deepspeed = deepspeed_of(config, layout.dp)
    check_settings(deepspeed.acts, config.optimizer)
    console.print(f"{deepspeed.describe()} ({config.deepspeed.file})", highlight=False)
    device = current_device()
    if filled_tokens(config):
        graphs_of(config.llm.graphs, device)  # refuses a device without them before anything is read
    report("reading the features", patient=True)
    corpus = Corpus.open(config.data.corpus)
    splits = {"train": config.data.train_split, "validation": config.data.validation_split}
    found = _features(config, corpus, device, console, keep_encoders=at.pp == 0)
    widths, damaged = found.widths, found.damaged
    utterances = {
        purpose: [utterance for utterance in corpus.split(split) if utterance.id not in damaged[purpose]]
        for purpose, split in splits.items()
    }
    sequences = build_sequences(config)
    order, steps = settled_order(config, utterances["train"], layout)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    shape = LLMShape.from_directory(config.llm.path)
    parts = settle_parts(config, layout, shape, widths, utterances["train"], device, console)
    batches = {
        purpose: BatchBuilder(
            utterances[purpose],
            sequences,
            found.readers[purpose] if at.pp == 0 else None,
            parts,
            at.dp,
            layout.dp,
            device,
            layout,
            shape.attention_share,
            dataclasses.asdict(config.task.weights),
            filled_tokens(config) if purpose == "train" else 0,
            config.task.cross_rate.active and purpose == "train",
            draws_of(config) and purpose == "train",
        )
        for purpose in splits
    }
    validation = validation_batches(config, utterances["validation"], layout)
    work = work_of_first_steps(order, batches["train"], schedule_of(config))
    console.print(work.describe(order.steps_of(1), layout.dp), highlight=False)
    dispatch = settle_dispatch(config, layout, shape, work.mean_tokens(layout.dp), device, console)
    report("building the model", patient=True)
    frozen = _fingerprints(config)
    slice_cache, lora = _slice_cache(config, frozen["llm"]), LoRATerms.of(found.encoders)
    model = build_distributed(config, layout, widths, dispatch, device, slice_cache, lora)
    wait_for_all("reading the LLM")
    order_facts = _order_facts(config, corpus, order, damaged["train"])
    checkpoint = _checkpoint_to_resume(config, console)
    start = 0
    if checkpoint is not None:
        check_continues(checkpoint, frozen, order_facts, config.optimizer.name)
        saved = saved_config(checkpoint)
        check_lora(checkpoint, saved, lora_of(config))
        check_llm_lora(checkpoint, saved, config.llm.lora)
        start = restore_weights(checkpoint, model)
    elif config.training.init_from is not None and is_peft(config.training.init_from):
        start_from_peft(config.training.init_from, llm_terms_of(config, shape.hidden_size), model.own_parts())
        console.print(f"the LLM's shared term starts from {config.training.init_from}", highlight=False)
    elif config.training.init_from is not None:
        source = find_checkpoint(config.training.init_from)
        saved = saved_config(source)
        begin = check_lora(source, saved, lora_of(config), init=True)
        # Projectors suit any encoder of their width, LoRA the one that it was trained on.
        adapted = [f"{stream}_encoder" for stream in lora_of(config) if stream not in begin]
        check_frozen(source, {name: frozen[name] for name in ("llm", *adapted)})
        new = [f"lora.{stream}." for stream in begin]
        new += [f"{PREFIX}."] if check_llm_lora(source, saved, config.llm.lora, init=True) else []
        restore_weights(source, model, new)
        console.print(f"starts from the weights of {source}", highlight=False)
    engine = Engine(model, config.optimizer, deepspeed.acts, layout.sequence_parallel)
    if checkpoint is not None:
        restore_optimizer(checkpoint, model, engine)
        restore_random_state(checkpoint, layout)
    online = validation_online = None
    if config.data.features == "online":
        online = _online(config, corpus, found.encoders, batches["train"], order, device, start)
    if lora_of(config):
        validation_online = _validation_online(config, corpus, found, batches["validation"], validation, device)
    saver = CheckpointSaver(config, layout, frozen, order_facts, order.utterances_before, ownership)
    left_out = sum(map(len, damaged.values()))
    return Trainer(
        config,
        model,
        engine,
        batches,
        order,
        validation,
        saver,
        start,
        left_out,
        online,
        validation_online,
        found.encoders,
    )


def work_of_first_steps(order: Order, builder: BatchBuilder, schedule: ViewSchedule) -> Work:
    """The work of the first steps of a run, each in the views that it draws; the same on all ranks.

    They are an epoch's, up to `DESCRIBED_STEPS`, and in a short epoch those in which every view comes.
    """
    steps = min(DESCRIBED_STEPS, max(order.steps_of(1), schedule.steps_of_decks(1)))
    return sum((builder.work(order.batch(step), schedule.of_step(step)) for step in range(steps)), Work())


def _of_first_rank(value: list[str]) -> list[str]:
    """What rank 0 gave, on every rank."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _checkpoint_to_resume(config: RunConfig, console: Console) -> Path | None:
    if not config.training.resume:
        return None
    return checkpoint_to_resume(
        Path(config.output_dir), lambda line: console.print(f"[bold red]{line}[/]", highlight=False)
    )


def _order_facts(config: RunConfig, corpus: Corpus, order: Order, damaged: Iterable[str]) -> dict[str, Any]:
    """What the order of utterances is a function of, by configuration key."""
    return {
        "data.corpus": manifest_sha256(corpus.directory),
        "data.train_split": config.data.train_split,
        "utterances": len(order.lengths),
        "utterances left out": sorted(damaged),
        "data.batch_size": config.data.batch_size,
        "data.max_frames": config.data.max_frames,
        "data.bucket_batches": config.data.bucket_batches,
        "seed": config.seed,
    }


@dataclass(frozen=True)
class _Features:
    """Where the features of a run come from.

    Attributes:
        readers: of the cached features, by purpose and stream.
        widths: of the features of each stream.
        damaged: what cannot be read, by purpose and id.
        encoders: by stream, where training encodes online; none on later pipeline stages.
    """

    readers: dict[str, dict[str, FeatureReader]]
    widths: dict[str, int]
    damaged: dict[str, dict[str, str]]
    encoders: dict[str, Encoder]


def _features(
    config: RunConfig, corpus: Corpus, device: torch.device, console: Console, keep_encoders: bool
) -> _Features:
    """Fill the cache of features, as far as the run reads them from there.

    The validation split comes from the cache in any case, since it is encoded clean, and again and again: but not
    through an encoder that trains.

    Raises:
        UserError: if more utterances of a split are damaged than it may have.
    """
    rank, world, online = dist.get_rank(), dist.get_world_size(), config.data.features == "online"
    streams = streams_of(config)
    together = functools.partial(wait_for_all, "encoding the corpus")
    # Of which streams the clips are encoded whenever they are needed.
    anew = {"train": streams if online else [], "validation": list(lora_of(config))}
    splits = {"train": config.data.train_split, "validation": config.data.validation_split}
    found = _Features({purpose: {} for purpose in splits}, {}, {purpose: {} for purpose in splits}, {})
    damaged = found.damaged
    stores: list[FeatureStore] = []
    for stream in streams:
        encoder = load_encoder(config, stream, device)
        found.widths[stream] = encoder.width
        if online and keep_encoders:
            found.encoders[stream] = encoder
        for purpose, split in splits.items():
            if stream in anew[purpose]:
                continue
            store = split_features(
                config, corpus, split, stream, encoder, rank, world, together, _of_first_rank, console
            )
            found.readers[purpose][stream] = store.get
            damaged[purpose] |= store.damaged
            stores.append(store)
    for purpose, split in splits.items():
        # Without leave a damaged clip ends the run when its turn comes, which needs no look at all of them beforehand.
        if anew[purpose] and config.data.max_damaged_utterances:
            damaged[purpose] |= find_damage(corpus, split, anew[purpose], rank, world, together, console)
    try:
        for purpose, split in splits.items():
            check_damage(split, damaged[purpose], config.data.max_damaged_utterances)
            if damaged[purpose]:
                console.print(
                    f"[bold yellow]{len(damaged[purpose])} damaged utterances of split {split!r} are left out:[/] "
                    f"{'; '.join(damaged[purpose].values())}",
                    highlight=False,
                )
    except UserError:
        together()  # every rank has read the records
        if rank == 0:
            for store in stores:
                forget_damage(store.directory)
        raise
    return found


def _online(
    config: RunConfig,
    corpus: Corpus,
    encoders: dict[str, Encoder],
    builder: BatchBuilder,
    order: Order,
    device: torch.device,
    start: int,
) -> OnlineEncoding:
    """Encoding inside the step, whose features ``builder`` then reads."""
    schedule = schedule_of(config)

    def plan(step: int) -> StepClips:
        step_views = schedule.of_step(step)
        epoch = order.utterances_before(step) // len(order.lengths)
        return StepClips(builder.own(order.batch(step), step_views), streams_read(step_views), epoch)

    dropout = config.augmentation.modality_dropout
    over = max(1.0, dropout.over * config.training.steps)
    first = dropout.audio, dropout.video
    held = StepFeatures(ModalityDropout(*first, config.seed, dropout.schedule, *dropout.ends, over))
    builder.leave_out(held.left_out)
    if encoders:
        builder.read_from({stream: held.reader(stream) for stream in encoders})
    augmentation = Augmentation.open(config.augmentation, corpus, config.data.train_split, config.seed)
    loader = ClipLoader(corpus, augmentation, config.data.decode_threads)
    group = parallel_state.get_tensor_model_parallel_group()
    adaptation = Adaptation(encoders, group, device) if lora_of(config) else None
    logged = augmentation.noise is not None and config.augmentation.noise.log
    noise_log = NoiseLog(Path(config.output_dir), start) if logged else None
    # A GPU encodes beside the passes of the step before, which takes encoders that no step changes.
    ahead = bool(encoders) and adaptation is None and device.type == "cuda"
    steps = config.training.steps
    return OnlineEncoding(held, loader, encoders, plan, steps, group, device, adaptation, noise_log, ahead)


def _validation_online(
    config: RunConfig,
    corpus: Corpus,
    found: _Features,
    builder: BatchBuilder,
    validation: list[list[int]],
    device: torch.device,
) -> OnlineEncoding:
    """Encoding of clean clips through the encoders that train, batch by batch of a validation; ``builder`` then reads
    their features, and those of other streams from the cache."""
    encoders = {stream: encoder for stream, encoder in found.encoders.items() if stream in lora_of(config)}

    def plan(number: int) -> StepClips:
        return StepClips(builder.own(validation[number], views_of(config)), list(encoders), 0)

    held = StepFeatures(ModalityDropout(0, 0, config.seed))
    if encoders:
        readers = {stream: held.reader(stream) for stream in encoders}
        builder.read_from({**found.readers["validation"], **readers})
    clean = Augmentation.open(AugmentationConfig(), corpus, config.data.train_split, config.seed)
    loader = ClipLoader(corpus, clean, config.data.decode_threads)
    group = parallel_state.get_tensor_model_parallel_group()
    return OnlineEncoding(held, loader, encoders, plan, len(validation), group, device)


def _fingerprints(config: RunConfig) -> dict[str, str]:
    """Identity of each frozen model, by the name of its configuration section."""
    names = ["llm", *(f"{stream}_encoder" for stream in streams_of(config))]
    hashed: list[dict[str, str] | None] = [None]
    if dist.get_rank() == 0:
        hashed = [{name: fingerprint(Path(getattr(config, name).path)) for name in names}]
    wait_for_all("hashing the frozen models")
    dist.broadcast_object_list(hashed, src=0)
    assert hashed[0] is not None
    return hashed[0]


def _slice_cache(config: RunConfig, source: str) -> SliceCache | None:
    if not config.llm.cache_slices:
        return None
    # Any rank may find its slices damaged, so any rank may say so.
    console = Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)
    return SliceCache(cache_root() / "sliced", source, console.print)


def rank_console() -> Console:
    """A console that only rank 0 writes to."""
    return Console(file=sys.stderr, quiet=dist.get_rank() != 0)
