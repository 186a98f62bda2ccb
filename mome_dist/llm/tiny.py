"""A Llama small enough to pre-train in a minute, with a word-level tokenizer.

It has the architecture of the large ones (grouped-query attention, SwiGLU, RMSNorm, rotary positions), so everything
that runs on it runs on Llama 3 unchanged, and its head counts divide by two for tensor parallelism. Saved, it is a
plain Hugging Face `LlamaForCausalLM` directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mome_dist.errors import UserError

PAD, BOS, EOS, UNKNOWN, SEPARATOR, BLANK = "<pad>", "<bos>", "<eos>", "<unk>", "<sep>", "<blank>"
AUDIO_OPEN, AUDIO_CLOSE, VIDEO_OPEN, VIDEO_CLOSE = "<audio>", "</audio>", "<video>", "</video>"
SPECIAL_TOKENS = (
    *(PAD, BOS, EOS, UNKNOWN, SEPARATOR, BLANK),
    *(AUDIO_OPEN, AUDIO_CLOSE, VIDEO_OPEN, VIDEO_CLOSE),
)
PROMPTS = {
    "asr": "Transcribe speech to text.",
    "vsr": "Transcribe video to text.",
    "avsr": "Transcribe speech and video to text.",
}
VOCABULARY_MULTIPLE = 64


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of ``texts`` (and of the prompts), lower-cased.

    Words are what white space separates; a full stop is a word of its own. Ids depend on the set of words only. Other
    words become ``<unk>``.

    Raises:
        UserError: there is no word at all.
    """
    model_free = Tokenizer(WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    model_free.normalizer = Lowercase()
    model_free.pre_tokenizer = PreTokenizers([WhitespaceSplit(), Split(".", "isolated")])

    def words(text: str) -> list[str]:
        pieces = model_free.pre_tokenizer.pre_tokenize_str(model_free.normalizer.normalize_str(text))
        return [piece for piece, _ in pieces]

    found = {word for text in texts for word in words(text)}
    if not found:
        raise UserError("The tiny LLM needs texts to take its words from; the corpus has none.")
    found |= {word for prompt in PROMPTS.values() for word in words(prompt)}
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(found - set(SPECIAL_TOKENS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = model_free.normalizer, model_free.pre_tokenizer
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        sep_token=SEPARATOR,
        additional_special_tokens=[BLANK, AUDIO_OPEN, AUDIO_CLOSE, VIDEO_OPEN, VIDEO_CLOSE],
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 256,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    ffn_width: int = 704,
    max_positions: int = 2048,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Return a Llama with random weights (4.5 million by default) in float32.

    The vocabulary is rounded up to a multiple of 64, so that it can be split over tensor-parallel ranks.
    """
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a plain Hugging Face directory: weights, config, generation config and tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
