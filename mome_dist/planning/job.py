"""What is to be trained, as numbers: the frozen model, the modules that train, and the lengths of sequences.

No torch here: a plan is arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config.derived import llm_terms_of, projector_inputs, router_of, schedule_of, views_of, widths_of
from mome_dist.config.schema import DataConfig, ProjectorConfig, RunConfig
from mome_dist.llm.shape import LLMShape
from mome_dist.moe.forms.base import ExpertForm
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.moe.widths import Widths
from mome_dist.parallel.layout import Layout, divisors
from mome_dist.planning.encoders import StepEncoder, step_encoders
from mome_dist.planning.hardware import BYTES
from mome_dist.sharing import Sharing
from mome_dist.speech.views import View

FRAMES_PER_SECOND = {"audio": 50, "video": 25}


@dataclass(frozen=True)
class Clip:
    """A typical utterance; give the longest that matters, since memory follows it.

    Attributes:
        seconds: of speech.
        text_tokens, prompt_tokens: of the transcript and the prompt.
    """

    seconds: float = 6.0
    text_tokens: int = 32
    prompt_tokens: int = 12

    def speech_tokens(self, view: View) -> int:
        """Audio and video tokens of the clip in a view."""
        rates = {"audio": view.audio_rate, "video": view.video_rate}
        return sum(
            max(int(self.seconds * FRAMES_PER_SECOND[stream]) // rate, 1) for stream, rate in rates.items() if rate
        )

    def length(self, view: View) -> int:
        """Positions of the LLM's input: begin token, speech between its tags, prompt and text."""
        tags = 2 * ((view.audio_rate is not None) + (view.video_rate is not None))
        return 1 + tags + self.speech_tokens(view) + self.prompt_tokens + self.text_tokens


@dataclass(frozen=True)
class Job:
    """A training job without its layout.

    Attributes:
        shape: of the frozen LLM.
        precision: "bf16" or "fp32", of the frozen weights and of hidden states; what trains is fp32.
        attention: "eager" or "sdpa".
        placement: "mhsa", "ffn", "layer" or "none".
        expert: name of the experts' form.
        experts, top_k, shared, bottleneck, capacity_factor: of the MoME modules; no experts, none a token and none
            shared in a run without.
        projector_parameters: of all streams together, routers included.
        projector_values: that autograd keeps for a speech token in the projectors.
        projectors_train: whether they have gradients and optimiser state.
        lengths: positions of a sequence in each view.
        labels: positions of a sequence that predict a label.
        batch_size: utterances of a step.
        fixed_batch: whether every step has exactly so many; with a budget of frames it is their number in the mean.
        shares: how often a step has each of the views, in the mean.
        longest: positions of a sequence in each view of the step that has the longest ones.
        moments: fp32 running averages that the optimiser keeps of each parameter.
        pad_heads: whether attention heads may be padded to a multiple of tp.
        encoders: that work in every step.
        terms: low-rank ones of the LLM; None if it has none.
        router: of the MoME modules.
        widths: units of each expert where they differ; ``bottleneck`` is that of the widest then, as it is in memory.
    """

    shape: LLMShape
    precision: str
    attention: str
    placement: str
    experts: int
    top_k: int
    shared: int
    bottleneck: int
    capacity_factor: float | None
    projector_parameters: int
    projector_values: int
    projectors_train: bool
    lengths: tuple[int, ...]
    labels: int
    batch_size: int
    fixed_batch: bool
    shares: tuple[float, ...]
    longest: tuple[int, ...]
    moments: int
    pad_heads: bool
    encoders: tuple[StepEncoder, ...] = ()
    terms: LowRankTerms | None = None
    expert: str = DEFAULT
    router: RouterSpec = PLAIN
    widths: Widths | None = None

    def accumulations(self, dp: int) -> list[int]:
        """Numbers of chunks that a global batch can be cut into on so many data-parallel ranks, the smallest first."""
        if self.fixed_batch:
            return divisors(self.batch_size // dp) if self.batch_size % dp == 0 else []
        return [2**power for power in range((self.batch_size // dp).bit_length())]

    @property
    def views_per_step(self) -> int:
        """Views that a step trains on."""
        return len(self.longest)

    @property
    def element_bytes(self) -> int:
        """Bytes of a frozen weight and of a hidden value."""
        return BYTES[self.precision]

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.form.parameters(*self.expert_sizes)

    @property
    def token_macs(self) -> float:
        """Multiply-adds that the experts of a token are in the mean, without those of units that narrow ones lack."""
        hidden, widths = self.shape.hidden_size, self.widths or Widths((self.bottleneck,), self.bottleneck)
        routed = sum(self.form.macs(hidden, width) for width in widths.routed) / len(widths.routed)
        return self.top_k * routed + self.shared * self.form.macs(hidden, widths.shared)

    @property
    def passes(self) -> int:
        """Passes of a token through the experts of a layer."""
        return self.router.settings.passes if self.experts else 1

    @property
    def common_parameters(self) -> int:
        """Parameters of a layer that its experts share."""
        return self.form.common_parameters(*self.expert_sizes) if self.all_experts else 0

    @property
    def expert_width(self) -> int:
        """Values of a token that experts read, and that travel."""
        return self.form.width(*self.expert_sizes)

    @property
    def form(self) -> ExpertForm:
        """The form of the experts."""
        return find_form(self.expert)

    @property
    def expert_sizes(self) -> tuple[int, int]:
        """H and b, what a form's costs are functions of."""
        return self.shape.hidden_size, self.bottleneck

    @property
    def all_experts(self) -> int:
        """Routed and shared experts of a layer."""
        return self.experts + self.shared

    @property
    def low_width(self) -> int:
        """Values of a token between the low-rank factors of a layer's queries and values, of all terms."""
        return 0 if self.terms is None else 2 * len(self.terms.names) * self.terms.rank

    @property
    def term_widths(self) -> int:
        """Outputs of the query and the value projection together."""
        return (self.shape.heads + self.shape.kv_heads) * self.shape.head_size

    @property
    def frozen_parameters(self) -> int:
        """Weights of the whole LLM, input and output embeddings apart."""
        shape = self.shape
        return shape.layers * (shape.layer_parameters + 2 * shape.hidden_size) + shape.hidden_size * (
            2 * shape.vocabulary + 1
        )

    @property
    def trained(self) -> tuple[Trained, ...]:
        """What trains: in each layer, and before the layers."""
        lora = sum(encoder.lora_parameters for encoder in self.encoders)
        router = self.router.parameters(self.shape.hidden_size, self.experts) if self.experts else 0
        replicated = router + self.shared * self.expert_parameters + self.common_parameters
        routed = Sharing(layer=0, experts=self.experts, partial=True)
        return (
            Trained(replicated, Sharing(layer=0, partial=True)),
            Trained(self.experts * self.expert_parameters, routed),
            Trained(self.low_width * self.shape.hidden_size, Sharing(layer=0, partial=True)),
            Trained(self.low_width * self.term_widths // 2, Sharing(layer=0, sliced=0)),
            Trained(self.projector_parameters * self.projectors_train + lora, Sharing()),
        )

    @property
    def trained_parameters(self) -> int:
        """Trained parameters of the whole model."""
        layers = self.shape.layers
        return sum(each.parameters * (1 if each.sharing.layer is None else layers) for each in self.trained)


@dataclass(frozen=True)
class Trained:
    """Parameters that train and that ranks share alike.

    Attributes:
        parameters: of them, of each layer or before all layers.
        sharing: how ranks share them; a layer stands for all layers.
    """

    parameters: int
    sharing: Sharing

    def held(self, layout: Layout, layers: int, first_stage: bool) -> float:
        """Return how many of these parameters a rank with so many layers holds."""
        ranks = layout.ep if self.sharing.experts is not None else self.sharing.ranks_of_slices(layout.tp)
        return self.parameters * (first_stage if self.sharing.layer is None else layers) / ranks


def held_parameters(job: Job, layout: Layout, layers: int, first_stage: bool) -> tuple[float, float, float]:
    """Trained parameters of a rank: those that all data-parallel ranks hold, routed experts, and of both together those
    whose gradients are summed over tensor-parallel ranks under sequence parallelism."""
    held = [(each.sharing, each.held(layout, layers, first_stage)) for each in job.trained]
    routed = sum(count for sharing, count in held if sharing.experts is not None)
    partial = sum(count for sharing, count in held if sharing.partial)
    return sum(count for _, count in held) - routed, routed, partial


def dispatches(layout: Layout, experts: int = 1, router: RouterSpec = PLAIN, expert: str = DEFAULT) -> tuple[str, ...]:
    """What ``mome.dispatch=auto`` chooses from: what the router and the experts' form work with; nothing to choose
    without routed experts."""
    if not experts:
        return ("none",)
    able, either = find_form(expert).dispatches, ("alltoall", "gather" if layout.ep > 1 else "local")
    return tuple(name for name in either if name in router.settings.dispatches and name in able)


@dataclass(frozen=True)
class Candidate:
    """A way to run a job.

    Attributes:
        layout: of the processes.
        zero: DeepSpeed ZeRO stage.
        dispatch: "alltoall", "gather" or "local"; "none" without experts.
        accumulation: parts that a global batch is cut into (`data.accumulation`).
    """

    layout: Layout
    zero: int
    dispatch: str
    accumulation: int

    def utterances(self, job: Job) -> int:
        """Utterances of a microbatch of the fullest rank."""
        return -(-job.batch_size // (self.accumulation * self.layout.dp))

    def longest_pass(self, job: Job) -> list[tuple[int, int]]:
        """(sequence length, tokens) of each view of a microbatch of the fullest rank, where a step has the longest
        views."""
        each = self.utterances(job)
        return [(length, length * each) for length in job.longest]

    def mean_pass(self, job: Job) -> list[tuple[int, float]]:
        """(sequence length, tokens) of every view in a microbatch, in the mean over steps."""
        each = self.utterances(job)
        return [(length, length * each * share) for length, share in zip(job.lengths, job.shares, strict=True)]

    def encoded(self, job: Job) -> tuple[int, int]:
        """Clips of a step on the fullest data-parallel rank, and those that a rank of its first stage encodes."""
        clips = -(-job.batch_size // self.layout.dp)
        return clips, -(-clips // self.layout.tp)

    def name(self) -> str:
        """In short, for tables and messages."""
        layout = self.layout
        parts = [f"tp{layout.tp} pp{layout.pp} dp{layout.dp} ep{layout.ep}", f"zero{self.zero}", self.dispatch]
        parts += ["sp"] if layout.sequence_parallel else []
        parts += [f"recompute {layout.recompute}"] if layout.recompute != "none" else []
        return f"{' '.join(parts)}, accumulation {self.accumulation}"


def job_of(
    config: RunConfig,
    shape: LLMShape,
    clip: Clip,
    widths: Mapping[str, int],
    on_gpu: bool,
    fast_precision: str = "bf16",
) -> Job:
    """The job that a configuration describes.

    Args:
        clip: a typical utterance.
        widths: the encoders' feature widths by stream.
        on_gpu: where it will run; it settles ``llm.attention=auto``.
        fast_precision: of the devices there; it settles ``precision=auto`` of all frozen models.

    Raises:
        UserError: if encoders work in every step, and nothing tells the sizes of one.
    """
    mome, views, schedule, units = config.mome, views_of(config), schedule_of(config), widths_of(config)
    attention = config.llm.attention
    if attention == "auto":
        attention = "sdpa" if on_gpu else "eager"
    return Job(
        shape=shape,
        precision=fast_precision if config.llm.precision == "auto" else config.llm.precision,
        attention=attention,
        placement=mome.placement,
        experts=mome.experts,
        top_k=mome.top_k if mome.experts else 0,
        shared=mome.shared_experts if mome.placed else 0,
        expert=mome.expert,
        bottleneck=mome.bottleneck if units is None else units.widest,
        widths=units,
        capacity_factor=mome.capacity_factor,
        projector_parameters=_projector_parameters(config, shape.hidden_size, widths),
        projector_values=_projector_values(config.projector, shape.hidden_size, max(widths.values())),
        projectors_train=config.projector.trainable,
        lengths=tuple(clip.length(view) for view in views),
        labels=clip.text_tokens + 1,
        batch_size=typical_batch(config.data, clip.seconds),
        fixed_batch=config.data.batch_size is not None,
        shares=tuple(schedule.share(view) for view in views),
        longest=tuple(clip.length(view) for view in schedule.largest(clip.length)),
        moments=2 if config.optimizer.name == "adamw" else 0,
        pad_heads=config.llm.pad_heads and config.llm.lora is None,  # terms are of the LLM's own heads
        encoders=step_encoders(config, clip.seconds, fast_precision, on_gpu),
        terms=llm_terms_of(config, shape.hidden_size),
        router=router_of(config),
    )


def typical_batch(data: DataConfig, seconds: float = Clip.seconds) -> int:
    """Utterances of a global batch where each takes so many seconds."""
    if data.batch_size is not None:
        return data.batch_size
    assert data.max_frames is not None, "one of the two is set; see `mome_dist.config.values`"
    return max(1, int(data.max_frames / (seconds * FRAMES_PER_SECOND["video"])))


def _projector_parameters(config: RunConfig, hidden_size: int, widths: Mapping[str, int]) -> int:
    """Linear, Linear, LayerNorm for each stream, or for each rate of each stream; in a mixture for each expert of each
    pool, and the routers."""
    wide, norm, mixture = config.projector.hidden_size, 2 * config.projector.layer_norm, config.projector.mixture
    inputs = list(chain.from_iterable(projector_inputs(config, widths).values()))
    projectors = [(width + 1) * wide + (wide + 1 + norm) * hidden_size for width in inputs]
    if mixture is None:
        return sum(projectors)
    # Streams that share a pool or a router are equally wide.
    pools = projectors[:1] if mixture.form == "jejr" else projectors
    routers = inputs if mixture.form == "dedr" else inputs[:1]
    return mixture.experts * (sum(pools) + sum(routers))


def _projector_values(projector: ProjectorConfig, hidden_size: int, width: int) -> int:
    """What autograd keeps for a token of an input width: the inputs of the two linear maps and of the norm; in a
    mixture those of all experts, and what the norm's weight and the gates are multiplied with."""
    norm, mixture = int(projector.layer_norm), projector.mixture
    if mixture is None:
        return width + projector.hidden_size + norm * hidden_size
    return width + mixture.experts * (projector.hidden_size + (1 + 2 * norm) * hidden_size)
