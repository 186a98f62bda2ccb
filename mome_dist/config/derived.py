"""What follows from a configuration alone: its layout, views, streams, projectors, trained encoders, low-rank terms,
router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config.schema import LoRAConfig, RunConfig
from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.moe.routers.spec import RouterSettings, RouterSpec
from mome_dist.moe.widths import Widths, series
from mome_dist.parallel.layout import Layout
from mome_dist.speech.views import View, ViewSchedule, all_views, streams_read


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


def schedule_of(config: RunConfig) -> ViewSchedule:
    """Which of them each step trains on."""
    if config.task.sampling == "rates":
        return ViewSchedule.of_rates(views_of(config), config.seed)
    return ViewSchedule.of_views(views_of(config), config.task.views_per_step, config.seed)


def streams_of(config: RunConfig) -> list[str]:
    """The streams that the views of a run use: "audio", "video" or both."""
    return streams_read(views_of(config))


def rates_of(config: RunConfig) -> dict[str, list[int]]:
    """The rates at which the views of a run read each stream, the smallest first; none of a stream that none reads."""
    views = views_of(config)
    return {
        "audio": sorted({view.audio_rate for view in views if view.audio_rate is not None}),
        "video": sorted({view.video_rate for view in views if view.video_rate is not None}),
    }


def projector_inputs(config: RunConfig, widths: Mapping[str, int]) -> dict[str, list[int]]:
    """The widths of the compressed features that each projector, or pool of a mixture, of a stream reads.

    Args:
        widths: of the encoders' features, by stream.
    """
    projector, rates = config.projector, rates_of(config)
    stacked = {stream: [rate if projector.compression == "stack" else 1 for rate in rates[stream]] for stream in widths}
    return {
        stream: [width * count for count in (stacked[stream] if projector.per_rate else stacked[stream][:1])]
        for stream, width in widths.items()
    }


def streams_joined(config: RunConfig) -> bool:
    """Whether the streams of a run share a router of the projectors, so that their features must be equally wide."""
    mixture = config.projector.mixture
    return mixture is not None and mixture.form != "dedr" and len(streams_of(config)) > 1


def check_joined(config: RunConfig, widths: Mapping[str, int]) -> None:
    """Check that streams which share a router of the projectors have features of one width.

    Args:
        widths: of the encoders' features, by stream.

    Raises:
        UserError: naming both widths, and the fix.
    """
    mixture = config.projector.mixture
    if mixture is None or not streams_joined(config):
        return
    inputs = {stream: sizes[0] for stream, sizes in projector_inputs(config, widths).items()}
    if len(set(inputs.values())) > 1:
        found = ", ".join(f"{width} of {stream}" for stream, width in inputs.items())
        raise UserError(
            f"projector.mixture.form={mixture.form} has one router for all streams, but their widths differ ({found}): "
            "set projector.mixture.form=dedr, or choose encoders of one width."
        )


def frozen_sections(config: RunConfig) -> list[str]:
    """The sections of the frozen models that a run uses."""
    return ["llm", *encoder_sections(config)]


def encoder_sections(config: RunConfig) -> list[str]:
    """The sections of the encoders that a run uses."""
    return [f"{stream}_encoder" for stream in streams_of(config)]


def least_parts(config: RunConfig, layout: Layout) -> int:
    """The fewest microbatches that a step has: as configured, or, where they follow from their tokens, one; only the
    interleaved schedule wants one for each pipeline stage.

    The balance loss is that of each microbatch, so more of them than memory asks for would train another run.
    """
    return layout.pp if config.data.accumulation == "auto" and layout.virtual > 1 else config.data.fixed_accumulation


def lora_of(config: RunConfig) -> dict[str, LoRAConfig]:
    """The low-rank terms of a run's encoders by stream; none of an encoder that stays as it is."""
    terms = {"audio": config.audio_encoder.lora, "video": config.video_encoder.lora}
    return {stream: lora for stream, lora in terms.items() if lora is not None}


def llm_terms_of(config: RunConfig, hidden_size: int) -> LowRankTerms | None:
    """The low-rank terms of a run's LLM; None where it has none."""
    lora = config.llm.lora
    if lora is None:
        return None
    rank = lora.rank_of(hidden_size)
    return LowRankTerms(rank, lora.scale, lora.start, tuple(lora.terms), tuple(views_of(config)))


def check_llm_terms(config: RunConfig, layout: Layout, shape: LLMShape) -> None:
    """Check that the LLM's low-rank terms suit its sizes and a layout.

    Raises:
        UserError: naming the key.
    """
    lora = config.llm.lora
    if lora is None:
        return
    if lora.rank_of(shape.hidden_size) < 1:
        raise UserError(
            f"llm.lora.reduction={lora.reduction} leaves no rank of a hidden size of {shape.hidden_size}: lower it."
        )
    if shape.kv_heads % layout.tp:
        raise UserError(
            f"llm.lora adds to heads that are the LLM's own, but llm.pad_heads=true adds others, because parallel.tp="
            f"{layout.tp} does not divide its {shape.kv_heads} key-value groups: choose another tp, or set "
            "llm.lora=null."
        )


def refuse_lora(config: RunConfig, reason: str) -> None:
    """Raise UserError if an encoder trains; for what cannot take that into account."""
    for stream in lora_of(config):
        raise UserError(f"{stream}_encoder.lora is set, but {reason}: set {stream}_encoder.lora=null.")


def reads_previous(config: RunConfig) -> bool:
    """Whether experts beside a layer read what those of the layer before were meant to read."""
    return config.mome.placed and config.mome.reads == "previous"


def check_reads(config: RunConfig, layout: Layout) -> None:
    """Check that the layer before is on the same rank, and there when a layer is computed.

    Raises:
        UserError: naming the keys.
    """
    if not reads_previous(config):
        return
    if layout.pp > 1:
        raise UserError(
            f"mome.reads=previous does not go with parallel.pp={layout.pp}: the first layer of a stage does not have "
            "what the last one of another stage read. Set parallel.pp=1, or mome.reads=own."
        )
    if layout.recompute == "full":
        raise UserError(
            "mome.reads=previous does not go with parallel.recompute=full: a layer that is computed again does not "
            "have what another one read. Set parallel.recompute=selective, or mome.reads=own."
        )


def widths_of(config: RunConfig) -> Widths | None:
    """Units of each expert of a run's MoME modules; None where all have as many, ``mome.bottleneck``."""
    mome = config.mome
    if not mome.experts or (mome.widths is None and mome.width_rule == "equal"):
        return None
    routed = series(mome.width_rule, mome.routed_experts, mome.bottleneck) if mome.widths is None else mome.widths
    return Widths(tuple(routed), mome.bottleneck, mome.balance_by_width)


def expert_in_words(config: RunConfig) -> str:
    """The experts' form and width, for reports."""
    widths = widths_of(config)
    return f"{config.mome.expert} {config.mome.bottleneck if widths is None else widths}"


def router_of(config: RunConfig) -> RouterSpec:
    """The router of a run's MoME modules.

    Raises:
        UserError: for an unknown kind, or a key or value that its settings do not have.
    """
    own = dict(config.mome.router)
    name = own.pop("name", None)
    if name not in ROUTERS:
        raise UserError(f"mome.router.name={name!r}: choose from {', '.join(ROUTERS)}.")
    kind = ROUTERS[name].settings
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), own))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ", ".join(own)
        reason = str(error).partition("\n")[0]
        raise UserError(f"mome.router.{key} of the router {name!r}: {reason}; see configs/mome/router.") from error
    mome = config.mome
    views = tuple(views_of(config))
    return RouterSpec(name, cast(RouterSettings, settings), mome.score, mome.renormalize, mome.bias_rate, views)
