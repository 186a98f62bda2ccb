"""What every key of a DeepSpeed configuration does here: acts, must agree, is harmless, or is refused.

The keys are those of DeepSpeed 0.19.8 (and what it removed, since files still have it). Only what acts is handed on to
DeepSpeed (`mome_dist.config.deepspeed.file`), so a key that is not in this table can do nothing unseen. No torch here.
"""

from __future__ import annotations

from typing import Any

from mome_dist.config.deepspeed.rules import (
    ANY,
    UNKNOWN,
    Acts,
    Agrees,
    Harmless,
    Only,
    Refused,
    Rule,
    Section,
    Switched,
)
from mome_dist.config.schema import RunConfig


def _switched(instead: str, *keys: str) -> Switched:
    """A section that ``enabled`` switches on; without further ``keys``, nobody looks into it."""
    return Switched({key: Harmless("the section is off") for key in ("enabled", *keys)} if keys else ANY, instead)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    """Whether a value is a whole number above zero; JSON files often write 5e8."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1 <= value < 2**63 and value == int(value)


def _acts_as_flag(what: str, own: bool | None = None) -> Acts:
    return Acts(what, _flag, "true or false", own)


def _acts_as_count(what: str, own: int | None = None) -> Acts:
    return Acts(what, _count, "a whole number above 0", own)


def _micro_batch(config: RunConfig, data_parallel: int | None) -> Any:
    if config.data.batch_size is None:
        return None
    accumulation = config.data.accumulation
    if isinstance(accumulation, str):
        return accumulation  # steps differ
    if data_parallel is None:
        return UNKNOWN
    return config.data.batch_size // (accumulation * data_parallel)


BUCKET_ELEMENTS = 50_000_000  # of configs/deepspeed
PRECISION = "remove it, and set llm.precision for the frozen LLM (bf16, fp32 or auto); what trains is always fp32"
FP32 = "what trains and its gradients are fp32: remove it"
ZERO_3 = Harmless("of ZeRO 3 only")
REMOVED = "DeepSpeed itself has it no more: remove it"
NO_TIMERS = (
    "DeepSpeed's timers measure calls that Megatron-Core's schedule does not make: remove it; seconds of a step are in "
    "metrics.jsonl"
)
SCHEDULE = Harmless("it measures calls that Megatron-Core's schedule does not make")
CHECKPOINTS = Harmless("of DeepSpeed's own checkpoints; those of a run load at every layout")
CLIPPING = Agrees("optimizer.gradient_clipping", lambda config, _: config.optimizer.gradient_clipping)

_OFFLOADED = {
    key: Harmless("nothing is offloaded")
    for key in (
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read"),
        *("pipeline_write", "fast_init", "ratio", "super_offload", "cpuadam_cores_perc"),
    )
}

NO_OFFLOAD = (
    "remove it: a module that no view of a step reaches would get its previous gradient again, and what trains is small"
)
NO_PARAMETER_OFFLOAD = "remove it: it belongs to ZeRO 3"

ZERO: dict[str, Rule] = {
    "stage": Acts(
        "ZeRO stage: what data-parallel ranks share out",
        lambda value: not isinstance(value, bool) and value in (0, 1, 2),
        "0, 1 or 2 (ZeRO 3 would divide the few parameters that train; parallel.tp and parallel.pp divide the LLM)",
        1,
    ),
    "reduce_bucket_size": _acts_as_count("elements of gradients that are reduced together", BUCKET_ELEMENTS),
    "allgather_bucket_size": Acts(
        "elements of weights that are gathered together after a step",
        lambda value: _count(value) and value % 2 == 0,  # DeepSpeed aligns parts for NCCL
        "an even whole number above 0",
    ),
    "overlap_comm": _acts_as_flag("reduce gradients on a stream of their own", False),
    "reduce_scatter": Only([True], "remove it: DeepSpeed demands it where there are experts"),
    "contiguous_gradients": Only([True], "remove it: DeepSpeed demands it where there are experts"),
    "use_multi_rank_bucket_allreduce": _acts_as_flag("reduce the buckets of several ranks together"),
    "round_robin_gradients": Harmless("it speeds up copies to the CPU, and nothing is offloaded"),
    "parameter_alignment": _acts_as_flag("start every parameter at an address that 16 divides"),
    "allgather_partitions": Harmless("DeepSpeed's ZeRO 1 and 2 gather weights in one way only"),
    "ignore_unused_parameters": Only([True], "remove it: a view of one stream leaves the other one's projector unused"),
    "compute_grad_norm": Only([True], "remove it: the gradient norm is logged and clipped by"),
    "legacy_stage1": Only([False], "remove it: DeepSpeed has the old ZeRO 1 no more"),
    "offload_optimizer": Switched(_OFFLOADED, NO_OFFLOAD, "device", ("none", None)),
    "offload_param": Switched(_OFFLOADED, NO_PARAMETER_OFFLOAD, "device", ("none", None)),
    "cpu_offload": Only([False, None], NO_OFFLOAD),
    "cpu_offload_param": Only([False, None], NO_PARAMETER_OFFLOAD),
    "cpu_offload_use_pin_memory": Harmless("nothing is offloaded"),
    "zenflow": Only([None], NO_OFFLOAD),
    "elastic_checkpoint": CHECKPOINTS,
    "load_from_fp32_weights": CHECKPOINTS,
    "sub_group_size": ZERO_3,
    "zero_hpz_partition_size": Only([1], "remove it: it belongs to ZeRO 3"),
    "zero_quantized_weights": Only([False], "remove it: it belongs to ZeRO 3"),
    "zero_quantized_nontrainable_weights": Only([False], "remove it: it belongs to ZeRO 3"),
    "zero_quantized_gradients": Only([False], "remove it: it belongs to ZeRO 3, and gradients are reduced in fp32"),
    "mics_shard_size": Only([-1], REMOVED),
    "mics_hierarchical_params_gather": Only([False], REMOVED),
    "zeropp_loco_param": Only([None], REMOVED),
}
for _name in (  # DeepSpeed takes these with "stage3_", some without too
    "allgather_sequential",
    "gather_16bit_weights_on_model_save",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "use_all_reduce_for_fetch_params",
):
    ZERO |= {_name: ZERO_3, f"stage3_{_name}": ZERO_3}
for _name in (
    "enable_sanity_checks",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "override_module_apply",
    "pipeline_loading_checkpoint",
    "save_muon_momentum_buffer_in_memory",
    "stage3_gather_fp16_weights_on_model_save",
):
    ZERO[_name] = ZERO_3

OPTIMIZER: dict[str, Rule] = {
    # DeepSpeed's Adam decays weights as AdamW does, unless adam_w_mode is false.
    "type": Agrees(
        "optimizer.name", lambda config, _: config.optimizer.name, {"adamw": ("adamw", "adam"), "sgd": ("sgd",)}
    ),
    "params": Section(
        {
            "lr": Agrees("optimizer.learning_rate", lambda config, _: config.optimizer.learning_rate),
            "betas": Agrees("optimizer.betas", lambda config, _: config.optimizer.betas),
            "eps": Agrees("optimizer.epsilon", lambda config, _: config.optimizer.epsilon),
            "weight_decay": Agrees("optimizer.weight_decay", lambda config, _: config.optimizer.weight_decay),
            "max_grad_norm": CLIPPING,
            "adam_w_mode": Only([True], "remove it: optimizer.name=adamw decays weights, not gradients"),
            "bias_correction": Only([True], "remove it: optimizer.name=adamw corrects its averages"),
            "amsgrad": Only([False], "remove it: optimizer.name is adamw or sgd, without variants"),
            "momentum": Only([0, 0.0], "remove it: optimizer.name=sgd has no momentum"),
            "nesterov": Only([False], "remove it: optimizer.name=sgd has no momentum"),
            "torch_adam": Harmless("an implementation of the same optimiser"),
            "fused": Harmless("an implementation of the same optimiser"),
        }
    ),
    "legacy_fusion": Harmless("an implementation of the same optimiser"),
}

_LOSS_SCALE = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis")
_BF16 = ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states")
_RECOMPUTE = "remove it and set parallel.recompute=full or selective"
_ELSEWHERE = "remove it: "
_TUNER = "remove it and use mome-dist tune"

KEYS: dict[str, Rule] = {
    "zero_optimization": Section(ZERO),
    "train_batch_size": Agrees("data.batch_size", lambda config, _: config.data.batch_size),
    "train_micro_batch_size_per_gpu": Agrees("data.batch_size / data.accumulation / data-parallel ranks", _micro_batch),
    "gradient_accumulation_steps": Agrees("data.accumulation", lambda config, _: config.data.accumulation),
    "gradient_clipping": CLIPPING,
    "optimizer": Section(OPTIMIZER),
    "scheduler": Only(
        [None, {}], "remove it: optimizer.warmup_steps and optimizer.final_fraction say how the rate rises and falls"
    ),
    "bf16": _switched(PRECISION, *_BF16),
    "bfloat16": _switched(PRECISION, *_BF16),
    "fp16": _switched(PRECISION, "auto_cast", "min_loss_scale", "fp16_master_weights_and_grads", *_LOSS_SCALE),
    "amp": _switched(PRECISION),
    "torch_autocast": _switched(PRECISION, "dtype", "lower_precision_safe_modules"),
    "data_types": Section(
        {
            "grad_accum_dtype": Only(["fp32", "float32", None], FP32),
            "param_dtype": Only(["fp32", "float32", None], FP32),
            "buffer_dtype": Only(["fp32", "float32", None], FP32),
            "keep_in_fp32_modules": Harmless("everything that trains is fp32"),
        }
    ),
    "communication_data_type": Only(["fp32", None], "remove it: gradients are reduced in fp32"),
    "seq_parallel_communication_data_type": Harmless("of DeepSpeed's own sequence parallelism"),
    "gradient_allreduce_op": Only(["mean"], "remove it: a sum would multiply gradients by the data-parallel ranks"),
    "prescale_gradients": Harmless("guards sums in fp16; gradients are summed in fp32"),
    "gradient_predivide_factor": Harmless("guards sums in fp16; gradients are summed in fp32"),
    "sparse_gradients": Only([False], "remove it: no trained layer has sparse gradients"),
    "managed_gradient_accumulation": Only([True], "remove it: data.accumulation says how a batch is cut"),
    "zero_allow_untested_optimizer": Harmless("the project sets it: its optimisers are tested with ZeRO"),
    "zero_force_ds_cpu_optimizer": Harmless("nothing is offloaded"),
    "disable_allgather": Only([False], "remove it: ranks need the weights of a step"),
    "allgather_size": Refused("write zero_optimization.allgather_bucket_size instead"),
    "steps_per_print": Harmless("every step is in metrics.jsonl"),
    "wall_clock_breakdown": Only([False], NO_TIMERS),
    "memory_breakdown": Only([False], NO_TIMERS),
    "timers": Section(
        {"throughput": Section({"enabled": SCHEDULE, "synchronized": SCHEDULE})},
    ),
    "flops_profiler": _switched(
        NO_TIMERS,
        *("recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    ),
    "comms_logger": _switched(
        _ELSEWHERE + "mome-dist check measures links", "prof_all", "prof_ops", "verbose", "debug"
    ),
    "dump_state": Only([False], _ELSEWHERE + "config.yaml of a run and its first lines say what it runs with"),
    "log_level": Harmless("DeepSpeed's own messages are printed from errors on"),
    "tensorboard": _switched(_ELSEWHERE + "a run always writes tensorboard/", "output_path", "job_name"),
    "wandb": _switched("remove it and set training.wandb_project", "group", "team", "project"),
    "csv_monitor": _switched(_ELSEWHERE + "every step is in metrics.jsonl", "output_path", "job_name"),
    "comet": _switched("remove it; training.wandb_project logs to Weights & Biases"),
    "activation_checkpointing": Section(
        {
            "partition_activations": Only([False], _RECOMPUTE),
            "cpu_checkpointing": Only([False], _RECOMPUTE),
            "contiguous_memory_optimization": Only([False], _RECOMPUTE),
            "number_checkpoints": Only([None, False, 0], _RECOMPUTE),
            "synchronize_checkpoint_boundary": Harmless("DeepSpeed recomputes nothing here"),
            "profile": Harmless("DeepSpeed recomputes nothing here"),
        }
    ),
    "checkpoint": Section(
        {
            "tag_validation": CHECKPOINTS,
            "load_universal": Only([False], "remove it: a run's checkpoints load at every layout"),
            "use_node_local_storage": Only([False], "remove it: output_dir is shared by all nodes"),
            "parallel_write": CHECKPOINTS,
            "checkpoint_serialization": CHECKPOINTS,
            "writer": CHECKPOINTS,
        }
    ),
    "datastates_ckpt": Only([None, False], "remove it and set training.async_save=true"),
    "nebula": _switched("remove it and set training.async_save=true"),
    "dataloader_drop_last": Only([False], "remove it: an epoch has every utterance once"),
    "data_efficiency": _switched(_ELSEWHERE + "data.* says which utterances a step has"),
    "curriculum_learning": _switched(_ELSEWHERE + "data.* says which utterances a step has"),
    "progressive_layer_drop": _switched(REMOVED),
    "compression_training": _switched(REMOVED),
    "quantize_training": _switched(REMOVED),
    "weight_quantization": Refused("remove it: the LLM is frozen in llm.precision"),
    "eigenvalue": _switched(REMOVED),
    "sparse_attention": Only([None], REMOVED),
    "elasticity": _switched("remove it: a run continues at any number of processes"),
    "graph_harvesting": Only([False], REMOVED),
    "autotuning": _switched(_TUNER),
    "aio": Harmless("it reads and writes what is offloaded: nothing"),
    "hybrid_engine": _switched(
        _ELSEWHERE + "nothing is generated while a run trains",
        *("max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters"),
        *("tp_gather_partition_size", "enable_cuda_graph"),
    ),
    "pipeline": Refused("remove it and set parallel.pp"),
    "tensor_parallel": Switched(ANY, "remove it and set parallel.tp", "autotp_size", (0, 1, None)),
    "expert_parallel": _switched("remove it and set parallel.ep"),
    "sequence_parallel_size": Only([1], "remove it and set parallel.tp and parallel.sequence_parallel=true"),
    "use_data_before_expert_parallelism": Only([False], "remove it: parallel.* says which ranks form a group"),
    "compile": Only([None, {}], "remove it: DeepSpeed never calls the model, so it compiles nothing"),
    "vocabulary_size": Harmless("only a warning of DeepSpeed's follows from it"),
    "disable_python_gc": Only([False], "remove it: the loop leaves Python's memory to Python"),
}
