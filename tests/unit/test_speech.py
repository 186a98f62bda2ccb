"""Views, compression, projectors and token sequences against hand-made cases and the paper's counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from mome_dist.errors import UserError
from mome_dist.speech.matryoshka import audio_frames, compress, compressed_length, sequence_length
from mome_dist.speech.projector import Projectors
from mome_dist.speech.sequence import AUDIO, VIDEO, SequenceBuilder, TextCodec, pack
from mome_dist.speech.views import View, all_views

TAGS = {"audio_open": "<audio>", "audio_close": "</audio>", "video_open": "<video>", "video_close": "</video>"}


@pytest.fixture()
def codec(tmp_path: Path) -> TextCodec:
    words = ["<pad>", "<bos>", "<eos>", *TAGS.values(), "listen", "watch", "red", "blue", "ball"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:7])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
    return TextCodec(tmp_path, TAGS)


@pytest.mark.parametrize(
    ("audio", "video", "tokens"), [(1, 1, 757), (4, 2, 257), (4, 5, 182), (16, 2, 163), (16, 5, 88)]
)
def test_published_sequence_lengths(audio: int, video: int, tokens: int) -> None:
    assert sequence_length(10, audio, video) == tokens


def test_audio_frames_are_fifty_a_second_and_at_least_half_a_second() -> None:
    assert [audio_frames(s) for s in (160_000, 16_000, 16_319, 7_999, 100)] == [500, 50, 50, 25, 25]


@pytest.mark.parametrize("method", ["pool", "stack"])
@pytest.mark.parametrize(("frames", "rate"), [(10, 1), (10, 3), (10, 5), (3, 5), (1, 16)])
def test_compression_agrees_with_its_length(method: str, frames: int, rate: int) -> None:
    features = torch.randn(frames, 4, generator=torch.Generator().manual_seed(0))
    tokens = compress(features, [frames], rate, method)
    assert tokens.shape == (compressed_length(frames, rate), 4 * rate if method == "stack" else 4)
    first = features[: min(rate, frames)]
    expected = first.mean(0) if method == "pool" else nn.functional.pad(first, (0, 0, 0, rate - len(first))).flatten()
    torch.testing.assert_close(tokens[0], expected)


def test_every_view_of_the_paper() -> None:
    views = all_views(["avsr", "asr"], [4, 8], [1], [4, 16], [2, 5])
    assert [str(view) for view in views] == [
        "asr(4)",
        "asr(8)",
        "avsr(4,2)",
        "avsr(4,5)",
        "avsr(16,2)",
        "avsr(16,5)",
    ]


def test_projector_is_two_layers_and_a_norm_and_treats_clips_apart() -> None:
    projectors = Projectors({"audio": 6, "video": 5}, {"audio": [2, 4], "video": [1]}, 8, 16, False, "pool")
    projectors.initialize(0, embedding_scale=0.3)
    # Of a size beside which the norm's epsilon is nothing: it makes the deviation smaller by epsilon / (2 variance).
    generator = torch.Generator().manual_seed(0)
    clips = [10 * torch.randn(length, 6, generator=generator) for length in (9, 4)]
    output = projectors("audio", clips, 4)
    assert output.shape == (2 + 1, 8) and output.dtype is torch.float32
    torch.testing.assert_close(output[2:], projectors("audio", clips[1:], 4))
    torch.testing.assert_close(output.std(-1, correction=0), torch.full((3,), 0.3), rtol=1e-3, atol=0)
    layers = list(projectors.get_submodule("streams.audio.all").children())
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.LayerNorm]


def test_one_projector_a_rate() -> None:
    projectors = Projectors({"audio": 6}, {"audio": [2, 4]}, 8, 16, True, "stack")
    projectors.initialize(0, 1.0)
    assert projectors("audio", [torch.randn(9, 6)], 4).shape == (2, 8)
    assert projectors.supports("audio", 2) and not projectors.supports("audio", 3)


def test_sequence_of_every_task(codec: TextCodec) -> None:
    builder = SequenceBuilder(codec, {"asr": "listen", "vsr": "watch", "avsr": "listen watch"})
    tags, [listen, watch] = codec.tags, codec.encode("listen watch")
    audio = [tags["audio_open"], AUDIO, AUDIO, tags["audio_close"]]
    video = [tags["video_open"], VIDEO, tags["video_close"]]
    assert builder.prefix(View("asr", 4, None), 2, 0) == [codec.bos, *audio, listen]
    assert builder.prefix(View("vsr", None, 2), 0, 1) == [codec.bos, *video, watch]
    assert builder.prefix(View("avsr", 4, 2), 2, 1) == [codec.bos, *audio, *video, listen, watch]
    view = View("avsr", 4, 2)
    assert len(builder.prefix(view, 125, 125)) == sequence_length(10, 4, 2, overhead=builder.overhead(view))


def test_an_llm_without_a_start_token_gets_none(codec: TextCodec, tmp_path: Path) -> None:
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    without = TextCodec(tmp_path, TAGS)
    view = View("asr", 4, None)
    prefixes = [SequenceBuilder(each, {"asr": "listen"}).prefix(view, 2, 0) for each in (codec, without)]
    assert without.bos is None and prefixes[0] == [codec.bos, *prefixes[1]]


def test_labels_are_text_and_end_only_and_a_dead_token_is_never_one(codec: TextCodec) -> None:
    builder = SequenceBuilder(codec, {"asr": "listen"})
    view = View("asr", 4, None)
    batch = pack([(view, [builder.example(view, 3, 0, "red ball"), builder.example(view, 1, 0, "blue")])])
    red, ball = codec.encode("red ball")
    assert batch.labels.ids_L.tolist() == [red, ball, codec.eos, *codec.encode("blue"), codec.eos]
    assert batch.context.lengths == (9, 6) and batch.ids_N.shape == (16,)
    assert batch.context.alive_N is not None and batch.context.alive_N.tolist() == [True] * 15 + [False]
    # The position that predicts a text token holds the token before it.
    before = batch.ids_N[batch.labels.index_L].tolist()
    assert before == [*codec.encode("listen red ball"), *codec.encode("listen blue")]
    assert batch.context.alive_N[batch.labels.index_L].all()
    (audio,) = batch.speech
    assert (audio.stream, audio.rate) == ("audio", 4) and audio.index_T.tolist() == [2, 3, 4, 9 + 2]


def test_decoding_stops_at_the_end_token(codec: TextCodec) -> None:
    ids = codec.encode("red ball")
    assert codec.decode([*ids, codec.eos, *codec.encode("blue")]) == "red ball"


def test_a_tag_that_is_not_one_token_is_named(codec: TextCodec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llm.tags.audio_open='<nothing>'"):
        TextCodec(tmp_path, {**TAGS, "audio_open": "<nothing>"})
