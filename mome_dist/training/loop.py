"""The training loop: steps, validation, metrics, checkpoints, and how far it has come."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from rich.console import Console

from mome_dist import nvidia_apex
from mome_dist.checkpoint.format import CONFIG, newest_checkpoint
from mome_dist.config import RunConfig, save_config
from mome_dist.config.derived import lora_of, schedule_of, views_of
from mome_dist.engine.optimizer import learning_rate
from mome_dist.errors import PreemptedError, UserError
from mome_dist.exit_codes import FAILED_AT
from mome_dist.model.distributed import DistributedMoME
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.whereabouts import report, wait_for_all
from mome_dist.progress import progress
from mome_dist.training.balance import forget_router_loads, update_routers
from mome_dist.training.conflict import conflicts_of_step
from mome_dist.training.faults import StepWatch
from mome_dist.training.ledger import Ledger
from mome_dist.training.metrics import Metrics, gather_routing
from mome_dist.training.precision import settle_precision
from mome_dist.training.run_directory import owned_run
from mome_dist.training.setup import Trainer, prepare, rank_console
from mome_dist.training.step import StepLosses, forward_backward
from mome_dist.training.step_progress import SHOWN_STEPS, over
from mome_dist.training_log import Ends

ROUTING_EVERY = 10  # steps between lines of routing.jsonl


def train(config: RunConfig, layout: Layout) -> list[float]:
    """Train on this rank until ``training.steps`` (or ``training.epochs``); every rank of the layout calls it.

    Returns:
        The loss of each step done in this call, the same on all ranks.

    Raises:
        UserError: for missing or mismatched files, a loss that stays not finite, or a run in the same directory.
        PreemptedError: if a signal asked the run to stop; its state is saved.
    """
    with parallel_world(layout, config.seed, config.parallel.timeout_seconds) as at, owned_run(config) as ownership:
        console = rank_console()
        console.print(f"[bold]{config.name}[/]: {layout.describe()}", highlight=False)
        config = settle_precision(config, console)
        trainer = prepare(config, layout, at, ownership, console)
        config = trainer.config
        if dist.get_rank() == 0:
            save_config(config, Path(config.output_dir) / CONFIG)
        _describe(trainer, console)
        metrics = Metrics(config, trainer.start)
        ledger = Ledger(trainer.model, trainer.engine, _watched_steps(config), trainer.encoders)
        wait_for_all("getting ready")
        try:
            with StepWatch(current_device()) as watch:
                losses = _run(config, layout, trainer, metrics, ledger, watch, console)
        finally:
            metrics.close()
            for online in (trainer.online, trainer.validation_online):
                if online is not None:
                    online.close()
        checkpoint = newest_checkpoint(config.output_dir)
        if checkpoint is not None:
            console.print(ledger.finish(checkpoint), highlight=False)
        for chunk in trainer.model.parts():
            if chunk.llm.graphed is not None:
                console.print(chunk.llm.graphed.describe(), highlight=False)
        without = f"; without {trainer.left_out} damaged utterances" if trainer.left_out else ""
        console.print(
            f"done: {config.training.steps} steps{_told_losses(losses)}, checkpoints in "
            f"{config.output_dir}/checkpoints{without}"
        )
        return losses


def _told_losses(losses: Sequence[float]) -> str:
    """How the losses of a call's steps ended, for a line about them; nothing of none."""
    if not losses:
        return ""
    ends = Ends.of(losses)
    return f", loss {ends.last:.3f} (mean of the last {ends.window})"


def _describe(trainer: Trainer, console: Console) -> None:
    trainable = sum(parameter.numel() for parameter in trainer.engine.parameters())
    frozen = sum(p.numel() for chunk in trainer.model.parts() for p in chunk.llm.parameters() if not p.requires_grad)
    console.print(nvidia_apex.describe(current_device()), highlight=False)
    console.print(f"rank 0 trains {trainable:,} parameters beside {frozen:,} frozen ones", highlight=False)
    if trainer.start:
        console.print(f"resumed after step {trainer.start}", highlight=False)
    if FAILED_AT in os.environ:
        seconds = time.time() - float(os.environ[FAILED_AT])
        console.print(f"ready to train again {seconds:.1f} s after the failure", highlight=False)


def _watched_steps(config: RunConfig) -> int:
    """Steps until every view was trained on, and two more: the gradient of what lies before the zero-initialised expert
    weights appears once these have moved. Likewise of one factor of a LoRA, beside the other that starts at zero, but
    only a step that reads the encoder's stream, or has a view that uses the LLM's term, moves that: so every view
    twice."""
    adapted = config.llm.lora is not None or lora_of(config)
    return schedule_of(config).steps_of_decks(2 if adapted else 1) + 2


def _run(
    config: RunConfig,
    layout: Layout,
    trainer: Trainer,
    metrics: Metrics,
    ledger: Ledger,
    watch: StepWatch,
    console: Console,
) -> list[float]:
    settings, schedule, losses, skipped = config.training, schedule_of(config), [], 0
    pace: deque[float] = deque(maxlen=SHOWN_STEPS)
    trainer.model.train()
    with progress(
        console, "training", settings.steps, start=trainer.start, unit="steps", every=settings.log_seconds
    ) as shown:
        for number in range(trainer.start, settings.steps):
            began = time.monotonic()
            report("reading the batch", number)
            batch = trainer.order.batch(number)
            step_views = schedule.of_step(number)
            waited = 0.0
            if trainer.online is not None:
                report("encoding the clips", number)
                waited = trainer.online.load(number)
            building = time.monotonic()
            step = trainer.batches["train"].build(batch, step_views, number)
            waited += time.monotonic() - building
            if config.mome.experts and config.mome.conflict_every and (number + 1) % config.mome.conflict_every == 0:
                report("comparing gradients", number, patient=True)
                metrics.conflicts(
                    number + 1,
                    conflicts_of_step(trainer.model, trainer.engine, trainer.batches["train"], batch, step_views),
                )
            if trainer.online is not None:
                trainer.online.load_ahead(number + 1)
            report("forward and backward", number)
            with trainer.engine.accumulate():
                result = forward_backward(trainer.model, step)
                if trainer.online is not None:
                    trainer.online.backward()
                finite = math.isfinite(result.loss) and trainer.engine.gradients_finite()
                report("reducing gradients", number)
            found = watch.agree(finite, waited)
            rate = learning_rate(config.optimizer, number, settings.steps)
            done = number + 1
            if found.finite:
                skipped = 0
                report("optimiser step", number)
                trainer.engine.step(rate)
                ledger.after_step(step)
                update_routers(trainer.model)
                losses.append(result.loss)
                seconds = time.monotonic() - began
                tokens = step.tokens * layout.dp
                pace.append(tokens / seconds)
                names = {"utterances": trainer.batches["train"].ids(batch)} if settings.log_utterances else {}
                shares = _projector_shares(trainer.model) if done % ROUTING_EVERY == 0 else {}
                metrics.step(
                    {
                        "step": done,
                        "loss": result.loss,
                        "learning_rate": rate,
                        "gradient_norm": trainer.engine.gradient_norm,
                        "tokens_per_second": tokens / seconds,
                        "seconds": seconds,
                        "data_wait_seconds": found.data_wait,
                        "views": {str(view): loss for view, loss in result.by_view.items()},
                        **({} if result.sink_loss is None else {"sink_loss": result.sink_loss}),
                        **result.divergences,
                        **shares,
                        **names,
                    }
                )
                shown.update(
                    done,
                    f"loss {fmean(losses[-SHOWN_STEPS:]):.3f}{over(len(losses))}",
                    f"{sum(pace) / len(pace):,.0f} tokens/s",
                    f"{found.data_wait:.2f} s waited for data",
                )
            else:
                skipped += 1
                trainer.engine.discard()
                forget_router_loads(trainer.model)
                ids = trainer.batches["train"].ids(batch)
                metrics.skipped(done, ids)
                _report_skip(result, number, ids, skipped, settings.max_skipped_steps, console)
            last = done == settings.steps
            # Not after a skipped step: if more follow and the run stops, what is wrong can be mended and trained on.
            due = found.finite and settings.save_every > 0 and done % settings.save_every == 0
            saving = last or found.stop or due
            if config.mome.experts and (done % ROUTING_EVERY == 0 or saving):
                metrics.routing(done, gather_routing(trainer.model, config), by_view=saving)
            if settings.validate_every and (done % settings.validate_every == 0 or last):
                metrics.step({"step": done, "validation": _validate(config, trainer, number)})
            if saving:
                report("saving", number, patient=True)
                trainer.saver.save(done, trainer.model, trainer.engine)
            if found.stop and not last:
                trainer.saver.finish()
                raise PreemptedError(
                    f"asked to stop: saved after step {done} of {settings.steps}; start again to continue"
                )
    trainer.saver.finish()
    return losses


def _projector_shares(model: DistributedMoME) -> dict[str, dict[str, float]]:
    """What the experts of the projectors had of their routers' routes since the last call, for a line of metrics; on
    ranks that have the projectors, as rank 0 has."""
    balance = model.parts()[0].projector_balance
    return {} if balance is None else {"projector_experts": balance.take_shares()}


def _validate(config: RunConfig, trainer: Trainer, step: int) -> dict[str, float]:
    """Mean token cross-entropy of each view over the validation split, nothing dropped."""
    totals: dict[str, float] = {}
    tokens = 0
    trainer.model.eval()
    for number, batch in enumerate(trainer.validation):
        report("validating", step)  # each batch: together they may take longer than one place is allowed to
        if trainer.validation_online is not None:
            trainer.validation_online.load(number)
        built = trainer.batches["validation"].build(batch, views_of(config))
        with torch.no_grad():
            result = forward_backward(trainer.model, built, forward_only=True)
        tokens += built.label_tokens
        for view, loss in result.by_view.items():
            totals[str(view)] = totals.get(str(view), 0.0) + loss * built.label_tokens
    trainer.model.train()
    return {view: total / tokens for view, total in totals.items()}


def _report_skip(
    result: StepLosses, number: int, ids: Sequence[str], skipped: int, limit: int, console: Console
) -> None:
    """Say which step was skipped and what was in it; stop the run when that keeps happening."""
    by_view = ", ".join(f"{view} {loss}" for view, loss in result.by_view.items())
    what = f"step {number + 1} was skipped: loss or gradient not finite ({by_view}); utterances {', '.join(ids)}"
    if skipped > limit:
        raise UserError(
            f"{what}. That was {skipped} in a row (training.max_skipped_steps={limit}): lower optimizer.learning_rate, "
            "or look at these utterances; the newest checkpoint is whole."
        )
    console.print(f"[bold yellow]{what}[/]", highlight=False)
