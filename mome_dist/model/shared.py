"""Models from a configuration: the parts that every form of the model shares, and the one-process form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from mome_dist.config.derived import check_joined, llm_terms_of, rates_of, router_of, widths_of
from mome_dist.config.schema import RunConfig
from mome_dist.llm.hugging_face import DeviceMap, load_hugging_face
from mome_dist.llm.precision import dtype_of
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.tensors import embedding_scale
from mome_dist.speech.lora import LoRATerms
from mome_dist.speech.projector import Projectors
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import SequenceBuilder, TextCodec


def llm_dtype(config: RunConfig) -> torch.dtype:
    """Parameter type of the frozen LLM."""
    return dtype_of(config.llm.precision)


def build_sequences(config: RunConfig) -> SequenceBuilder:
    """The sequence layout of a run."""
    return SequenceBuilder(TextCodec(config.llm.path, asdict(config.llm.tags)), config.task.prompts)


def build_projectors(config: RunConfig, widths: Mapping[str, int]) -> Projectors:
    """The projectors of a run with their initial values.

    Args:
        widths: the encoders' feature widths by stream.

    Raises:
        UserError: if streams whose widths differ share a router.
    """
    check_joined(config, widths)
    mixture = config.projector.mixture
    projectors = Projectors(
        widths,
        rates_of(config),
        LLMShape.from_directory(config.llm.path).hidden_size,
        config.projector.hidden_size,
        config.projector.per_rate,
        config.projector.compression,
        config.projector.layer_norm,
        None if mixture is None else asdict(mixture),
    )
    projectors.initialize(config.seed, embedding_scale(config.llm.path))
    return projectors.requires_grad_(config.projector.trainable)


def mome_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments that every form of the MoME module takes."""
    mome, widths = config.mome, widths_of(config)
    return {
        "routed_experts": mome.routed_experts,
        "top_k": mome.top_k,
        "shared_experts": mome.shared_experts,
        "bottleneck": mome.bottleneck if widths is None else widths.widest,
        "widths": widths,
        "router": router_of(config),
        "expert": mome.expert,
    }


def build_reference(
    config: RunConfig,
    widths: Mapping[str, int],
    device_map: DeviceMap | None = None,
    lora: LoRATerms | None = None,
) -> MoMESpeechLM:
    """The one-process form of a run's model, untrained; for ``device_map`` see `load_hugging_face`, for ``lora``
    `MoMESpeechLM`."""
    llm = load_hugging_face(config.llm.path, llm_dtype(config), device_map)
    projectors = build_projectors(config, widths)
    terms = llm_terms_of(config, llm.config.hidden_size)
    model = MoMESpeechLM(
        llm, projectors, config.mome.placement, lora, terms, config.mome.reads, **mome_arguments(config)
    )
    model.initialize(config.seed, embedding_scale(config.llm.path))
    return model
