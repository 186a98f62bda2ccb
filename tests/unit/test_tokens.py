"""A tokenizer and a model that do not fit each other end before anything starts, with one message."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mome_dist.assets import asset_dir
from mome_dist.data.corpus import Corpus
from mome_dist.errors import UserError
from mome_dist.llm.tiny import EOS, PAD, save_llm, tiny_llama, word_tokenizer
from mome_dist.llm.tokens import TokenTable
from mome_dist.preflight import validate_overrides
from mome_dist.speech.sequence import TextCodec
from mome_dist.speech.video_encoder import VideoEncoder
from tests.tiny_llms import edit_config

TAGS = {"audio_open": "<audio>", "audio_close": "</audio>", "video_open": "<video>", "video_close": "</video>"}
Change = Callable[[Path], object]


def words() -> list[str]:
    """A vocabulary of 64 tokens: as many as the model below has rows, so that every further one is too many."""
    known = word_tokenizer(["one"]).get_vocab()
    return [f"word{number}" for number in range(64 - len(known))] + ["one"]


@pytest.fixture()
def llm(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer([" ".join(words()[1:])])
    assert len(tokenizer) == 63
    model = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, kv_heads=1, ffn_width=16)
    save_llm(model, tokenizer, tmp_path / "llm")
    return tmp_path / "llm"


def edit(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**document, **values}))


def grow(directory: Path, *tokens: str) -> None:
    """Add tokens to the tokenizer, and no row to the model."""
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([*tokens])
    tokenizer.save(path)


def decoder(directory: Path) -> None:
    """As AutoTokenizer adds a token that tokenizer.json lacks."""
    added = {"64": {"content": "<late>", "special": True}}
    edit(directory, "tokenizer_config.json", added_tokens_decoder=added)


def template(directory: Path) -> None:
    """An id that only the post-processor knows."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="[X] $A", special_tokens=[("[X]", 70)])
    tokenizer.save(str(directory / "tokenizer.json"))


WRONG: dict[str, tuple[Change, str]] = {
    "added tokens": (
        lambda llm: grow(llm, "<new>", "<newer>"),
        r"gives '<newer>' the id 64, but the model has 64 embeddings \(vocab_size in config.json\): use the tokenizer "
        r"that belongs to these weights, or .*resize_token_embeddings",
    ),
    "a smaller model": (
        lambda llm: edit_config(llm, vocab_size=60),
        r"the id 62, .* 60 .*\(3 tokens are beyond them\)",
    ),
    "added tokens of transformers": (decoder, r"gives '<late>' the id 64"),
    "a pad token that no file has": (
        lambda llm: edit(llm, "tokenizer_config.json", pad_token="[PAD]", extra_special_tokens=["<a>"]),
        r"gives '<a>' the id 64",
    ),
    "a template": (template, r"gives '\[X\]' the id 70"),
    "no end": (lambda llm: edit(llm, "tokenizer_config.json", eos_token=None), r"tokenizer_config.json names no eos_"),
    "another end": (
        lambda llm: edit(llm, "tokenizer_config.json", eos_token="<sep>"),
        r"eos_token of .*tokenizer_config.json has id 4, but config.json and generation_config.json give "
        r"eos_token_id=2: use the tokenizer that belongs to these weights, or correct eos_token",
    ),
    "another start": (lambda llm: edit(llm, "tokenizer_config.json", bos_token="<sep>"), r"bos_token .* id 4.*_id=1:"),
    "no tokenizer": (lambda llm: (llm / "tokenizer.json").unlink(), r"has no tokenizer.json; fetch it"),
    "no JSON": (lambda llm: (llm / "tokenizer.json").write_text("{"), r"tokenizer.json cannot be read"),
    "no vocabulary": (lambda llm: edit(llm, "tokenizer.json", model={}), r"tokenizer.json is no tokenizer of"),
    "a list": (lambda llm: (llm / "tokenizer_config.json").write_text("[]"), r"tokenizer_config.json holds no JSON ob"),
    "no text": (lambda llm: edit(llm, "tokenizer_config.json", eos_token={"id": 3}), r"names tokens in no known form"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_tokenizer_of_another_model_is_named(llm: Path, change: Change, message: str) -> None:
    TextCodec(llm, TAGS)
    change(llm)
    for read in (TokenTable.read, lambda directory: TextCodec(directory, TAGS)):
        with pytest.raises(UserError, match=message) as error:
            read(llm)
        assert str(llm) in str(error.value) and "\n" not in str(error.value)


def test_what_real_models_do_is_accepted(llm: Path) -> None:
    """More rows than tokens, several end tokens, a start token that only the model names, padding with the end."""
    grow(llm, "<new>")
    edit(llm, "config.json", eos_token_id=9)  # Llama 3 Instruct's first config.json: the others stood elsewhere
    edit(llm, "generation_config.json", eos_token_id=[9, 2])
    edit(llm, "tokenizer_config.json", pad_token=EOS, eos_token={"content": EOS, "special": True})
    table = TokenTable.read(llm)
    assert (table.bos, table.eos, table.ids["<new>"], table.ids[PAD]) == (1, 2, 63, 0)
    edit(llm, "tokenizer_config.json", bos_token=None)  # Qwen2
    assert TokenTable.read(llm).bos is None
    (llm / "generation_config.json").unlink()
    edit(llm, "config.json", eos_token_id=None)
    assert TokenTable.read(llm).eos == 2
    (llm / "tokenizer_config.json").rename(llm / "special_tokens_map.json")  # older directories
    assert TokenTable.read(llm).eos == 2


def test_ids_are_those_of_transformers(llm: Path) -> None:
    grow(llm, "<new>")
    for directory in (llm, asset_dir("smollm2-135m")):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        table = TokenTable.read(directory)
        assert table.ids == theirs.get_vocab()
        assert (table.bos, table.eos) == (theirs.bos_token_id, theirs.eos_token_id)


TAG_CASES = [
    ({"audio_open": "<nothing>"}, r"llm.tags.audio_open='<nothing>' is not one token"),
    ({"audio_close": "<eos>"}, r"llm.tags.audio_close='<eos>' is the eos_token .* \(id 2\): name an unused token"),
    ({"video_open": "<bos>"}, r"llm.tags.video_open='<bos>' is the bos_token"),
    ({"video_open": "<audio>"}, r"llm.tags.audio_open and llm.tags.video_open are both '<audio>'"),
    ({"video_close": "<video>"}, r"llm.tags.video_open and llm.tags.video_close are both '<video>'"),
]


@pytest.mark.parametrize(("tags", "message"), TAG_CASES)
def test_tags_that_tell_nothing_are_named(llm: Path, tags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenTable.read(llm).check_tags({**TAGS, **tags})


def test_tags_that_close_may_be_one_token(llm: Path) -> None:
    assert TokenTable.read(llm).check_tags({**TAGS, "video_close": "</audio>"})["video_close"] == 7


PROMPTS = [
    ("  ", r"task.prompts.asr='  ' is empty"),
    ("one </audio> one", r"task.prompts.asr='one </audio> one' holds llm.tags.audio_close='</audio>': leave it out"),
    ("one Zebra", r"task.prompts.asr: the tokenizer in .* has no token for 'Zebra' in 'one Zebra'"),
]


@pytest.mark.parametrize(("prompt", "message"), PROMPTS)
def test_prompts_that_do_not_work_are_named(llm: Path, prompt: str, message: str) -> None:
    table = TokenTable.read(llm)
    table.check_prompts({"asr": "One."}, TAGS)
    with pytest.raises(UserError, match=message):
        table.check_prompts({"asr": prompt}, TAGS)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_level_without() -> Tokenizer:
    known = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"ð"})  # no byte F0: no emoji
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(known)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def characters() -> Tokenizer:
    return Tokenizer(models.BPE({char: i for i, char in enumerate("abc ")}, []))


def characters_and_unknown() -> Tokenizer:
    return Tokenizer(models.BPE({char: i for i, char in enumerate(["?", *"abc "])}, [], unk_token="?"))


def pieces() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), *((char, -1.0) for char in "abc ")], 0, False))


UNKNOWN = [
    (byte_level, "a \N{GRINNING FACE}", None),
    (byte_level_without, "a \N{GRINNING FACE} b", "\N{GRINNING FACE}"),
    (byte_level_without, "é", None),
    (byte_fallback, "a \N{GRINNING FACE}", None),
    (characters, "a cab", None),
    (characters, "a cäb", "ä"),
    (characters_and_unknown, "a cäb", "ä"),
    (pieces, "a cäb", "ä"),
]


@pytest.mark.parametrize(("make", "text", "unknown"), UNKNOWN)
def test_texts_that_cannot_be_encoded_are_found_in_every_kind_of_tokenizer(
    tmp_path: Path, make: Callable[[], Tokenizer], text: str, unknown: str | None
) -> None:
    tokenizer = make()
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("<eos>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, "tokenizer_config.json", eos_token="<eos>")
    edit(tmp_path, "config.json", vocab_size=size + 1)
    decoded = tokenizer.decode(tokenizer.encode(text).ids)
    table = TokenTable.read(tmp_path)
    if unknown is None:
        table.check_texts([("it", text)])
    else:
        assert unknown not in decoded
        with pytest.raises(UserError, match=rf"it: the tokenizer in .* has no token for {unknown!r} in {text!r}"):
            table.check_texts([("it", text)])


def overrides(llm: Path, corpus: Path, folder: Path) -> list[str]:
    VideoEncoder().save_pretrained(folder / "video")
    paths = [f"llm.path={llm}", f"data.corpus={corpus}", f"video_encoder.path={folder / 'video'}"]
    paths += [f"audio_encoder.path={asset_dir('whisper-tiny.en')}", f"output_dir={folder / 'run'}"]
    return ["experiment=tiny", *paths, "data.batch_size=8", "data.max_frames=null", "mome.routed_experts=8"]


def test_launchers_compare_them_before_they_start_anything(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    texts = [utterance.text for utterance in Corpus.open(tiny_corpus_dir).split("train")]
    texts += [utterance.text for utterance in Corpus.open(tiny_corpus_dir).split("validation")]
    tokenizer = word_tokenizer(texts)
    model = tiny_llama(tokenizer, hidden=16, layers=4, heads=4, kv_heads=2, ffn_width=16)
    save_llm(model, tokenizer, tmp_path / "llm")
    given = overrides(tmp_path / "llm", tiny_corpus_dir, tmp_path)
    validate_overrides("mome_dist.train", given, 2)
    for change, message in (
        ("llm.tags.audio_open='<eos>'", r"llm.tags.audio_open='<eos>' is the eos_token"),
        ("task.prompts.asr=Zebra.", r"task.prompts.asr: .* 'Zebra'"),
    ):
        with pytest.raises(UserError, match=message):
            validate_overrides("mome_dist.train", [*given, change], 2)
    grow(tmp_path / "llm", *(f"<{number}>" for number in range(64)))
    with pytest.raises(UserError, match=r"gives '<63>' the id \d+, but the model has \d+ embeddings"):
        validate_overrides("mome_dist.train", given, 2)


def test_texts_of_another_corpus_are_named(tiny_corpus_dir: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["one two"])
    save_llm(tiny_llama(tokenizer, hidden=16, layers=4, ffn_width=16), tokenizer, tmp_path / "llm")
    given = overrides(tmp_path / "llm", tiny_corpus_dir, tmp_path)
    first = Corpus.open(tiny_corpus_dir).split("train")[0]
    with pytest.raises(UserError, match=rf"{tiny_corpus_dir}, split 'train', utterance '{first.id}': .* no token for"):
        validate_overrides("mome_dist.train", given, 2)


def test_a_llama_3_is_read_without_torch_or_tokenizers(tmp_path: Path) -> None:
    """128,256 tokens and 280,000 merges, as Llama 3 has them."""
    names = [f"{number:x}" for number in range(128_000)]
    merges = [f"{names[number % 128_000]} {names[number // 3]}" for number in range(280_000)]
    added = [{"content": f"<|{number}|>", "id": 128_000 + number, "special": True} for number in range(256)]
    document = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {name: number for number, name in enumerate(names)}, "merges": merges},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    edit(tmp_path, "tokenizer_config.json", eos_token="<|1|>")
    edit(tmp_path, "config.json", vocab_size=128_256)
    code = (
        "import sys; from mome_dist.llm.tokens import TokenTable; print(len(TokenTable.read(sys.argv[1]).ids)); "
        "assert not {'torch', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=60)
    assert int(done.stdout) == 128_256
