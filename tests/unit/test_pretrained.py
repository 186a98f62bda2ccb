"""Exports as models of transformers: loaded by its auto classes, saved again the same, sent to a hub and fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from mome_dist import transcribe
from mome_dist.checkpoint.adapter import CARD, CONFIG, FIRST, FIRST_WEIGHTS, INDEX, SUMS, WEIGHTS
from mome_dist.commands import export as command
from mome_dist.config.schema import LLMLoRAConfig, MixtureConfig, RunConfig
from mome_dist.data.corpus import Corpus
from mome_dist.data.media import write_media_file
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.export.pretrained import MoMESpeechModel
from mome_dist.export.pretrained_config import MoMESpeechConfig
from mome_dist.extras import EXTRA_OF
from mome_dist.inference.load import LoadedRun, load_run
from mome_dist.speech.sequence import pack
from mome_dist.speech.views import View
from tests.evaluation_run import WIDTHS, make_run
from tests.hub_server import files_of, serving, use_hub
from tests.without_packages import python_without

ROOT = Path(__file__).resolve().parents[2]
VIEW = View("avsr", 4, 5)


def _of_other_methods(config: RunConfig) -> None:
    """Low-rank terms and projectors with a router, in the place of experts."""
    config.mome.placement = "none"
    config.llm.lora = LLMLoRAConfig(rank=4, terms=["shared", "task"])
    config.projector.mixture = MixtureConfig(form="dejr", experts=3, top_k=2)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    """An export without experts. Do not change files in it."""
    folder = tmp_path_factory.mktemp("adapted")
    export_adapter(make_run(folder / "made", tiny_corpus_dir, change=_of_other_methods), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> Path:
    utterance = tiny_corpus.split("test")[0]
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media_file(path, tiny_corpus.audio(utterance), tiny_corpus.video(utterance))
    return path


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def _logits(run: LoadedRun) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    clips = {
        stream: [torch.randn(frames, WIDTHS[stream], generator=generator)]
        for stream, frames in (("audio", 60), ("video", 30))
    }
    example = run.sequences.example(VIEW, 15, 6, "place red")
    with torch.no_grad():
        return run.model.label_logits(pack([(VIEW, [example])]), clips)


_SCRIPT = """
{first}
{second}
from transformers import AutoConfig, AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
again = AutoModel.from_config(AutoConfig.from_pretrained(sys.argv[1]))
assert [*again.state_dict()] == [*model.state_dict()]
import transformers.models.auto.modeling_auto as table
assert type(table.__loader__) is type(table.__spec__.loader) is type(sys.modules["json"].__loader__)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mome_dist")]
model.save_pretrained(sys.argv[3])
said = model.transcribe(sys.argv[2], audio_rate=4, video_rate=5)
assert mome_dist.load(sys.argv[1], device="cpu").transcribe(sys.argv[2], audio_rate=4, video_rate=5) == said
print(type(model).__module__, said.text)
"""
_OURS = "import mome_dist"
_LIGHT = "assert not {'torch', 'transformers', 'megatron'} & sys.modules.keys(), 'launchers validate within a second'"


@pytest.mark.parametrize(
    "order", [[_OURS, _LIGHT], ["from transformers import AutoModel", _OURS]], ids=["before", "after"]
)
def test_import_mome_dist_is_all_that_transformers_needs(
    order: list[str], exported: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both orders, without a network, with the text of the command, and without Megatron-Core, DeepSpeed and all
    else that the extra ``infer`` does not bring."""
    absent = {package for package, extra in EXTRA_OF.items() if extra != "infer"} | {"scipy", "peft", "triton"}
    assert {"megatron", "deepspeed"} < absent
    script = _SCRIPT.format(first=order[0], second=order[1])
    done = python_without(absent, script, exported, clip, tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert transcribe.main([str(exported), str(clip), "--audio-rate", "4", "--video-rate", "5"]) == 0
    text = capsys.readouterr().out.strip()
    assert text and done.stdout.strip() == f"mome_dist.export.pretrained {text}"
    assert files_of(tmp_path / "copy") == files_of(exported)


def test_it_is_the_model_of_the_commands_and_is_saved_the_same(exported: Path, tmp_path: Path) -> None:
    expected, config = load_run(exported), json.loads((exported / CONFIG).read_text())
    assert (config["model_type"], config["architectures"]) == ("mome_dist", ["MoMESpeechModel"])
    for loader in (AutoModel, MoMESpeechModel):
        model = loader.from_pretrained(exported)
        assert type(model) is MoMESpeechModel and not model.training and not model.speech_lm.training
        assert torch.equal(_logits(model.run), _logits(expected))
        weights = load_file(exported / WEIGHTS)
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        model.save_pretrained(tmp_path / loader.__name__)
        assert files_of(tmp_path / loader.__name__) == files_of(exported)
    assert model.train().speech_lm.training and not model.speech_lm.llm.training
    subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "AutoModel", check=True, capture_output=True
    )


def test_weights_above_the_limit_are_cut_and_found_again(exported: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    (tmp_path / "cut").mkdir()
    model.save_pretrained(tmp_path / "cut", max_shard_size="10KB")
    names = {path.name for path in (tmp_path / "cut").iterdir()} - {CONFIG, CARD, SUMS}
    index = json.loads((tmp_path / "cut" / INDEX).read_text())["weight_map"]
    assert names == {INDEX, *index.values()} and len(names) > 3 and index.keys() == model.state_dict().keys()
    again = AutoModel.from_pretrained(tmp_path / "cut")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again.save_pretrained(tmp_path / "whole")
    assert files_of(tmp_path / "whole") == files_of(exported)
    assert torch.equal(_logits(load_run(tmp_path / "cut")), _logits(model.run))
    shard = tmp_path / "cut" / sorted(index.values())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=re.escape(shard.name)):
        AutoModel.from_pretrained(tmp_path / "cut")


def test_what_was_changed_says_so(exported: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "changed")
    again = AutoModel.from_pretrained(tmp_path / "changed")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert "changed in Python" in (tmp_path / "changed" / CARD).read_text()
    assert again.config.source["content"] != model.config.source["content"]
    assert again.config.source["checkpoint"] == model.config.source["checkpoint"]


@pytest.fixture
def old(copied: Path) -> Path:
    """An export as they were before transformers knew them."""
    (copied / WEIGHTS).rename(copied / FIRST_WEIGHTS)
    document = json.loads((copied / CONFIG).read_text())
    facts = {"file": FIRST_WEIGHTS, **document.pop("weights")[WEIGHTS]}
    document = {**{key: document[key] for key in document.keys() - {"architectures", "model_type"}}, "format": FIRST}
    (copied / CONFIG).write_text(json.dumps({**document, "weights": facts}))
    card = (copied / CARD).read_text()
    (copied / CARD).write_text(re.sub(r"(?s)## Use\n.*?(?=## )", "## Use\n\nload_adapter\n\n", card))
    sums = subprocess.run(["sha256sum", CARD, FIRST_WEIGHTS, CONFIG], cwd=copied, check=True, capture_output=True)
    (copied / SUMS).write_bytes(sums.stdout)
    return copied


def test_old_exports_are_read_and_written_anew(old: Path, exported: Path, tmp_path: Path) -> None:
    expected = _logits(load_run(exported))
    assert torch.equal(_logits(load_run(old)), expected)
    model = MoMESpeechModel.from_pretrained(old)
    assert torch.equal(_logits(model.run), expected)
    assert command.main([str(old), str(tmp_path / "new")]) == 0
    assert torch.equal(_logits(AutoModel.from_pretrained(tmp_path / "new").run), expected)
    new, whole = files_of(tmp_path / "new"), files_of(exported)
    assert all(new[name] == whole[name] for name in (WEIGHTS, CARD))
    model.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved")[WEIGHTS] == whole[WEIGHTS]
    assert torch.equal(_logits(AutoModel.from_pretrained(tmp_path / "saved").run), expected)


def test_frozen_models_elsewhere(tiny_corpus_dir: Path, tmp_path: Path, clip: Path) -> None:
    export_adapter(make_run(tmp_path / "here", tiny_corpus_dir), tmp_path / "exported")
    said = AutoModel.from_pretrained(tmp_path / "exported").transcribe(clip, audio_rate=4, video_rate=5)
    shutil.move(tmp_path / "here", tmp_path / "there")
    with pytest.raises(UserError, match=r"^llm: .*/here/llm does not exist; name its directory .*llm_path=DIR\)\.$"):
        AutoModel.from_pretrained(tmp_path / "exported")
    folders = {"llm_path": "llm", "audio_encoder_path": "whisper", "video_encoder_path": "lips"}
    moved = AutoModel.from_pretrained(
        tmp_path / "exported", **{key: tmp_path / "there" / folder for key, folder in folders.items()}
    )
    assert moved.transcribe(clip, audio_rate=4, video_rate=5) == said and said.tokens
    moved.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "exported")


def test_decoding_may_be_set_and_precision_chosen(exported: Path, clip: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    assert isinstance(config, MoMESpeechConfig)
    config.config["decoding"]["max_new_tokens"] = 1
    model = AutoModel.from_pretrained(exported, config=config, dtype=torch.bfloat16)
    assert model.speech_lm.llm.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert len(model.transcribe(clip, audio_rate=4, num_beams=2).token_ids) <= 1
    assert model.to("meta").speech_lm.llm.device.type == "meta"


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda path: AutoModel.from_pretrained(path, lm_path="x"), r"from_pretrained\(lm_path=\.\.\.\): .* llm_path"),
        (lambda path: AutoModel.from_pretrained(path, llm="x"), r"^llm='x' is not what config\.json .*llm_path"),
        (lambda path: AutoModel.from_pretrained(path, dtype=torch.float16), "float32 or bfloat16"),
        (lambda path: AutoModel.from_pretrained(path, device_map="attic"), "device_map='attic'"),
        (lambda path: MoMESpeechModel.from_pretrained(path / "none"), "is no directory, and no OWNER/NAME"),
        (lambda path: AutoModel.from_pretrained(path).save_pretrained(path), "an export replaces nothing"),
        (
            lambda path: AutoModel.from_pretrained(path).save_pretrained(path / "new", state=1),
            r"save_pretrained\(state=",
        ),
        (
            lambda path: AutoModel.from_pretrained(path).save_pretrained(path / "new", max_shard_size="big"),
            "max_shard_size='big'",
        ),
        (lambda path: AutoModel.from_pretrained(path).transcribe("clip.mp4"), "no rate is given"),
    ],
)
def test_mistakes(load: Callable[[Path], Any], said: str, exported: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(exported)
    assert not (exported / "new").exists()


def test_it_goes_to_the_hub_and_back(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path
) -> None:
    name = "owner/small-adapter"
    with serving(tmp_path / "uploaded") as hub:
        use_hub(hub.address, tmp_path / "home", monkeypatch)
        model = AutoModel.from_pretrained(adapted)
        model.push_to_hub(name, max_shard_size="10KB", commit_message="In pieces", tags=["lips"])
        cut = hub.repositories[name].refs["main"]
        pieces = hub.repositories[name].commits[cut]
        assert "model-00001-of" in " ".join(files_of(pieces)) and "- lips\n" in (pieces / CARD).read_text()
        commit = model.push_to_hub(name)
        assert hub.repositories[name].refs["main"] == commit.oid
        sent = hub.repositories[name].commits[commit.oid]
        assert files_of(sent) == files_of(adapted), "and nothing of the older commit is left"
        assert {path.name for path in (sent / "peft").iterdir()} == {"shared+asr", "shared+vsr", "shared+avsr"}
        # Its publisher gives the adapter a licence on its page.
        (sent / CARD).write_text((sent / CARD).read_text().replace("license: unknown", "license: mit"))
        for loader, revision in (
            (AutoModel, "main"),
            (AutoModel, commit.oid),
            (MoMESpeechModel, None),
            (AutoModel, cut),
        ):
            fetched = loader.from_pretrained(name, revision=revision)
            assert torch.equal(_logits(fetched.run), _logits(model.run))
        asked = len(hub.asked)
        assert MoMESpeechModel.from_pretrained(name, local_files_only=True).config.step == model.config.step
        assert len(hub.asked) == asked
        with pytest.raises(UserError, match=r"shows this user no model owner/other"):
            MoMESpeechModel.from_pretrained("owner/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert AutoModel.from_pretrained(name).transcribe(clip, audio_rate=4) == model.transcribe(clip, audio_rate=4)


def test_the_documented_code(exported: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(exported, tmp_path / "exports/quickstart")
    shutil.copy(clip, tmp_path / "CLIP.mp4")
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "uploaded") as hub:
        use_hub(hub.address, tmp_path / "home", monkeypatch)
        names: dict[str, Any] = {}
        exec(code, names)
        (uploaded,) = hub.repositories.values()
        assert files_of(uploaded.commits[uploaded.refs["main"]]) == files_of(exported)
    assert files_of(tmp_path / "exports/copy") == files_of(exported)
    assert names["said"].tokens
