"""The model card of an export: what it is, how it was made, how good it is, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mome_dist.adapters.lora import PREFIX
from mome_dist.artefact import RECORD_FILE
from mome_dist.assets import ASSETS
from mome_dist.config.derived import expert_in_words, lora_of, router_of
from mome_dist.config.schema import ProjectorConfig, RunConfig
from mome_dist.evaluation.tables import markdown_report
from mome_dist.export.card_metadata import TASKS, card_data
from mome_dist.export.citations import citations
from mome_dist.hub import model_at
from mome_dist.inference.load import LoadedRun
from mome_dist.speech.views import View

USE, ERROR_RATES = "Use", "Word error rates"


def model_card(
    run: LoadedRun, document: Mapping[str, Any], results: Mapping[str, Any] | None, licence: str | None = None
) -> str:
    """The card in Markdown, with the front matter that model hubs read. A function of its arguments and of the licence
    notes in the directories of the frozen models.

    Args:
        run: what is exported.
        document: the content of the export's ``config.json``.
        results: an evaluation of the same weights (``results.json``), or None.
        licence: of the trained weights, as the hub names it; None: not known yet.
    """
    sections = {
        f"{document['name']}: a {'MoME ' if run.config.mome.experts else ''}speech adapter": _summary(run, document),
        "Numbers": _numbers(run, document),
        ERROR_RATES: _error_rates(results),
        USE: usage(run.views[0]),
        "Licences": _licences(run, document, licence),
        **_citation(run.config),
    }
    level = "#"
    text = f"---\n{card_data(run, document, results, licence).to_yaml()}\n---\n"
    for title, body in sections.items():
        text += f"\n{level} {title}\n\n{body}\n"
        level = "##"
    return text


def with_section(card: str, title: str, body: str) -> str:
    """A card with another text under one of its second-level headings; as it is where it has no such heading."""
    return (
        re.sub(rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)", lambda _: f"## {title}\n\n{body}\n\n", card).rstrip(
            "\n"
        )
        + "\n"
    )


def _summary(run: LoadedRun, document: Mapping[str, Any]) -> str:
    mome, frozen, adapted = run.config.mome, document["frozen"], run.config.llm.lora is not None
    alone = adapted and not mome.placed
    encoders = " and ".join(f"`{facts['name']}`" for section, facts in frozen.items() if section != "llm")
    views: dict[str, list[str]] = {}
    for view in run.views:
        views.setdefault(view.task, []).append(view.rates)
    trained = "Projectors and LoRA" if adapted else "Projectors"
    source = "encoders with LoRA" if lora_of(run.config) else "frozen encoders"
    kind, experts = f"{trained} from {source} into a frozen language model, without experts", []
    if mome.experts:
        kind = (
            f"Mixture of Matryoshka Experts beside the layers of a frozen language model, with projectors from {source}"
        )
        experts = [
            f"- Experts: {mome.routed_experts} routed, {mome.top_k} a token, and {mome.shared_experts} shared, of form "
            f"{expert_in_words(run.config)}, beside each layer's `{mome.placement}`."
        ]
    elif mome.placed:
        kind = "Projectors from frozen encoders into a frozen language model, and experts that every token uses"
        experts = [
            f"- Experts: {mome.shared_experts}, of form {mome.expert} {mome.bottleneck}, without a router, beside each "
            f"layer's `{mome.placement}`."
        ]
        router = str(router_of(run.config).settings)
        experts += [f"- {router[0].upper()}{router[1:]} of experts."] if router else []
    lines = [
        f"{kind}: `{frozen['llm']['name']}` ({document['llm']['architecture']}) reads speech through {encoders}. "
        "The frozen models are not in this directory; they are known by their hash.",
        "",
        *experts,
        *(f"- {task.upper()} ({TASKS[task]}), trained at rates {', '.join(rates)}." for task, rates in views.items()),
        *_projectors(run.config.projector),
        *([f"- LoRA of the language model's query and value projections: `{run.config.llm.lora}`."] * adapted),
        *(["- `peft/` has the same for PEFT's `PeftModel.from_pretrained`, a folder for each sum of terms."] * alone),
        *(f"- LoRA of the {stream} encoder: `{lora}`." for stream, lora in lora_of(run.config).items()),
        "",
        "A rate is the number of frames a token, of 50 a second in audio and 25 in video. One model has all.",
    ]
    return "\n".join(lines)


def _projectors(projector: ProjectorConfig) -> list[str]:
    """What is not as usual."""
    lines = [] if projector.layer_norm else ["- Projectors do not end in a layer norm."]
    return lines if projector.mixture is None else [*lines, f"- Projectors: {projector.mixture}."]


def _numbers(run: LoadedRun, document: Mapping[str, Any]) -> str:
    counts, llm, source = document["parameters"], document["llm"], document["source"]
    trained, kept = [f"{counts['mome']:,} MoME"] if run.config.mome.placed else [], ""
    if run.config.projector.trainable:
        trained.append(f"{counts['projectors']:,} projectors")
    else:
        kept = f"; the {counts['projectors']:,} of the projectors were taken from another run and kept"
    if PREFIX in counts:
        trained.append(f"{counts[PREFIX]:,} LoRA of the language model")
    if "lora" in counts:
        trained.append(f"{counts['lora']:,} LoRA of the encoders")
    parts = ", ".join(trained) + kept
    rows = {
        "parameters trained": f"{counts['trained']:,} ({parts})",
        **_active_experts(run, counts),
        **_active_terms(counts),
        "parameters of the frozen LLM": f"{llm['parameters']:,} in {run.config.llm.precision}",
        **_training(run),
        "checkpoint": f"`{source['checkpoint']}`, content `{source['content']}`",
        "made with": ", ".join(f"{name} {number}" for name, number in document["versions"].items()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _training(run: LoadedRun) -> dict[str, str]:
    if run.directory.is_file():
        return {"training": "by its authors, who published the file"}
    steps = f"{run.step:,} steps of {run.config.data.describe_batch()}, seed {run.config.seed}"
    return {"training": steps, "corpus": f"`{Path(run.config.data.corpus).name}`"}


def _active_experts(run: LoadedRun, counts: Mapping[str, int]) -> dict[str, str]:
    active = f"{counts['mome_active_per_token']:,}"
    return {"MoME parameters active a token": active} if run.config.mome.experts else {}


def _active_terms(counts: Mapping[str, int]) -> dict[str, str]:
    active = counts.get(f"{PREFIX}_active_per_token")
    return {} if active is None else {"LoRA parameters of the LLM active a token": f"{active:,}"}


def _citation(config: RunConfig) -> dict[str, str]:
    papers = citations(config)
    return {"Citation": "\n".join(f"- {paper}" for paper in papers)} if papers else {}


def _error_rates(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "These weights were not evaluated before they were exported."
    intro = f"Corpus `{results['corpus']}`, {results['split']} split, {results['utterances']} utterances.\n\n"
    return intro + markdown_report(results).rstrip("\n")


def usage(view: View) -> str:
    """How to use an export, with code for one of its views."""
    file = "clip.flac" if view.video_rate is None else "clip.mp4"
    rates = {stream: rate for stream, rate in (("audio", view.audio_rate), ("video", view.video_rate)) if rate}
    options = " ".join(f"--{stream}-rate {rate}" for stream, rate in rates.items())
    arguments = ", ".join(f"{stream}_rate={rate}" for stream, rate in rates.items())
    return f"""Text of one file, in this directory:

```bash
mome-dist transcribe . {file} {options}
```

The same in Python:

```python
import mome_dist

model = mome_dist.load(".")
said = model.transcribe("{file}", {arguments})
print(said.text, said.confidence)
```

Once mome_dist is imported, transformers' `AutoModel.from_pretrained` loads it as well, from a directory or from a hub.
Audio is resampled to 16 kHz. In a video of a face the mouth is found and cropped; 96x96 mouth crops are taken as they
are. The frozen models are looked for where they were at the export and in the cache of assets; name other places with
`--llm`, `--audio-encoder` and `--video-encoder`, in Python with `llm=`, `audio_encoder=` and `video_encoder=` (of
`from_pretrained`: `llm_path=`, `audio_encoder_path=` and `video_encoder_path=`)."""


def _licences(run: LoadedRun, document: Mapping[str, Any], licence: str | None) -> str:
    lines = ["The adapter works with these models only, and their licences hold wherever it is used:", ""]
    for section, facts in document["frozen"].items():
        note = _licence_note(Path(getattr(run.config, section).path))
        lines.append(f"- {section.replace('_', ' ')} `{facts['name']}`: {note} (fingerprint `{facts['fingerprint']}`)")
    if licence is None:
        own = "Whoever publishes the adapter gives it a licence; none is implied here."
    else:
        own = f"The adapter itself: `{licence}`."
    lines += ["", own]
    return "\n".join(lines)


def _licence_note(directory: Path) -> str:
    model = model_at(directory)
    if model is not None:
        return f"see https://huggingface.co/{model.repository}, of which this is commit {model.revision}"
    asset = ASSETS.get(directory.name)
    if asset is not None:
        return f"{asset.source.licence}, from the package {asset.source.package} {asset.source.version}"
    if (directory / RECORD_FILE).is_file():
        return "made with mome_dist; what its corpus allows"
    texts = sorted(path.name for path in directory.iterdir() if path.name.upper().startswith("LICENSE"))
    return f"see {texts[0]} in its directory" if texts else "not recorded; see where it was published"
