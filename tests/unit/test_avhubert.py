"""AV-HuBERT: its arithmetic against plain torch modules, independence from neighbours, sizes, saving, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mome_dist
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import load_run
from mome_dist.speech.avhubert import AVHubertConfig, AVHubertEncoder, front_end
from mome_dist.speech.avhubert.conversion import convert
from mome_dist.speech.video_encoder import VideoEncoder
from mome_dist.speech.video_encoders import load_video_encoder
from tests.avhubert_checkpoint import Published, small
from tests.evaluation_run import WIDTHS, make_run


def clips(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n, 96, 96), generator=generator, dtype=torch.uint8) for n in lengths]


def converted(published: Published) -> AVHubertEncoder:
    settings = {"encoder_attention_heads": published.heads, "layer_norm_first": True}
    return convert(published.state_dict(), settings).encoder


@pytest.fixture(scope="module")
def encoder() -> AVHubertEncoder:
    return converted(small())


def test_forward_is_that_of_the_published_composition(encoder: AVHubertEncoder) -> None:
    (clip,) = clips(11)
    published = small()
    with torch.no_grad():
        expected = published((clip[:, 4:92, 4:92] / 255 - 0.421) / 0.165)
        (features,) = encoder([clip])
    assert features.shape == (11, 32)  # one vector a frame: 25 a second
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1, "a constant output would compare nothing"


def test_a_clip_does_not_depend_on_its_batch(encoder: AVHubertEncoder) -> None:
    batch = clips(7, 1, 30, 12)
    with torch.no_grad():
        for clip, features in zip(batch, encoder(batch), strict=True):
            torch.testing.assert_close(features, encoder([clip])[0], rtol=0, atol=1e-5)


def test_frames_in_parts_are_the_same(encoder: AVHubertEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        whole = encoder(clips(9, 5))
        monkeypatch.setattr(front_end, "FRAMES_AT_ONCE", 4)
        for ours, theirs in zip(encoder(clips(9, 5)), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        (AVHubertConfig(), 103),
        (AVHubertConfig(width=1024, layers=24, heads=16, ffn_width=4096), 325),
    ],
)
def test_sizes_of_the_paper(shape: AVHubertConfig, millions: int) -> None:
    """103M and 325M parameters (Shi et al. 2022), 1 % of which are the audio projection and the head."""
    with torch.device("meta"):
        encoder = AVHubertEncoder(shape)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)


def test_saved_encoder_is_found_by_its_format(encoder: AVHubertEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "any-name")
    VideoEncoder().save_pretrained(tmp_path / "other")
    loaded = load_video_encoder(tmp_path / "any-name")
    assert isinstance(loaded, AVHubertEncoder) and loaded.config == encoder.config
    assert isinstance(load_video_encoder(tmp_path / "other"), VideoEncoder)
    with torch.no_grad():
        assert torch.equal(loaded(clips(4))[0], encoder(clips(4))[0])
    assert not loaded.train().training and loaded.trainable_parameters() == {}


def test_unfrozen_it_trains(encoder: AVHubertEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    model = AVHubertEncoder.from_pretrained(tmp_path, frozen=False).train()
    model(clips(3, 2))[0].square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.training and missing == []


def test_a_run_with_it_exports_and_transcribes(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    shape = AVHubertConfig(trunk_widths=(4, 8), width=WIDTHS["video"], layers=1, heads=2, ffn_width=32)
    run = make_run(tmp_path, tiny_corpus_dir, AVHubertEncoder(shape))
    export_adapter(run, tmp_path / "export")
    (tmp_path / "lips").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="video_encoder"):
        load_run(tmp_path / "export")
    exported, trained = (
        mome_dist.load(place, video_encoder=tmp_path / "moved") for place in (tmp_path / "export", run)
    )
    assert isinstance(exported.run.encoders()["video"], AVHubertEncoder)
    (video,) = clips(20)
    said = exported.transcribe(video, video_rate=2)
    assert said == trained.transcribe(video, video_rate=2) and said.tokens


def test_mistakes_are_named(encoder: AVHubertEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_video_encoder(tmp_path)
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": "other/1"}))
    with pytest.raises(UserError, match=r"'other/1'.*mome_dist\.avhubert/1"):
        load_video_encoder(tmp_path)
    config["encoder"]["layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_video_encoder(tmp_path)
    with pytest.raises(UserError, match="uint8"):
        encoder([torch.zeros(3, 96, 96)])
    with pytest.raises(UserError, match="multiple of heads=5"):
        AVHubertConfig(heads=5)
