"""One run of a probe, in one layout or in the reference form, and everything of it that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.model.distributed import DistributedMoME
from mome_dist.model.shared import build_reference
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.parts import by_parameter
from mome_dist.speech.lora import LoRATerms
from mome_dist.speech.reference import layout_free_tensors
from mome_dist.training.step import forward_backward
from mome_dist.verification.encoders import RankEncoders, encoded, trained_encoders
from mome_dist.verification.probe import Probe, wake, wake_reference

TIMEOUT_SECONDS = 60
# AdamW divides a gradient by its own size. With the usual epsilon of 1e-8, a gradient that is a small difference of
# large terms turns the rounding of those terms into a visible part of the learning rate. Clipped gradients have
# elements of at most about 0.05, known to about 1e-6 of that; divided by an epsilon of 1e-2, an update is known to 5e-6
# of the rate. The moments still show: their square root is a tenth of that epsilon.
EPSILON = 1e-2
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """A layout to verify.

    Attributes:
        name: for the table.
        layout: of the processes.
        zero: DeepSpeed ZeRO stage.
        dispatch: of tokens and experts.
        placement: of the MoME modules; None keeps the configuration's.
        precision: of the frozen LLM.
        train_projectors: False keeps the projectors as they are; None keeps the configuration's.
        deepspeed: a DeepSpeed configuration; the stage in it does not count.
    """

    name: str
    layout: Layout
    zero: int = 1
    dispatch: str = "alltoall"
    placement: str | None = None
    precision: str = "fp32"
    train_projectors: bool | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What DeepSpeed is told."""
        zero = {**self.deepspeed.get("zero_optimization", {}), "stage": self.zero}
        return {**self.deepspeed, "zero_optimization": zero}


@dataclass
class Outcome:
    """What one run did.

    Attributes:
        losses, norms: of each step; the norm is that of the gradient before clipping.
        sinks: the sink loss of each step, where it is part of the objective.
        gradients: of the first step, by layout-free name.
        weights: after the last step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    sinks: list[float] = field(default_factory=list)
    gradients: Arrays = field(default_factory=dict)
    weights: Arrays = field(default_factory=dict)


def configured(probe: Probe, case: Case) -> Probe:
    """The probe with what the case changes."""
    config = dataclasses.replace(probe.config)
    config.llm = dataclasses.replace(config.llm, precision=case.precision)
    if case.train_projectors is not None:
        config.projector = dataclasses.replace(config.projector, trainable=case.train_projectors)
    placement = case.placement or config.mome.placement
    # Nothing may be dropped: which tokens exceed a rank's capacity depends on the layout by definition.
    config.mome = dataclasses.replace(config.mome, placement=placement, capacity_factor=None)
    return dataclasses.replace(probe, config=config)


def optimizer_of(probe: Probe, name: str) -> OptimizerConfig:
    """Steps large enough to show an error; clipping on, so that the norm matters."""
    return dataclasses.replace(
        probe.config.optimizer,
        name=name,
        learning_rate=0.5 if name == "sgd" else 1e-2,
        gradient_clipping=0.5,
        epsilon=EPSILON,
    )


def run_case(probe: Probe, case: Case, optimizer: str, plant: Callable[[], None] | None) -> Outcome:
    """Train on this rank of the case's world; the outcome holds this rank's part.

    Args:
        plant: called once the world is open, to plant a fault.
    """
    probe = configured(probe, case)
    settings, outcome = optimizer_of(probe, optimizer), Outcome()
    with parallel_world(case.layout, probe.config.seed, TIMEOUT_SECONDS) as at:
        if plant is not None:
            plant()
        probe = dataclasses.replace(probe, device=current_device())
        encoders = trained_encoders(probe.config, probe.widths) if at.pp == 0 else {}
        terms = LoRATerms.of({stream: encoder.to(probe.device) for stream, encoder in encoders.items()})
        model = build_distributed(
            probe.config, case.layout, probe.widths, case.dispatch, probe.device, lora=terms
        ).train()
        online = RankEncoders(encoders, probe.device)
        wake(model.trained_parts(), probe.config.seed, probe.config)
        engine = Engine(model, settings, case.settings, case.layout.sequence_parallel)
        for number in range(probe.steps):
            step = online.load(probe.step(number, at.dp, case.layout))
            with engine.accumulate():
                result = forward_backward(model, step)
                online.backward()
            outcome.losses.append(result.loss)
            outcome.sinks += [] if result.sink_loss is None else [result.sink_loss]
            if number == 0:
                outcome.gradients = _named(model, lambda p: engine.gradient(p))
            engine.step(settings.learning_rate)
            outcome.norms.append(engine.gradient_norm)
        outcome.weights = _named(model, lambda p: p.detach())
    return outcome


def run_reference(probe: Probe, case: Case, optimizer: str) -> Outcome:
    """The same training in one process with Hugging Face's model, autograd and torch's optimiser: no Megatron-Core, no
    DeepSpeed, no process group."""
    probe = configured(probe, case)
    settings, outcome = optimizer_of(probe, optimizer), Outcome()
    encoders = trained_encoders(probe.config, probe.widths)
    model = build_reference(probe.config, probe.widths, lora=LoRATerms.of(encoders)).train()
    wake_reference(model, probe.config.seed, probe.config)
    tensors = [tensor for tensor in layout_free_tensors(model) if tensor.parameter.requires_grad]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if optimizer == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(named.values(), lr=settings.learning_rate)
    else:
        betas = (settings.betas[0], settings.betas[1])
        stepper = torch.optim.AdamW(
            named.values(), settings.learning_rate, betas, settings.epsilon, settings.weight_decay
        )
    mome, sink_loss = probe.config.mome, probe.config.llm.sink_loss
    if sink_loss:
        model.keep_states()
    for number in range(probe.steps):
        step, total, sinks = encoded(probe.step(number, 0, Layout.for_world(1)), encoders), 0.0, 0.0
        for batch in step.microbatches:
            loss = model.loss(batch.tokens, batch.features, step.weights)
            loss = loss / (step.label_tokens * len(step.views))
            total += loss.item()
            auxiliary = model.auxiliary_loss(mome.balance_loss, mome.z_loss)
            auxiliary = auxiliary / len(step.microbatches)
            if sink_loss:
                sink = model.sink_loss() / (step.utterances * len(step.views))
                sinks += sink.item()
                auxiliary = auxiliary + sink_loss * sink
            (loss + auxiliary).backward()
        for parameter in named.values():  # what no view of the step reaches has a gradient of zero, as in DeepSpeed
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if number == 0:
            outcome.gradients = {each.name: _array(each.of(cast(Tensor, each.parameter.grad))) for each in tensors}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), settings.gradient_clipping)
        outcome.norms.append(norm.item())
        stepper.step()
        stepper.zero_grad()
        outcome.losses.append(total)
        outcome.sinks += [sinks] if sink_loss else []
    outcome.weights = {each.name: _array(each.of(each.parameter)) for each in tensors}
    return outcome


def merged(parts: list[Outcome]) -> Outcome:
    """The whole model's outcome from all ranks' parts.

    Raises:
        ValueError: naming a value of which ranks hold different copies.
    """
    whole = Outcome(parts[0].losses, parts[0].norms, parts[0].sinks)
    for part in parts:
        for what, mine, first in (
            ("loss", part.losses, whole.losses),
            ("gradient norm", part.norms, whole.norms),
            ("sink loss", part.sinks, whole.sinks),
        ):
            if not np.allclose(mine, first, rtol=1e-6, atol=0):
                raise ValueError(f"ranks disagree on the {what}: {mine} and {first}")
    whole.gradients = _merge([part.gradients for part in parts])
    whole.weights = _merge([part.weights for part in parts])
    return whole


def _merge(parts: list[Arrays]) -> Arrays:
    copies: Arrays = {}
    for part in parts:
        for name, value in part.items():
            first = copies.setdefault(name, value)
            # Copies are results of the same all-reduce, up to its order.
            if not np.allclose(first, value, rtol=1e-5, atol=1e-6 * float(np.abs(first).max())):
                raise ValueError(f"ranks hold different copies of {name}")
    # Slices of one tensor are named "tensor[3]".
    slices: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name in [name for name in copies if name.endswith("]")]:
        tensor, _, index = name[:-1].rpartition("[")
        slices.setdefault(tensor, {})[int(index)] = copies.pop(name)
    return copies | {tensor: np.stack([by[i] for i in sorted(by)]) for tensor, by in slices.items()}


def _named(model: DistributedMoME, value: Callable[[Any], torch.Tensor]) -> Arrays:
    found: Arrays = {}
    for parameter, parts in by_parameter(model.trained_parts()).items():
        values = value(parameter)  # a gradient may be a collective: once for all parts
        found |= {part.label: _array(part.gathered(values)) for part in parts}
    return found


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy().copy()
