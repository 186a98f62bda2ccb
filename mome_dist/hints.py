"""What somebody may have meant by a wrong key, name or option: one mechanism for every message that suggests something.

A key is first looked up among the names that other frameworks have for it (`NAMES`), then among keys of the same last
part, then among those of its own section that look like it. Nothing of another section is suggested for its looks:
`optimizer.lr` resembles `optimizer.name` more than it resembles what it means.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

# What other frameworks call a key: Hugging Face's Trainer, Megatron-LM, NeMo, Lightning, fairseq, DeepSpeed, PEFT.
NAMES: Mapping[str, str] = {
    "name": "run_name experiment_name exp_name job_name wandb_name",
    "seed": "random_seed manual_seed data_seed",
    "output_dir": "save_dir save out out_dir exp_dir explicit_log_dir default_root_dir log_dir logging_dir dirpath",
    "llm.path": "model model_path model_name model_name_or_path model_id base_model llm_path language_model "
    "pretrained_model_name_or_path tokenizer tokenizer_model tokenizer_name",
    "llm.precision": "bf16 fp16 fp32 half tf32 amp mixed_precision precision dtype torch_dtype params_dtype",
    "llm.attention": "attn_implementation attention_backend flash_attention use_flash_attn sdpa",
    "llm.lora": "lora lora_r lora_rank lora_alpha lora_config peft peft_config use_lora adapter_dim",
    "audio_encoder.path": "whisper whisper_path whisper_model audio_encoder_path audio_model speech_encoder",
    "video_encoder.path": "avhubert av_hubert avhubert_path w2v_path video_encoder_path video_model visual_encoder",
    "projector.hidden_size": "projector_dim projector_hidden_size adapter_hidden_size",
    "mome.routed_experts": "experts num_experts n_experts n_routed_experts num_local_experts moe_num_experts "
    "num_moe_experts moe_expert_count",
    "mome.top_k": "topk k top_k num_experts_per_tok num_experts_per_token moe_router_topk moe_top_k",
    "mome.shared_experts": "n_shared_experts num_shared_experts",
    "mome.bottleneck": "expert_dim expert_size moe_intermediate_size moe_ffn_hidden_size bottleneck_dim",
    "mome.balance_loss": "aux_loss aux_loss_coef aux_loss_weight moe_aux_loss_coeff router_aux_loss_coef "
    "load_balancing_loss load_balance_loss balance_loss_weight",
    "mome.z_loss": "moe_z_loss_coeff router_z_loss router_z_loss_coef z_loss_coef",
    "mome.capacity_factor": "moe_expert_capacity_factor train_capacity_factor expert_capacity",
    "mome.dispatch": "moe_token_dispatcher_type token_dispatcher",
    "task.tasks": "modality modalities task_list input_modality",
    "task.asr_audio_rates": "audio_rate audio_rates asr_rate asr_rates compression_rate_audio downsample_ratio_audio",
    "task.vsr_video_rates": "video_rate video_rates vsr_rate vsr_rates compression_rate_video downsample_ratio_video",
    "task.prompts": "prompt prompts instruction system_prompt",
    "data.corpus": "corpus dataset datasets dataset_name data data_path data_dir train_data train_ds train_file "
    "train_manifest manifest manifest_filepath corpus_dir",
    "data.batch_size": "batch_size bs batch train_batch_size per_device_train_batch_size micro_batch_size "
    "global_batch_size train_micro_batch_size_per_gpu mbs gbs max_sentences",
    "data.max_frames": "max_frames max_tokens max_tokens_per_batch batch_duration frames_per_batch num_frames",
    "data.accumulation": "gradient_accumulation_steps accumulate_grad_batches grad_accum accumulation_steps "
    "update_freq num_micro_batches",
    "data.decode_threads": "num_workers dataloader_num_workers workers n_workers data_workers",
    "data.features_dir": "features_dir cache_dir feature_dir",
    "augmentation.noise.source": "noise noise_dir noise_wav musan musan_path noise_manifest",
    "augmentation.noise.snr": "snr noise_snr snr_range snr_db",
    "augmentation.noise.probability": "noise_prob noise_p noise_probability",
    "augmentation.modality_dropout": "modality_dropout audio_dropout video_dropout",
    "parallel.tp": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size autotp_size",
    "parallel.pp": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size",
    "parallel.ep": "ep ep_size expert_parallel expert_parallel_size expert_model_parallel_size moe_ep_size",
    "parallel.virtual": "vpp virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage",
    "parallel.sequence_parallel": "sp sequence_parallel use_sequence_parallel",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint "
    "activations_checkpoint_method activations_checkpoint_granularity recompute_granularity recompute_method "
    "recompute_activations checkpoint_activations",
    "parallel.timeout_seconds": "timeout ddp_timeout distributed_timeout distributed_timeout_minutes",
    "deepspeed.file": "deepspeed_config deepspeed_config_file ds_config ds_config_file deepspeed_path",
    "optimizer.name": "optim optimizer_type optimizer_name optim_type",
    "optimizer.learning_rate": "lr learning_rate max_lr peak_lr base_lr init_lr",
    "optimizer.betas": "betas beta1 beta2 adam_betas adam_beta1 adam_beta2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd weight_decay",
    "optimizer.warmup_steps": "warmup warmup_ratio warmup_iters warmup_updates warmup_fraction num_warmup_steps "
    "warmup_num_steps lr_warmup lr_warmup_iters lr_warmup_fraction lr_warmup_samples warmup_epochs",
    "optimizer.final_fraction": "min_lr end_lr min_lr_ratio min_lr_rate end_learning_rate lr_end lr_decay_style "
    "lr_scheduler lr_scheduler_type scheduler sched",
    "optimizer.gradient_clipping": "grad_clip gradient_clip clip clip_grad clip_grads clip_norm clip_gradients "
    "max_grad_norm gradient_clip_val grad_norm_clip",
    "training.steps": "max_steps num_steps total_steps train_steps train_iters max_iters iterations max_update "
    "max_updates total_num_update num_train_steps",
    "training.epochs": "epochs epoch num_epochs max_epochs max_epoch num_train_epochs train_epochs",
    "training.save_every": "save_steps save_interval save_interval_updates save_freq checkpoint_every "
    "every_n_train_steps save_strategy",
    "training.async_save": "async_save use_async async_checkpoint",
    "training.keep_checkpoints": "save_total_limit save_top_k keep_last keep_last_epochs keep_interval_updates",
    "training.validate_every": "eval_steps eval_interval eval_iters eval_strategy evaluation_strategy val_interval "
    "val_check_interval validate_interval validate_interval_updates check_val_every_n_epoch",
    "training.log_seconds": "logging_steps log_interval log_every log_every_n_steps",
    "training.resume": "resume resume_from_checkpoint resume_if_exists restore_file reset_optimizer auto_resume",
    "training.init_from": "load init_from_checkpoint init_from_nemo_model finetune_from_model restore_from_path "
    "pretrained pretrained_checkpoint load_from_checkpoint ckpt_path",
    "training.wandb_project": "wandb use_wandb wandb_project wandb_logger project report_to logger create_wandb_logger",
    "decoding.num_beams": "beam beams beam_size num_beams",
    "decoding.max_new_tokens": "max_length max_len max_len_b max_new_tokens max_generation_length",
    "decoding.length_penalty": "lenpen length_penalty",
    "decoding.batch_size": "eval_batch_size per_device_eval_batch_size decode_batch_size",
    # Of the launchers.
    "launcher.nodes": "nodes num_nodes nnodes num_machines",
    "launcher.tasks_per_node": "devices nproc nprocs nproc_per_node ntasks ntasks_per_node num_processes n_procs "
    "processes gpus num_gpus n_gpus ngpus gpu",
    "launcher.gpus_per_node": "gpus num_gpus n_gpus gpus_per_task gres gpu",
    "launcher.cpus_per_task": "cpus cpu cpus_per_gpu cores",
    "launcher.mem_gb": "mem memory",
    "launcher.time_minutes": "time timeout_min time_limit walltime max_time_per_run",
    # Of mome_dist.evaluate.
    "checkpoint": "run model ckpt checkpoint_path model_path ckpt_path path adapter export",
    "rates": "rate views view audio_rate video_rate",
    "limit": "num_samples max_samples limit_test_batches max_utterances",
    "video_corruption": "corruption corruptions video_noise",
    "output": "output_dir out out_dir results save_dir",
    "baselines": "baseline chance untrained",
}

SWEEP = (
    "several values of a key (seed=0,1) are a job array of Slurm: mome-dist launch submitit --multirun train "
    "experiment=NAME seed=0,1"
)
_PROCESSES = (
    "a run has as many processes as its launcher starts: mome-dist launch --nproc N, or launcher.nodes=N and "
    "launcher.tasks_per_node=N of mome-dist launch slurm"
)
# What no key says.
ELSEWHERE: Mapping[str, str] = {
    NAMES["launcher.nodes"] + " " + NAMES["launcher.tasks_per_node"] + " dp dp_size data_parallel_size "
    "data_parallel world_size distributed_world_size strategy ddp": _PROCESSES,
    "zero zero_stage zero_optimization stage": "choose the ZeRO stage with deepspeed=zero0, deepspeed=zero1 or "
    "deepspeed=zero2",
    "config config_name config_file config_path recipe": "name a whole run with experiment=NAME",
    "help h": "see configs/ for all keys",
}
_LOOKS = 0.6  # difflib's measure above which one name is taken for another

_SURELY = 0.75  # the same, where nothing else speaks for it
_CLOSE = 0.1  # by how much another choice may look less like it than the likeliest


def near(word: str, choices: Iterable[str], count: int = 3, looks: float = _LOOKS) -> list[str]:
    """The choices that look like a word, the likeliest first."""
    known, matcher = {_plain(choice): choice for choice in choices}, difflib.SequenceMatcher(b=_plain(word))
    ratios = {}
    for name in known:
        matcher.set_seq1(name)
        ratios[name] = matcher.ratio()
    likeliest = max(ratios.values(), default=0.0)
    found = [name for name, ratio in ratios.items() if ratio >= max(looks, likeliest - _CLOSE)]
    return [known[name] for name in sorted(found, key=lambda name: -ratios[name])[:count]]


def did_you_mean(found: Sequence[str]) -> str:
    """`; did you mean a or b?`, or nothing where nothing was found."""
    return f"; did you mean {' or '.join(found)}?" if found else ""


def hint(key: str, known: Collection[str]) -> str:
    """What to say after naming an unknown key: what was meant, which keys its section has, or where keys are listed.

    Args:
        known: all keys that there are, with their sections before them: ``optimizer.learning_rate``.

    Returns:
        The end of a sentence, with its ``;`` and its full stop or question mark.
    """
    section, _, last = _plain(key).rpartition(".")
    siblings = [name for name in known if section and name.rpartition(".")[0] == section]
    if not _aliased(last) and (alike := near(last, [name.rpartition(".")[2] for name in siblings], 1, _SURELY)):
        return did_you_mean([f"{section}.{alike[0]}"])
    if meant := _named(section, last, known):
        return did_you_mean(meant)
    for names, words in ELSEWHERE.items():
        if last in names.split():
            return f"; {words}."
    sections = {name.rpartition(".")[0] for name in known if "." in name}
    if section:
        own = section if section in sections else next(iter(near(section, sections, 1)), None)
        if own is not None:
            inside = [name for name in known if name.rpartition(".")[0] == own]
            ends = {name.rpartition(".")[2]: name for name in inside}
            if alike := near(last, ends):
                return did_you_mean([ends[name] for name in alike])
            return f"; keys of {own}: {', '.join(sorted(ends))}."
        return "; see configs/ for all keys."
    ends = {}
    for name in sorted(known, key=lambda name: (-name.count("."), name)):
        ends[name.rpartition(".")[2]] = name
    if alike := near(last, ends, looks=_SURELY):
        return did_you_mean([ends[name] for name in alike])
    top = sorted({name.partition(".")[0] for name in known})
    return f"; choose one of {', '.join(top)}." if len(top) == len(set(known)) else "; see configs/ for all keys."


def _aliased(last: str) -> bool:
    """Whether another framework has a key of this name."""
    return any(last in names.split() for names in NAMES.values())


def _named(section: str, last: str, known: Collection[str]) -> list[str]:
    """The known keys that another framework's name stands for, or that have the same last part; those of the section
    alone where it has any."""
    targets = [target for target, names in NAMES.items() if last in names.split()]
    meant = [name for target in targets for name in known if name in (target, target.rpartition(".")[2])]
    same = [name for name in known if name.rpartition(".")[2] == last]
    found = list(dict.fromkeys([*meant, *same] if meant else same))
    return [name for name in found if name.rpartition(".")[0] == section and section] or meant or found


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
