"""The coupling: Megatron-Core's schedule computes gradients, a DeepSpeed engine reduces them and steps.

The engine is given the trainable modules only. Gradients are accumulated on the bare model by the pipeline schedule;
the engine then averages shared parameters over data-parallel ranks and experts over the ranks that hold the same
experts, clips by the global norm, and steps the (ZeRO-partitioned) optimiser. Trainable parameters are fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state
from torch import Tensor, nn

from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.deepspeed_names import largest_group
from mome_dist.engine.moments import Moments, PartitionedMoments, ReplicatedMoments
from mome_dist.engine.optimizer import deepspeed_settings, make_optimizer, moment_names, zero_stage
from mome_dist.errors import UserError
from mome_dist.parallel.mpu import MegatronMPU
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing
from mome_dist.transfer import sent_to


class Trainable(Protocol):
    """What an engine trains: `mome_dist.model.distributed.DistributedMoME`."""

    def trainable_modules(self) -> nn.ModuleDict:
        """The modules that train on this rank, and nothing else."""

    def trained_parts(self) -> Iterator[NamedPart]:
        """Their tensors, with how ranks share them."""


def _parameter_groups(modules: nn.Module) -> list[dict[str, Any]]:
    """One group of shared parameters and, where there are any, one of experts.

    ZeRO sums the gradient norm over pipeline stages group by group, so every stage must have the same groups.
    """
    parameters = list(modules.parameters())
    return split_params_into_different_moe_groups_for_optimizer(
        {"name": "shared", "params": parameters},
        largest_group(parameter.numel() for parameter in parameters if is_moe_param(parameter)),
    )


def check_settings(settings: Mapping[str, Any], config: OptimizerConfig) -> None:
    """Have DeepSpeed's own class check a configuration, before a model is built; on all ranks alike.

    Raises:
        UserError: with what DeepSpeed says.
    """
    try:
        DeepSpeedConfig(deepspeed_settings(settings, config))
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed does not take {dict(settings)}: {' '.join(str(error).split())}") from error


class Engine:
    """Gradient reduction, clipping and optimiser step for one rank.

    Args:
        model: of this rank; its weights are read now, so fill them before.
        config: optimiser settings.
        settings: a DeepSpeed configuration as `mome_dist.config.deepspeed.file` lets through; batch sizes and clipping
            are filled in here.
        sequence_parallel: whether a tensor-parallel rank sees a part of each sequence in the layers.

    Attributes:
        moments: the optimiser's running averages, whatever ZeRO makes of them.
        steps: that the optimiser has done; steps of the schedule that were skipped do not count.
        gradient_norm: of the latest step, before clipping.
    """

    def __init__(
        self,
        model: Trainable,
        config: OptimizerConfig,
        settings: Mapping[str, Any],
        sequence_parallel: bool = False,
    ) -> None:
        modules = model.trainable_modules()
        self._modules, self._config, self._sequence_parallel = modules, config, sequence_parallel
        self._sharing: dict[Tensor, Sharing] = {part.parameter: part.sharing for part in model.trained_parts()}
        for parameter, sharing in self._sharing.items():
            # ZeRO's norm counts such a parameter on every tensor-parallel rank, and others on the first one only.
            setattr(parameter, "tensor_model_parallel", sharing.sliced is not None)  # noqa: B010
        groups = _parameter_groups(modules)
        self.zero_stage = zero_stage(settings)
        self.deepspeed, *_ = deepspeed.initialize(
            model=modules,
            optimizer=make_optimizer(groups, config),
            config=deepspeed_settings(settings, config),
            mpu=MegatronMPU(),
        )
        optimizer = self.deepspeed.optimizer
        self.moments: Moments = PartitionedMoments(optimizer) if self.zero_stage else ReplicatedMoments(optimizer)
        self.gradient_norm = 0.0
        self.steps = 0

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimiser group, as the model knows them."""
        if self.zero_stage:
            return [list(group) for group in self.deepspeed.optimizer.bit16_groups]
        return [list(group["params"]) for group in self.deepspeed.optimizer.param_groups]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of this rank."""
        return self._modules.parameters()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add up local gradients; leaving the block reduces them over ranks."""
        with self._reduction():
            try:
                yield
                self._sum_over_sequence()
            except BaseException:
                self._abandon()
                raise

    @contextmanager
    def _reduction(self) -> Iterator[None]:
        """Reduce the gradients that are there at the end of the block."""
        if self.zero_stage:
            with self.deepspeed.coalesce_grad_reduction():
                yield
        else:
            yield
            self.deepspeed.allreduce_gradients()

    def _abandon(self) -> None:
        """Forget the gradients of a step that failed: the engine neither reduces them nor steps from here on.

        DeepSpeed's context reduces whatever it finds even after an error, in collectives that the other ranks do not
        come to: this rank would wait in them instead of saying what went wrong.
        """
        self.deepspeed._flush_coalesced_reduction_zero12 = lambda optimizer: None
        self.discard()

    def _sum_over_sequence(self) -> None:
        """Under sequence parallelism, add up the gradients that are those of a rank's own tokens."""
        if not self._sequence_parallel:
            return
        partial = (parameter for parameter, sharing in self._sharing.items() if sharing.partial)
        gradients = [parameter.grad for parameter in partial if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def gradients_finite(self) -> bool:
        """Whether this rank's own gradients are finite; inside `accumulate`, before they are reduced."""
        gradients = [parameter.grad for parameter in self._modules.parameters() if parameter.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()) if gradients else True

    def discard(self) -> None:
        """Forget the gradients instead of stepping."""
        optimizer = self.deepspeed.optimizer
        optimizer.zero_grad()
        if self.zero_stage:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None

    def step(self, rate: float) -> None:
        """Clip by the global norm, step at this learning rate, and clear the gradients."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        if not self.zero_stage:
            self.gradient_norm = self._clip()
        self.deepspeed.step()
        self.steps += 1
        if self.zero_stage:
            norm = self.deepspeed.get_global_grad_norm()
            self.gradient_norm = 0.0 if norm is None else float(norm)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's reduced gradient, whole, between `accumulate` and `step` (a collective under ZeRO)."""
        if self.zero_stage:
            return safe_get_full_grad(parameter)
        assert parameter.grad is not None
        return parameter.grad

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Names of the optimiser's running averages; SGD without momentum has none."""
        return moment_names(self._config)

    def reached_by_gradient(self, parts: Sequence[NamedPart]) -> list[bool]:
        """Which parts of this rank's parameters have a running average of gradients that is not all zero (collective).

        An optimiser without averages keeps no trace of gradients: then all count as reached.
        """
        if not self.moment_names or not parts:
            return [True] * len(parts)
        average = self.moment_names[0]
        averages = [self.moments.held(part.parameter, part.start, part.stop, average) for part in parts]
        reached = torch.stack([held.any() for held in averages]).int()
        # Under ZeRO each rank holds a part of every average.
        for of_experts in (False, True):
            chosen = [number for number, part in enumerate(parts) if (part.sharing.experts is not None) == of_experts]
            if chosen:
                reached_here = reached[chosen]
                dist.all_reduce(reached_here, op=dist.ReduceOp.MAX, group=parts[chosen[0]].copies)
                reached[chosen] = reached_here
        return [bool(flag) for flag in reached.tolist()]

    def resume(self, steps: int) -> None:
        """Continue as after ``steps`` steps, with moments of zero, to be filled (`moments`)."""
        self.steps = steps
        self.moments.begin(self.moment_names, steps)

    def _clip(self) -> float:
        """Scale local gradients so that the norm over all distinct parameters of the model is at most the limit."""
        held = [(p, p.grad) for p in self._modules.parameters() if p.grad is not None]
        gradients = [gradient for _, gradient in held]
        device = next(self._modules.parameters()).device
        squares = torch.stack(torch._foreach_norm(gradients)).square() if held else torch.zeros(0, device=device)
        # Nothing is read by the host before the end. Experts, slices and the rest are apart: what ranks hold copies of
        # must sum up to the same bits on all of them, or copies would part.
        kinds = [(float(is_moe_param(parameter)), float(self._is_sliced(parameter))) for parameter, _ in held]
        rows = [[*each, 1 - sum(each)] for each in kinds]
        of_experts, of_slices, total = (squares @ sent_to(torch.tensor(rows).view(len(rows), 3), device)).split(1)
        # The ranks of a group hold tensors of the same kinds, so that either all of them sum or none.
        if (group := _expert_group(self._modules)) is not None:
            dist.all_reduce(of_experts, group=group)
        if any(map(self._is_sliced, self._modules.parameters())):
            dist.all_reduce(of_slices, group=parallel_state.get_tensor_model_parallel_group())
        total = (total + of_experts + of_slices).squeeze()
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        norm, limit = total.sqrt(), self._config.gradient_clipping
        if limit and gradients:
            torch._foreach_mul_(gradients, (limit / norm).clamp(max=1))
        return float(norm)

    def _is_sliced(self, parameter: Tensor) -> bool:
        sharing = self._sharing.get(parameter)  # the idle module has none
        return sharing is not None and sharing.sliced is not None


def _expert_group(modules: nn.Module) -> dist.ProcessGroup | None:
    """The expert-parallel ranks; None in a run without experts."""
    expert = next((parameter for parameter in modules.parameters() if is_moe_param(parameter)), None)
    if expert is None:
        return None
    return deepspeed_groups._get_expert_parallel_group(getattr(expert, "group_name"))  # noqa: B009
