"""What needs two views in a step: terms in which one teaches the other, and the comparison of their gradients."""

from __future__ import annotations

from mome_dist.config.derived import schedule_of, views_of
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.speech.views import coarser_streams


def check_views_of_steps(config: RunConfig) -> None:
    """Refuse terms between views that never meet, or between routers that there are none of.

    Raises:
        UserError: naming the key.
    """
    terms, every, schedule = config.task.cross_rate, config.mome.conflict_every, schedule_of(config)
    if every and config.mome.experts and schedule.per_step == 1 and all(len(set(hand)) < 2 for hand in schedule.hands):
        raise UserError(
            f"mome.conflict_every={every} compares the views of a step, but every step has one: set it to 0, raise "
            "task.views_per_step, or give a task more rates."
        )
    if terms.route_kl and not config.mome.experts:
        raise UserError(
            f"task.cross_rate.route_kl={terms.route_kl} compares routers, but the run has no routed experts: set it to "
            "0, or choose another mome."
        )
    if not terms.active:
        return
    hands = [views_of(config)] if schedule.per_step > 1 else schedule.hands  # any two of several hands may meet
    if not any(coarser_streams(fine, coarse) for views in hands for fine in views for coarse in views):
        raise UserError(
            f"task.cross_rate={{route_kl: {terms.route_kl}, logit_kl: {terms.logit_kl}}} lets fine views of a step "
            "teach coarse ones of their task, but no step has two such views: give a task two rates, with "
            "task.sampling=views and task.views_per_step of null or at least 2, or set both to 0."
        )
