"""The typed schema of a run: every key that a YAML file or a command line may set.

Hydra composes the YAML files under ``configs/``; the result is merged into these dataclasses, so that an unknown key or
a value of the wrong type is refused by name before anything starts. The meaning of every key is commented in the YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mome_dist.moe.forms.registry import DEFAULT


def one_of(default: str, *others: str) -> Any:
    """A string field restricted to the given values (checked by `mome_dist.config.values`)."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class SpeechTags:
    """Text of the single tokens that open and close the speech segments of the LLM's input."""

    audio_open: str = "<audio>"
    audio_close: str = "</audio>"
    video_open: str = "<video>"
    video_close: str = "</video>"


@dataclass
class LLMLoRAConfig:
    """Low-rank terms of the LLM's query and value projections."""

    rank: int | None = None
    reduction: int | None = None
    scale: float = 0.125
    start: str = one_of("a_random", "b_random")
    terms: list[str] = field(default_factory=lambda: ["shared"], metadata={"choices": ("shared", "task", "rates")})

    def rank_of(self, hidden_size: int) -> int:
        """The rank, in an LLM of a hidden size."""
        if self.rank is not None:
            return self.rank
        assert self.reduction is not None, "one of the two is set; see `mome_dist.config.values`"
        return round(hidden_size / self.reduction)

    def __str__(self) -> str:
        """As a command line writes it."""
        size = f"rank: {self.rank}" if self.rank is not None else f"reduction: {self.reduction}"
        return f"{{{size}, scale: {self.scale:g}, start: {self.start}, terms: [{', '.join(self.terms)}]}}"


@dataclass
class LLMConfig:
    path: str = ""
    precision: str = one_of("bf16", "fp32", "auto")
    attention: str = one_of("auto", "eager", "sdpa")
    pad_heads: bool = False
    cache_slices: bool = False
    lora: LLMLoRAConfig | None = None
    sink_loss: float = 0.0
    graphs: str = one_of("none", "cuda", "rehearsal")
    tags: SpeechTags = field(default_factory=SpeechTags)


@dataclass
class LoRAConfig:
    """Low-rank terms of an encoder; the linear layers that may be named are those of its Transformer."""

    rank: int = 0
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __str__(self) -> str:
        """As a command line writes it."""
        return f"{{rank: {self.rank}, alpha: {self.alpha:g}, targets: [{', '.join(self.targets)}]}}"


@dataclass
class AudioEncoderConfig:
    path: str = ""
    padding: str = one_of("30s", "clip")
    normalize: bool = False
    precision: str = one_of("fp32", "bf16", "auto")  # what a run saved before there was a choice; configs/ has auto
    lora: LoRAConfig | None = None


@dataclass
class VideoEncoderConfig:
    path: str = ""
    precision: str = one_of("fp32", "bf16", "auto")  # as that of the audio encoder
    lora: LoRAConfig | None = None


@dataclass
class MixtureConfig:
    """Several projectors for a stream, and a router between them; of two streams, what they share is in the form."""

    form: str = one_of("dedr", "dejr", "jejr")
    experts: int = 4
    top_k: int = 2
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def __str__(self) -> str:
        """In words, for reports."""
        losses = f"balance loss {self.balance_loss:g}, z-loss {self.z_loss:g}"
        return f"{self.form.upper()} mixture of {self.experts} experts, {self.top_k} a token, {losses}"


@dataclass
class ProjectorConfig:
    hidden_size: int = 2048
    layer_norm: bool = True
    per_rate: bool = False
    trainable: bool = True
    compression: str = one_of("pool", "stack")
    mixture: MixtureConfig | None = None


@dataclass
class MoMEConfig:
    placement: str = one_of("mhsa", "ffn", "layer", "none")
    reads: str = one_of("own", "previous")
    routed_experts: int = 23
    top_k: int = 4
    shared_experts: int = 1
    expert: str = DEFAULT
    bottleneck: int = 12
    width_rule: str = one_of("equal", "arithmetic", "geometric")
    widths: list[int] | None = None
    balance_by_width: bool = False
    router: dict[str, Any] = field(default_factory=lambda: {"name": "top_k"})  # checked by its kind's own settings
    renormalize: bool = True
    score: str = one_of("softmax", "sigmoid")
    bias_rate: float = 0.0
    balance_loss: float = 0.01
    z_loss: float = 0.0
    dispatch: str = one_of("auto", "alltoall", "gather", "local")
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    drop_policy: str = one_of("probs", "position")

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 in a run without experts, whatever the other keys say."""
        return 0 if self.placement == "none" else self.routed_experts

    @property
    def placed(self) -> bool:
        """Whether there are experts beside the layers, routed or shared."""
        return self.placement != "none"


@dataclass
class TaskWeights:
    asr: float = 1.0
    vsr: float = 1.0
    avsr: float = 1.0


@dataclass
class TaskConfig:
    tasks: list[str] = field(default_factory=lambda: ["avsr"], metadata={"choices": ("asr", "vsr", "avsr")})
    asr_audio_rates: list[int] = field(default_factory=lambda: [4, 16])
    vsr_video_rates: list[int] = field(default_factory=lambda: [2, 5])
    avsr_audio_rates: list[int] = field(default_factory=lambda: [4, 16])
    avsr_video_rates: list[int] = field(default_factory=lambda: [2, 5])
    sampling: str = one_of("views", "rates")
    views_per_step: int | None = None
    weights: TaskWeights = field(default_factory=TaskWeights)
    prompts: dict[str, str] = field(
        default_factory=lambda: {
            "asr": "Transcribe speech to text.",
            "vsr": "Transcribe video to text.",
            "avsr": "Transcribe speech and video to text.",
        }
    )


@dataclass
class DataConfig:
    corpus: str = ""
    train_split: str = "train"
    validation_split: str = "validation"
    validation_utterances: int | None = None
    test_split: str = "test"
    batch_size: int | None = 16
    max_frames: int | None = None
    bucket_batches: int = 16
    accumulation: int | str = "auto"
    microbatch_tokens: int | None = None
    max_damaged_utterances: int = 0
    features: str = one_of("cached", "online")
    decode_threads: int = 1
    features_dir: str | None = None

    @property
    def fixed_accumulation(self) -> int:
        """Microbatches of a step: of each one, or with "auto" the least."""
        return 1 if isinstance(self.accumulation, str) else self.accumulation

    def describe_batch(self) -> str:
        """What a global batch holds, in words."""
        return f"up to {self.max_frames:,} video frames" if self.max_frames else f"{self.batch_size} utterances"


@dataclass
class TimeMaskConfig:
    width: int = 0
    stride: int = 25


@dataclass
class NoiseConfig:
    source: str | None = None
    talkers: int = 8
    snr: list[float | None] = field(default_factory=lambda: [-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, None])
    probability: float = 1.0
    log: bool = True


@dataclass
class ModalityDropoutConfig:
    audio: float = 0.0
    video: float = 0.0


@dataclass
class AugmentationConfig:
    crop: int | None = None
    flip: float = 0.0
    video_time_mask: TimeMaskConfig = field(default_factory=TimeMaskConfig)
    audio_time_mask: TimeMaskConfig = field(default_factory=lambda: TimeMaskConfig(stride=16_000))
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    modality_dropout: ModalityDropoutConfig = field(default_factory=ModalityDropoutConfig)

    @property
    def active(self) -> bool:
        """Whether anything is done to a clip or a view at all."""
        masks = self.video_time_mask.width + self.audio_time_mask.width
        dropped = self.modality_dropout.audio + self.modality_dropout.video
        return self.crop is not None or self.flip + masks + dropped > 0 or self.noise.source is not None


@dataclass
class ParallelConfig:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    virtual: int = 1
    stage_layers: list[int] | None = None
    sequence_parallel: bool = False
    recompute: str = one_of("none", "selective", "full")
    timeout_seconds: int = 600


@dataclass
class DeepSpeedConfig:
    file: str = "zero1.json"


@dataclass
class OptimizerConfig:
    name: str = one_of("adamw", "sgd")
    learning_rate: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 20
    final_fraction: float = 0.02
    gradient_clipping: float = 1.0


@dataclass
class TrainingConfig:
    steps: int = 100
    epochs: int | None = None
    save_every: int = 0
    async_save: bool = False
    keep_checkpoints: int = 2
    validate_every: int = 0
    resume: bool = True
    init_from: str | None = None
    max_skipped_steps: int = 3
    log_utterances: bool = False
    log_seconds: float = 60.0
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_mode: str = one_of("auto", "online", "offline")


@dataclass
class DecodingConfig:
    num_beams: int = 1
    max_new_tokens: int | None = 32
    batch_size: int = 16
    tokens_per_second: float | None = None
    length_penalty: float = 1.0
    static_cache: bool = False
    device_map: Any = None


@dataclass
class RunConfig:
    name: str = "run"
    seed: int = 0
    output_dir: str = "runs/run"
    llm: LLMConfig = field(default_factory=LLMConfig)
    audio_encoder: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    video_encoder: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    mome: MoMEConfig = field(default_factory=MoMEConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
