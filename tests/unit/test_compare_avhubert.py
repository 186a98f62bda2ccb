"""The comparison with the public classes, as far as it goes without them (docs/avhubert.md)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mome_dist.errors import UserError
from mome_dist.speech.avhubert.conversion import convert
from tests.avhubert_checkpoint import small
from tools import compare_avhubert
from tools.compare_avhubert import main, our_features, public_features, random_clips, relative_differences

SETTINGS = {"encoder_attention_heads": 4, "layer_norm_first": True}


def test_equal_encoders_have_no_difference_and_a_planted_one_is_measured() -> None:
    state, clips = small().state_dict(), random_clips([1, 7])
    ours = our_features(convert(state, SETTINGS).encoder, clips)
    again = our_features(convert(state, SETTINGS).encoder, clips)
    assert {name: value.shape for name, value in ours.items()} == {"1": (1, 32), "7": (7, 32)}
    assert relative_differences(ours, again) == {"1": 0.0, "7": 0.0}
    largest = np.abs(again["7"]).max()
    again["7"][3, 5] = ours["7"][3, 5] + 0.25 * largest
    largest = np.abs(again["7"]).max()
    assert relative_differences(ours, again)["7"] == pytest.approx(
        abs(float(again["7"][3, 5] - ours["7"][3, 5])) / float(largest), rel=1e-6
    )
    again["1"][0, 0] = np.nan
    assert relative_differences(ours, again)["1"] == float("inf")
    with pytest.raises(UserError, match="features have shapes"):
        relative_differences(ours, {"1": ours["1"]})


def test_the_exit_code_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against our own encoder in place of the public one, equal and with a planted difference."""
    published = small()
    torch.save({"model": published.state_dict(), "cfg": {"model": SETTINGS}}, tmp_path / "it.pt")
    (tmp_path / "public" / "avhubert").mkdir(parents=True)
    (tmp_path / "public" / "avhubert" / "hubert.py").touch()
    encoder = convert(published.state_dict(), SETTINGS).encoder
    arguments = [str(tmp_path / "it.pt"), "--public", str(tmp_path / "public"), "--lengths", "2", "5"]
    for error, code in ((0.0, 0), (0.01, 1)):
        monkeypatch.setattr(
            compare_avhubert,
            "public_features",
            lambda *given, error=error: {k: v * (1 + error) for k, v in our_features(encoder, given[-1]).items()},
        )
        assert main(arguments) == code
        assert capsys.readouterr().out.count("above the bound") == 2 * code


def test_a_folder_without_the_public_code_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["it.pt", "--public", str(tmp_path)]) == 2
    assert "has no avhubert/hubert.py: clone https://github.com/facebookresearch/av_hubert" in capsys.readouterr().err
    (tmp_path / "avhubert").mkdir()
    (tmp_path / "avhubert" / "utils.py").touch()
    with pytest.raises(UserError, match=r"public code in .* does not run with .* \(\w+Error: .*--python"):
        public_features(tmp_path, sys.executable, tmp_path / "it.pt", random_clips([1]))
    with pytest.raises(UserError, match=r"--python nothing cannot be started"):
        public_features(tmp_path, "nothing", tmp_path / "it.pt", random_clips([1]))
