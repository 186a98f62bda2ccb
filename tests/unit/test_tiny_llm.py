"""The tiny LLM: its tokenizer, its shape, and the task that it is pre-trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mome_dist.llm import tiny
from mome_dist.parallel.plain_world import World
from mome_dist.training.copy_pretraining import CopySettings, CopyTask, CopyTrainer

TEXTS = ["fetch golden basket", "carry pink rope", "don't wash feathers"]


def test_tokenizer_round_trip_after_saving(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(TEXTS)
    model = tiny.tiny_llama(tokenizer, hidden=32, layers=1, ffn_width=64)
    tiny.save_llm(model, tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        ids = loaded(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split())
        assert loaded.decode(ids) == text
    assert loaded("Carry  PINK rope").input_ids == loaded("carry pink rope").input_ids
    for token in tiny.SPECIAL_TOKENS:
        assert len(loaded(token, add_special_tokens=False).input_ids) == 1
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert loaded.decode([loaded.bos_token_id, *ids, loaded.eos_token_id], skip_special_tokens=True) == TEXTS[-1]
    for prompt in tiny.PROMPTS.values():
        assert loaded.unk_token_id not in loaded(prompt).input_ids
    assert loaded("zebra").input_ids == [loaded.unk_token_id]


def test_saved_model_is_a_plain_llama(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(TEXTS)
    model = tiny.tiny_llama(tokenizer, hidden=32, layers=2, ffn_width=64).eval()
    tiny.save_llm(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([[1, 12, 13]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert loaded.config.vocab_size % 64 == 0
    assert loaded.config.num_key_value_heads == 2


def test_default_size_is_about_five_million() -> None:
    model = tiny.tiny_llama(tiny.word_tokenizer(TEXTS))
    assert 4.2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5.0e6


def test_rows_have_the_form_of_the_real_sequences() -> None:
    tokenizer = tiny.word_tokenizer(TEXTS)
    task = CopyTask(tokenizer, TEXTS, held_out=["carry golden rope"])
    openings = set()
    for i in range(300):
        ids, start = task.row((0, i))
        assert (ids, start) == task.row((0, i))
        prefix, label = tokenizer.decode(ids[:start]).split(), tokenizer.decode(ids[start:]).split()
        assert prefix[0] == "<bos>" and label[-1] == "<eos>" and len(label) == 4
        sentence = " ".join(label[:-1])
        assert sentence != "carry golden rope"
        assert all(word in {text.split()[place] for text in TEXTS} for place, word in enumerate(label[:-1]))
        openings.add((prefix[1], "<audio>" in prefix, "<video>" in prefix))
        closing = "</video>" if "<video>" in prefix else "</audio>"
        prompt = prefix[prefix.index(closing) + 1 :]
        assert prompt[0] == "transcribe" and prompt[-1] == "."
        assert ("speech" in prompt, "video" in prompt) == ("<audio>" in prefix, "<video>" in prefix)
    assert openings == {("<audio>", True, False), ("<video>", False, True), ("<audio>", True, True)}


def test_pretraining_learns_to_copy() -> None:
    """A minute model in seconds: far above a guess between three words at each place."""
    tokenizer = tiny.word_tokenizer(TEXTS)
    model = tiny.tiny_llama(tokenizer, hidden=64, layers=2, heads=2, kv_heads=1, ffn_width=128)
    task = CopyTask(tokenizer, TEXTS)
    trainer = CopyTrainer(model, task, CopySettings(steps=120, batch_size=16, learning_rate=4e-3), World())
    before = trainer.accuracy(task, rows=64)
    trainer.train()
    after = trainer.accuracy(task, rows=64)
    assert before < 0.3
    assert after > 0.8
