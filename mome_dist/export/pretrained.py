"""An export as a model of transformers: loaded, saved and pushed to the hub as those are.

    import mome_dist                                        # tells transformers of this kind of model
    from transformers import AutoModel
    model = AutoModel.from_pretrained("exports/quickstart")
    print(model.transcribe("clip.mp4", audio_rate=4, video_rate=2).text)

Loading and decoding are those of `mome_dist.load` and of the commands (`mome_dist.inference.load`,
`mome_dist.transcription`). An export has no frozen weights; they are looked for where it says, and their licences stay
with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mome_dist.checkpoint.adapter import (
    CARD,
    FIRST_WEIGHTS,
    LARGEST_SHARD,
    PEFT,
    SUMS,
    read_document,
    read_weights,
    saved_of,
)
from mome_dist.checkpoint.hashes import content_of_weights
from mome_dist.config.models import is_rank
from mome_dist.errors import UserError, first_line
from mome_dist.export.model_card import ERROR_RATES, model_card, with_section
from mome_dist.export.pretrained_config import MoMESpeechConfig
from mome_dist.files import published_directory
from mome_dist.hub import INDEX, SCHEME, HubModel, fetch, upload, with_tags
from mome_dist.inference.load import Encoder, LoadedRun, assemble
from mome_dist.llm.hugging_face import PLACEMENTS
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.sequence import PackedTokens
from mome_dist.transcription.model import Transcriber

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", "float32": "fp32", "bfloat16": "bf16"}
# Arguments of transformers that ask for what is always so: safetensors only, and no code of a repository.
_ALWAYS_SO = ("trust_remote_code", "use_safetensors", "weights_only", "low_cpu_mem_usage", "adapter_kwargs")
_CHANGED = (
    "These weights are not those that were exported: they were changed in Python afterwards, and nothing was measured "
    "with them."
)


class MoMESpeechModel(PreTrainedModel, Transcriber):
    """What was trained, on its frozen models; in eval mode after `from_pretrained`.

    Its parameters and buffers are those that an export holds, by the names that they have there. The frozen LLM is
    `speech_lm.llm`, which follows the model from device to device unless a device map has spread it, and the frozen
    encoders are loaded when they are first needed; both are no part of ``state_dict()``.

    Args:
        config: of an export.
        run: that has been loaded; None builds the untrained model of that configuration.
        card: the model card that the model came with; None writes another one when it is saved.
    """

    config_class = MoMESpeechConfig
    config: MoMESpeechConfig
    main_input_name = "tokens"

    def __init__(self, config: MoMESpeechConfig, run: LoadedRun | None = None, card: str | None = None) -> None:
        super().__init__(config)
        if run is None:
            run = assemble(saved_of(Path(config.name_or_path or "."), config.document(), {}), weights=False)
            if getattr(config, "own_tags", False):
                run.model.own_tags(run.sequences.codec.tags)
        self._run, self._card = run, card
        self._encoders: dict[str, Encoder] = {}
        for name, part in run.model.named_children():
            self.add_module(name, part)
        self.post_init()
        self._loaded = content_of_weights(self.state_dict())

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: parts come with their values."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: MoMESpeechConfig | None = None,
        llm_path: str | Path | None = None,
        audio_encoder_path: str | Path | None = None,
        video_encoder_path: str | Path | None = None,
        device_map: str | int | torch.device | Mapping[str, str | int] | None = None,
        dtype: str | torch.dtype | None = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> MoMESpeechModel:
        """Load an export; `AutoModel.from_pretrained` takes the same arguments.

        Args:
            pretrained_model_name_or_path: directory, or ``OWNER/NAME`` of the hub, whose files are fetched where the
                cache does not have them.
            config: that of the export if not given; decoding and the like may differ in ``config.config``.
            llm_path, audio_encoder_path, video_encoder_path: of frozen models, directories or ``hf://OWNER/NAME``;
                where not given, the place that the export recorded, then the cache of assets. Hashes are compared.
            device_map: how the LLM is spread (`mome_dist.llm.hugging_face.load_hugging_face`), the rest going to a GPU
                if there is one; or one device for everything.
            dtype: of the LLM, fp32 or bf16; "auto" is that of training. What was trained stays fp32.
            revision: branch, tag or commit.
            local_files_only: fetch nothing, as with ``HF_HUB_OFFLINE=1``.

        Raises:
            UserError: in one line, for a missing or damaged file, a frozen model that is missing or another one, or an
                argument that an export has no use for.
        """
        dtype = others.pop("torch_dtype", None) or dtype
        for key, value in others.items():
            if value and key not in _ALWAYS_SO and not key.startswith("_"):
                raise UserError(
                    f"from_pretrained({key}=...): an export has no use for it; leave it out. Caches and tokens are "
                    "those of HF_HOME and HF_TOKEN, frozen models are given by llm_path, audio_encoder_path and "
                    "video_encoder_path."
                )
        directory = _find(pretrained_model_name_or_path, revision, local_files_only)
        document = read_document(directory)
        config = cls.config_class.from_pretrained(str(directory)) if config is None else config
        _check_config(config, document)
        saved = saved_of(directory, config.document(), read_weights(directory, document))
        if dtype not in ("auto", None):
            if dtype not in _PRECISIONS:
                raise UserError(f"from_pretrained(dtype={dtype}): the LLM is loaded in float32 or bfloat16.")
            saved.config.llm.precision = _PRECISIONS[dtype]
        given = {"llm": llm_path, "audio_encoder": audio_encoder_path, "video_encoder": video_encoder_path}
        spread, device = _placed(device_map)
        frozen = {section: place for section, place in given.items() if place is not None}
        run = assemble(saved, device, frozen=frozen, device_map=spread)
        config.name_or_path = str(pretrained_model_name_or_path)
        card = directory / CARD
        return cls(config, run, card.read_text(encoding="utf-8") if card.is_file() else None).eval()

    @property
    def run(self) -> LoadedRun:
        """The same model as commands use it."""
        return replace(self._run, device=self.device)

    @property
    def speech_lm(self) -> MoMESpeechLM:
        """The same model with its frozen LLM."""
        return self._run.model

    def forward(self, tokens: PackedTokens, features: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Logits of the labels, fp32 [L, V]; see `mome_dist.speech.reference.MoMESpeechLM.label_logits`."""
        return self.speech_lm.label_logits(tokens, features)

    def frozen_encoders(self) -> dict[str, Encoder]:
        """Loaded once, unless they have LoRA, whose weights may change."""
        if self.speech_lm.lora is not None:
            return self.run.encoders()
        if not self._encoders:
            self._encoders = self.run.encoders()
        return self._encoders

    def train(self, mode: bool = True) -> MoMESpeechModel:
        """Set the mode of what is trained; the frozen LLM is always in eval mode."""
        super().train(mode)
        self.speech_lm.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoMESpeechModel:
        super()._apply(fn, recurse)
        if getattr(self.speech_lm.llm, "hf_device_map", None) is None:
            self.speech_lm.llm._apply(fn)
        self._encoders = {}  # they are loaded again, on the device of the model then
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        max_shard_size: int | str = LARGEST_SHARD,
        **hub: Any,
    ) -> None:
        """Write an export: of a model as it was loaded, the same bytes.

        Args:
            save_directory: to make, or an empty one; it is filled at once or not at all.
            is_main_process: False writes nothing.
            push_to_hub: also `push_to_hub`, with the other arguments, to ``repo_id`` or the directory's name.
            max_shard_size: above which weights are cut into several files.

        Raises:
            UserError: there is something in that directory.
        """
        if not is_main_process:
            return
        target = Path(save_directory)
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            raise UserError(f"{target} exists, and an export replaces nothing: name another directory or remove it.")
        hub = {key: value for key, value in hub.items() if value is not None}
        if hub and not push_to_hub:
            raise UserError(f"save_pretrained({min(hub)}=...): an export has no use for it; leave it out.")
        self._write(target, max_shard_size, ())
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", target.name), max_shard_size=max_shard_size, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = LARGEST_SHARD,
        tags: Sequence[str] = (),
    ) -> Any:
        """Send what `save_pretrained` writes as one commit of a repository of the hub, which is made if need be.

        transformers' own sends neither the model card of an export nor folders in folders (``peft/TERMS/``).

        Args:
            repo_id: ``OWNER/NAME``, or ``NAME`` of the user who is logged in.
            revision: branch, which is made if need be.
            tags: further ones for the model card.

        Returns:
            huggingface_hub's ``CommitInfo``.
        """
        with TemporaryDirectory() as folder:
            target = Path(folder) / "export"
            self._write(target, max_shard_size, tags)
            return upload(
                target,
                repo_id,
                # What an older export may have and this one not.
                replaced=["model*.safetensors", INDEX, FIRST_WEIGHTS, f"{PEFT}/*"],
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
            )

    def _write(self, target: Path, max_shard_size: int | str, tags: Sequence[str]) -> None:
        from mome_dist.export.adapter import IDENTITY, write_export

        document = {**IDENTITY, **self.config.document()}
        card = model_card(self._run, document, None) if self._card is None else self._card
        if (content := content_of_weights(self.state_dict())) != self._loaded:
            document["source"] = {**document["source"], "content": content}
            card = with_section(card, ERROR_RATES, _CHANGED)
        if tags:
            card = with_tags(card, tags)
        with published_directory(target, replace=False) as directory:
            write_export(directory, self.speech_lm, document, card, max_shard_size)


def _find(name: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """The directory of an export; of one of the hub, that of its files in the cache."""
    if Path(name).is_dir():
        return Path(name)
    key = "pretrained_model_name_or_path"
    try:
        model = HubModel.parse(key, f"{SCHEME}{name}" + (f"@{revision}" if revision else ""))
    except UserError as error:
        raise UserError(f"{name} is no directory, and no OWNER/NAME of the hub: name an export.") from error
    assert model is not None
    return fetch(key, model, local_files_only or is_rank(), also=(CARD, SUMS))


def _check_config(config: MoMESpeechConfig, document: Mapping[str, Any]) -> None:
    """What a configuration says of weights and frozen models is what the export says."""
    if not isinstance(config, MoMESpeechConfig):
        raise UserError(f"config is a {type(config).__name__}; an export has a {MoMESpeechConfig.__name__}.")
    for key, value in config.document().items():
        if key != "config" and document.get(key) != value:
            raise UserError(
                f"{key}={value!r} is not what config.json of the export says: only config.config may be changed; "
                "frozen models are given by llm_path, audio_encoder_path and video_encoder_path."
            )


def _placed(
    device_map: str | int | torch.device | Mapping[str, str | int] | None,
) -> tuple[str | Mapping[str, str | int] | None, torch.device]:
    """The map of the LLM, None for one device, and the device of the rest."""
    if isinstance(device_map, Mapping) or device_map in PLACEMENTS:
        assert isinstance(device_map, str | Mapping)
        return device_map, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return None, torch.device("cpu" if device_map is None else device_map)
    except RuntimeError as error:
        raise UserError(
            f"from_pretrained(device_map={device_map!r}): give a device, one of {', '.join(PLACEMENTS)}, or map module "
            f"names to devices ({first_line(error)})."
        ) from error
