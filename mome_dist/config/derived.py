"""What follows from a configuration alone: its layout, views, streams and trained encoders."""

from __future__ import annotations

from mome_dist.config.schema import LoRAConfig, RunConfig
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.speech.views import View, all_views, streams_read


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


def refuse_lora(config: RunConfig, reason: str) -> None:
    """Raise UserError if an encoder trains; for what cannot take that into account."""
    for stream in lora_of(config):
        raise UserError(f"{stream}_encoder.lora is set, but {reason}: set {stream}_encoder.lora=null.")
