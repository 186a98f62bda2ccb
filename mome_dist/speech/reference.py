"""The same model in one process: Hugging Face's Llama or Qwen2 with MoME modules attached.

It decodes with transformers' `generate`, is what an export loads into, and is what the distributed model is proven
against: it shares no layer code with Megatron-Core and keeps all experts in one place. Parameter names are the
layout-free names of checkpoints (``projectors.*``, ``mome.N.*``, ``llm_lora.N.*``, ``lora.*``), and ``tags.*`` where
the tokens around speech have vectors of their own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteriaList

from mome_dist.adapters.lora import PREFIX, OneProcessLoRA
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.moe.balance import batch_sums, load_balance_loss, router_z_loss
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing
from mome_dist.moe.unrouted import LocalUnrouted
from mome_dist.packed_module import PackedModule, PackedTensor
from mome_dist.speech.balance import SpeechRoutes, balance_losses
from mome_dist.speech.limits import ClipLimits
from mome_dist.speech.lora import LoRATerms
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import AUDIO, VIDEO, PackedTokens, SpeechPlaces
from mome_dist.speech.views import View
from mome_dist.token_context import Modality, OneView


def _attach(
    layer: Any,
    placement: str,
    mome: LocalMoME | LocalUnrouted,
    tokens: Callable[[Tensor], OneView],
    earlier: list[Tensor] | None,
    first_layer: bool,
) -> None:
    """Add ``mome(h)`` to a sub-layer's output, where h is what the sub-layer reads, through a forward hook.

    ``layer`` is a decoder layer of transformers; those of Llama and Qwen2 name their parts alike. ``tokens`` says what
    hidden states [B, S, H] are of. With ``earlier``, which the modules of all layers share, h is what the sub-layer of
    the layer before read, but in the ``first_layer``.
    """
    targets: dict[str, nn.Module] = {"mhsa": layer.self_attn, "ffn": layer.mlp, "layer": layer}

    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        if mome.device != first.device:
            mome.to(
                first.device
            )  # the layers of an LLM that was spread over devices say where each MoME module belongs
        if earlier is not None:
            own = hidden
            hidden = own if first_layer else earlier[0]
            earlier[:] = [own]
        hidden = hidden.to(first.device)
        added = mome(hidden, first, tokens(first)) if isinstance(mome, LocalMoME) else mome(hidden, first)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    targets[placement].register_forward_hook(add, with_kwargs=True)


def _experts(hidden_size: int, **arguments: Any) -> LocalMoME | LocalUnrouted:
    """The experts beside a layer, with a router where there is something to choose."""
    if arguments["routed_experts"]:
        return LocalMoME(hidden_size, **arguments)
    kept = ("shared_experts", "bottleneck", "expert")
    return LocalUnrouted(hidden_size, **{name: arguments[name] for name in kept if name in arguments})


def layout_free_tensors(model: nn.Module) -> Iterator[PackedTensor]:
    """Every tensor in the parameters of a `MoMESpeechLM`, or of a part of it, by the name that checkpoints have for it,
    and where it is in its parameter."""
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            found = (tensor for tensor in module.tensors() if isinstance(tensor.parameter, nn.Parameter))
        else:
            own = module.named_parameters(recurse=False)
            found = (PackedTensor(name, value, 0, tuple(value.shape)) for name, value in own)
        for name, parameter, start, shape in found:
            full = re.sub(r"^(mome\.\d+\.router)\.", r"\1_", f"{path}.{name}" if path else name)
            yield PackedTensor(full, parameter, start, shape)


def _valid_routing(mome: LocalMoME, valid_BS: Tensor) -> Routing:
    """The routing of the latest pass, padding left out."""
    assert mome.last_routing is not None
    return mome.last_routing.restricted_to(valid_BS.flatten().repeat(mome.router.passes))


class MoMESpeechLM(nn.Module):
    """A frozen LLM that reads speech.

    Args:
        llm: Hugging Face model (see `mome_dist.llm.hugging_face`); its parameters are frozen here.
        projectors: of the streams in use.
        placement: "mhsa", "ffn" or "layer"; "none" for a model without experts.
        lora: of the encoders, which are no part of the model; None if they stay as they are.
        terms: low-rank ones of the LLM; None if it has none.
        reads: "own" or "previous": whether experts read what is beside them, or what the layer before has there.
        mome_arguments: ``routed_experts, top_k, shared_experts, bottleneck, router, expert, widths`` of `LocalMoME`;
            without routed experts there is no router.

    Attributes:
        router: of the MoME modules; None in a model without routed experts.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        projectors: Projectors,
        placement: str,
        lora: LoRATerms | None = None,
        terms: LowRankTerms | None = None,
        reads: str = "own",
        **mome_arguments: Any,
    ) -> None:
        super().__init__()
        self.projectors = projectors
        self.lora = lora
        hidden_size = llm.config.hidden_size
        layers = [] if placement == "none" else list(llm.model.layers)
        self.mome = nn.ModuleList([_experts(hidden_size, **mome_arguments) for _ in layers])
        earlier: list[Tensor] | None = [] if reads == "previous" else None
        for layer, mome in zip(layers, self._beside_layers(), strict=True):
            _attach(layer, placement, mome, self._tokens_of, earlier, layer is layers[0])
        self.router: RouterSpec | None = self.momes[0].router.spec if self.momes else None
        # Of the pass under way: the view, the tokens that it begins with, [B, S] of a modality each, and those after.
        self._view: View | None = None
        self._prefix, self._prefix_shape, self._text = OneView("", None, 0), (0, 0), OneView("", None, 0)
        self._tag_ids: dict[str, int] = {}  # of tags that have vectors of their own
        if terms is not None:
            layers = list(llm.model.layers)
            self.llm_lora = nn.ModuleList([OneProcessLoRA(terms, layer.self_attn, self._view_now) for layer in layers])
        # `generate` takes what it is not told from the model's own settings: sampling, penalties and forced tokens.
        llm.generation_config = GenerationConfig()
        self._routings: list[list[Routing]] = []  # of the latest pass of training, by view and layer
        self._speech_routes: list[SpeechRoutes] = []  # of the projectors' routers in it
        self._keeps_states = False
        self._states: list[list[Tensor]] = []  # of the latest pass by view, what layers but the last gave
        self._prefixes: list[tuple[int, ...]] = []  # by view, of each sequence
        # Outside the module tree: the LLM is frozen, named by checkpoints and never part of them.
        self._llm = [llm.requires_grad_(False).eval()]

    def own_tags(self, ids: Mapping[str, int]) -> None:
        """Give the tokens around speech vectors of their own, ``tags.NAME``, [H], in the place of the LLM's embeddings:
        the authors of Llama-AVSR add such tokens to the LLM and leave their random vectors as they are.

        Args:
            ids: by the name of the tag; no two alike.
        """
        self.tags = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(self.llm.config.hidden_size), requires_grad=False) for name in ids}
        )
        self._tag_ids = dict(ids)

    def _embed(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens; zero or more dimensions, and then H."""
        embedded = self.llm.get_input_embeddings()(ids)
        for name, number in self._tag_ids.items():
            own = self.tags[name].to(embedded.device, embedded.dtype)
            embedded = torch.where((ids == number).to(embedded.device)[..., None], own, embedded)
        return embedded

    @property
    def llm(self) -> PreTrainedModel:
        """The frozen LLM."""
        return self._llm[0]

    @property
    def momes(self) -> list[LocalMoME]:
        """The MoME modules that have a router, first layer first; none in a model without routed experts."""
        return [mome for mome in self._beside_layers() if isinstance(mome, LocalMoME)]

    def _beside_layers(self) -> list[LocalMoME | LocalUnrouted]:
        return cast(list[LocalMoME | LocalUnrouted], list(self.mome))

    @property
    def terms(self) -> LowRankTerms | None:
        """The low-rank terms of the LLM; None if it has none."""
        adapted = self._adapted()
        return adapted[0].terms if adapted else None

    def _adapted(self) -> list[OneProcessLoRA]:
        """The low-rank terms of the layers, first layer first; none where the LLM has none."""
        return cast(list[OneProcessLoRA], list(getattr(self, PREFIX, ())))

    def _view_now(self) -> View:
        assert self._view is not None, "a pass says its view before it begins"
        return self._view

    def _begin(self, view: View, modality_BS: Tensor) -> None:
        """Say what the next pass is of; tokens after those of ``modality_BS`` are text."""
        self._view, self._prefix_shape = view, (modality_BS.shape[0], modality_BS.shape[1])
        self._prefix = OneView(str(view), modality_BS.flatten(), modality_BS.numel())
        self._text = OneView(str(view), None, 0)

    def _tokens_of(self, hidden_BSH: Tensor) -> OneView:
        rows, length = hidden_BSH.shape[:2]
        if length != self._prefix_shape[1]:
            return self._text
        if rows != self._prefix_shape[0]:  # every clip is repeated for the beams
            assert self._prefix.modality_N is not None
            modality_BS = self._prefix.modality_N.view(self._prefix_shape)
            modality_N = modality_BS.repeat_interleave(rows // self._prefix_shape[0], dim=0).flatten()
            self._prefix_shape = rows, length
            self._prefix = OneView(self._prefix.view, modality_N, rows * length)
        return self._prefix

    def part_sizes(self) -> dict[str, int]:
        """Numbers of parameters of "mome" and "projectors" and, where there are any, of "llm_lora" and "lora"."""
        parts: dict[str, nn.Module] = {"mome": self.mome, "projectors": self.projectors}
        if self._adapted():
            parts[PREFIX] = self.llm_lora
        if self.lora is not None:
            parts["lora"] = self.lora
        return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}

    def initialize(self, seed: int, embedding_scale: float) -> None:
        """The same initial values as every parallel layout."""
        self.projectors.initialize(seed, embedding_scale)
        for number, mome in enumerate(self._beside_layers()):
            mome.initialize(f"mome.{number}", seed)
        for number, adapted in enumerate(self._adapted()):
            adapted.initialize(f"{PREFIX}.{number}", seed)

    def label_logits(self, tokens: PackedTokens, features: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """What the labels of a pass are predicted from, fp32 [L, V], view by view: every sequence by itself, padded
        beside the others of its view."""
        embedded_NH = self._embed(tokens.ids_N)
        keep = self._keep_routes if self.training else None
        embedded_NH = self.projectors.insert(embedded_NH, tokens.speech, features, keep)
        sequences = embedded_NH[: tokens.context.alive].split(tokens.context.lengths)
        logits, first = [], 0
        modalities = tokens.context.modality_N[: tokens.context.alive].split(tokens.context.lengths)
        self._routings, self._states, self._prefixes = [], [], []
        for view, rows in zip(tokens.views, tokens.context.view_sequences, strict=True):
            self._begin(view, pad_sequence(modalities[first : first + rows], batch_first=True))
            if self._keeps_states:
                assert tokens.context.prefixes is not None
                self._states.append([])
                self._prefixes.append(tokens.context.prefixes[first : first + rows])
            embedded_BSH = pad_sequence(sequences[first : first + rows], batch_first=True)
            lengths_B = torch.tensor(tokens.context.lengths[first : first + rows], device=embedded_BSH.device)
            valid_BS = torch.arange(embedded_BSH.shape[1], device=embedded_BSH.device) < lengths_B[:, None]
            output = self.llm(inputs_embeds=embedded_BSH, attention_mask=valid_BS.long(), use_cache=False)
            logits.append(output.logits[valid_BS])
            if self.training:
                self._routings.append([_valid_routing(mome, valid_BS) for mome in self.momes])
            first += rows
        return torch.cat(logits).index_select(0, tokens.labels.index_L).float()

    def loss(
        self, tokens: PackedTokens, features: Mapping[str, Sequence[Tensor]], weights: Sequence[float] | None = None
    ) -> Tensor:
        """Cross-entropy summed over the labels of a pass, fp32 scalar; that of each view times its weight."""
        logits_LV, ids_L = self.label_logits(tokens, features), tokens.labels.ids_L
        if weights is None:
            return F.cross_entropy(logits_LV, ids_L, reduction="sum")
        # Every view has the same clips, hence as many labels.
        by_view = zip(logits_LV.chunk(len(weights)), ids_L.chunk(len(weights)), weights, strict=True)
        return torch.stack([F.cross_entropy(rows, ids, reduction="sum") * w for rows, ids, w in by_view]).sum()

    def auxiliary_loss(self, balance_loss: float, z_loss: float) -> Tensor:
        """Mean over the views of the latest `loss` of the sum over layers of the weighted balance and z-losses, and
        those of the projectors' routers with their own coefficients; zero without experts anywhere."""
        losses = [torch.zeros((), device=next(self.projectors.parameters()).device)]
        for mome, routing in itertools.chain.from_iterable(zip(self.momes, r, strict=True) for r in self._routings):
            assert routing.valid_T is not None
            tokens, counts_E = routing.valid_T.sum(), routing.selected_TE().sum(dim=0)
            weights = None if mome.widths is None else mome.widths.balance_weights
            weights_E = None if weights is None else routing.probs_TE.new_tensor(weights)
            loss = balance_loss * load_balance_loss(routing, counts_E, tokens, weights_E)
            losses.append(loss + z_loss * router_z_loss(routing, tokens))
            losses += [own.part(routing.valid_T, tokens) for own in mome.router.losses(routing)]
        loss = torch.stack(losses).sum() / len(self._routings)
        for mome, routings in zip(self.momes, zip(*self._routings, strict=True), strict=True):
            if mome.router.has_batch_loss:
                loss = loss + mome.router.batch_loss(*batch_sums(routings))
        mixture = self.projectors.mixture
        return loss if mixture is None else loss + balance_losses(mixture, self._speech_routes)

    def keep_states(self) -> None:
        """Keep what layers give in training from now on, for `sink_loss`."""
        self._keeps_states = True
        for layer in list(self.llm.model.layers)[:-1]:
            layer.register_forward_hook(self._keep_state)

    def sink_loss(self) -> Tensor:
        """Sum over the sequences of the latest `loss` of the mean of ``cos(h_0, h_i)^2`` over layers but the last and
        over the tokens before the text but the first (`mome_dist.llm.sinks`), fp32; `keep_states` comes first."""
        found = [
            F.cosine_similarity(hidden_SH[:1].float(), hidden_SH[1:prefix].float()).square().mean() / len(states)
            for states, prefixes in zip(self._states, self._prefixes, strict=True)
            for state_BSH in states
            for hidden_SH, prefix in zip(state_BSH, prefixes, strict=True)
        ]
        return torch.stack(found).sum()

    def _keep_state(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self.training:
            self._states[-1].append(output[0] if isinstance(output, tuple) else output)

    def _keep_routes(self, tokens_TH: Tensor, routes: Sequence[SpeechRoutes]) -> Tensor:
        self._speech_routes = list(routes)
        return tokens_TH

    def _read_once(self, embedded_BSH: Tensor, mask_BS: Tensor, beams: int) -> DynamicCache:
        """Keys and values of left-padded prefixes, read once and then repeated for the beams, without those of the
        last token: `generate` reads what a cache lacks, and needs one token to go on from."""
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(
            inputs_embeds=embedded_BSH,
            attention_mask=mask_BS,
            position_ids=(mask_BS.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-1)
        cache.batch_repeat_interleave(beams)
        return cache

    def lay_out(
        self,
        prefixes: Sequence[list[int]],
        view: View,
        audio: Sequence[Tensor],
        video: Sequence[Tensor],
        texts: Sequence[Sequence[int]] = (),
    ) -> tuple[Tensor, Tensor]:
        """What the LLM reads of a batch: prefixes that are padded on the left, so that every text begins at one place,
        and texts that are padded on the right; the next pass is of it.

        Args:
            prefixes, view, audio, video: as of `generate`.
            texts: token ids after each prefix; none by default.

        Returns:
            Embeddings [B, S, H] in the LLM's precision, and int64 [B, S]: 1 where there is a token, 0 for padding.
        """
        device = next(self.projectors.parameters()).device  # the embeddings' own may be "meta": read when needed
        before, after = max(map(len, prefixes)), max(map(len, texts), default=0)
        rows = [
            ([0] * (before - len(ids)), [*ids, *text], [0] * (after - len(text)))
            for ids, text in zip(prefixes, texts or [()] * len(prefixes), strict=True)
        ]
        ids_BS = torch.tensor([[*left, *ids, *right] for left, ids, right in rows], device=device)
        mask_BS = torch.tensor([[*left, *[1] * len(ids), *right] for left, ids, right in rows], device=device)
        modality_BS = torch.where(ids_BS == AUDIO, Modality.AUDIO, torch.where(ids_BS == VIDEO, Modality.VIDEO, 0))
        self._begin(view, modality_BS.to(torch.int8))
        embedded_BSH = self._embed(ids_BS.clamp(min=0)).to(device)
        at = {name: (ids_BS.flatten() == mark).nonzero()[:, 0] for name, mark in (("audio", AUDIO), ("video", VIDEO))}
        rates = {"audio": view.audio_rate, "video": view.video_rate}
        places = [SpeechPlaces(stream, rate, at[stream], None) for stream, rate in rates.items() if rate is not None]
        flat = self.projectors.insert(embedded_BSH.flatten(0, 1), places, {"audio": audio, "video": video})
        return flat.view(embedded_BSH.shape), mask_BS

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[list[int]],
        view: View,
        audio: Sequence[Tensor],
        video: Sequence[Tensor],
        *,
        eos: int,
        limits: Sequence[int],
        num_beams: int = 1,
        length_penalty: float = 1.0,
        static_cache: bool = False,
    ) -> list[list[int]]:
        """Decode clips without sampling.

        Args:
            prefixes: token ids before the text, with speech placeholders (`SequenceBuilder.prefix`).
            view: task and rates.
            audio, video: features of each clip, [T_i, d]; ignored for streams that the view does not use.
            eos: id that ends a text.
            limits: the most tokens to write of each clip, the end token included.
            num_beams: 1 is greedy search.
            length_penalty: of beam search: hypotheses are compared by log-probability / tokens ** length_penalty.
            static_cache: keys and values lie in tensors of one size from the start. On a GPU, transformers then
                compiles what writes a token, into CUDA graphs; every beam reads its prefix by itself.

        Returns:
            New token ids of each clip, up to and without ``eos``. They do not depend on the other clips.
        """
        embedded_BSH, mask_BS = self.lay_out(prefixes, view, audio, video)
        # Everything that decides is set here; see `__init__` for what a model brings along.
        search = GenerationConfig(
            do_sample=False,
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=max(limits),
            eos_token_id=eos,
            pad_token_id=eos,
            cache_implementation="static" if static_cache else None,
        )
        read_once = num_beams > 1 and not static_cache
        with ExitStack() as laid_out:
            for adapted in self._adapted() if not static_cache else ():  # a compiled pass is given parameters only
                laid_out.enter_context(adapted.laid_out())
            written = self.llm.generate(
                inputs_embeds=embedded_BSH,
                attention_mask=mask_BS,
                past_key_values=self._read_once(embedded_BSH, mask_BS, num_beams) if read_once else None,
                generation_config=search,
                stopping_criteria=StoppingCriteriaList([ClipLimits(torch.tensor(limits, device=embedded_BSH.device))]),
            )
        return [row[: row.index(eos)] if eos in row else row for row in written.tolist()]
