"""Low-rank terms go out to PEFT's library, and come back."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from mome_dist.adapters.peft import CONFIG, PeftAdapter, is_peft, peft_adapters, read_peft, start_from_peft
from mome_dist.adapters.terms import LowRankTerms
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.llm.hugging_face import load_hugging_face
from mome_dist.model.shared import build_reference
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing
from mome_dist.speech.reference import MoMESpeechLM
from mome_dist.speech.views import View
from mome_dist.verification.probe import Probe, shrunk

VIEWS = [
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[4]",
    "task.avsr_video_rates=[2]",
]


def _model(folder: Path, terms: str) -> tuple[MoMESpeechLM, Path]:
    """A small model whose terms are all awake, and its LLM."""
    lora = f"llm.lora={{rank: 3, scale: 0.75, terms: [{terms}]}}"
    config = load_config(["experiment=tiny", "llm.precision=fp32", "mome=none", "parallel=single", *VIEWS, lora])
    probe = Probe(shrunk(config, folder), steps=1)
    model = build_reference(probe.config, probe.widths)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.llm_lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model, Path(probe.config.llm.path)


@pytest.mark.parametrize(
    ("kinds", "view", "name"),
    [
        ("shared", View("asr", 4, None), "shared"),
        ("task", View("vsr", None, 2), "vsr"),
        ("shared, task", View("avsr", 4, 2), "shared+avsr"),
        ("rates, shared", View("asr", 4, None), "asr_4+shared"),
    ],
)
def test_peft_computes_the_same(tmp_path: Path, kinds: str, view: View, name: str) -> None:
    model, llm = _model(tmp_path / "llm", kinds)
    assert model.terms is not None
    adapters = peft_adapters(model.state_dict(), model.terms)
    adapters[name].write(tmp_path / "adapter", "the-llm")
    ids = torch.arange(2, 26).view(2, 12)
    model._view = view
    with torch.no_grad():
        ours = model.llm(ids).logits
        plain = load_hugging_face(str(llm), torch.float32).eval()
        without = plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(ids).logits
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max() < (without - ours).abs().max()
    back = read_peft(tmp_path / "adapter")
    assert (back.rank, back.scale) == (adapters[name].rank, 0.75)
    for place, pair in adapters[name].factors.items():
        assert all(torch.equal(mine, read) for mine, read in zip(pair, back.factors[place], strict=True))


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    model, llm = _model(tmp_path / "llm", "shared")
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_hugging_face(str(llm), torch.float32), settings).save_pretrained(str(tmp_path / "theirs"))
    adapter = read_peft(tmp_path / "theirs")
    assert is_peft(tmp_path / "theirs") and not is_peft(tmp_path)
    assert (adapter.rank, adapter.scale, len(adapter.factors)) == (2, 1.5, 2 * model.llm.config.num_hidden_layers)


def _adapter() -> PeftAdapter:
    pairs = [(torch.arange(12.0).view(3, 4), torch.arange(15.0).view(5, 3)) for _ in "qv"]
    return PeftAdapter(3, 0.5, {(0, "q"): pairs[0], (0, "v"): pairs[1]})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", ["k_proj"], r"target_modules=\['k_proj'\]; only plain LoRA"),
        ("use_dora", True, "use_dora=True"),
        ("rank_pattern", {"q_proj": 7}, "rank_pattern="),
        ("peft_type", "IA3", "no adapter of type LORA"),
        ("r", 5, r"factors of shapes \[\(3, 4\), \(5, 3\)\], but adapter_config.json says r=5"),
    ],
)
def test_what_computes_something_else_is_refused(tmp_path: Path, key: str, value: object, said: str) -> None:
    _adapter().write(tmp_path / "adapter", "llm")
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=said):
        read_peft(tmp_path / "adapter")
    with pytest.raises(UserError, match="cannot be read as an adapter of PEFT"):
        read_peft(tmp_path)


def _part(name: str, *shape: int) -> tuple[NamedPart, Tensor]:
    value = torch.zeros(shape)
    return NamedPart(name, None, value, 0, shape, Sharing(0)), value


def test_a_run_starts_from_an_adapter_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NamedPart, "whole_shape", property(lambda part: part.shape))
    _adapter().write(tmp_path / "adapter", "llm")
    terms = LowRankTerms(3, 0.5, "a_random", ("shared", "task"), (View("asr", 4, None),))
    (a, value), (other, untouched) = _part("llm_lora.0.q.shared.a", 3, 4), _part("llm_lora.0.q.asr.a", 3, 4)
    start_from_peft(tmp_path / "adapter", terms, [a, other])
    assert torch.equal(value, torch.arange(12.0).view(3, 4)) and not untouched.any()
    with pytest.raises(UserError, match=r"set llm.lora=\{rank: 3, scale: 0.5, terms: \[shared\]\}"):
        start_from_peft(tmp_path / "adapter", None, [])
    with pytest.raises(UserError, match=r"has rank 3 and scale 0\.5, the run's term rank 2 and scale 0.5"):
        start_from_peft(tmp_path / "adapter", LowRankTerms(2, 0.5, "a_random", ("shared",), terms.views), [])
    with pytest.raises(UserError, match=r"has shape \[5, 3\] for llm_lora.0.v.shared.b, which has shape \[6, 3\]"):
        start_from_peft(tmp_path / "adapter", terms, [_part("llm_lora.0.v.shared.b", 6, 3)[0]])
    with pytest.raises(UserError, match=r"has nothing for llm_lora\.1.q.shared.a"):
        start_from_peft(tmp_path / "adapter", terms, [_part("llm_lora.1.q.shared.a", 3, 4)[0]])
