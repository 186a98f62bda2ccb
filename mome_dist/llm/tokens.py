"""Whether an LLM's tokenizer and its model agree, from their JSON files alone: no weight is read, no torch is needed.

An id without a row in the embeddings is an error where one process holds them all, and a silent vector of zeros where
tensor parallelism splits them: each rank masks ids that are not its own. So no such id may ever reach a model. More
rows than tokens are fine (Qwen2.5 has 151,936 for 151,665). Files: https://huggingface.co/docs/tokenizers
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError
from mome_dist.llm.shape import unreadable

TOKENIZER, SETTINGS, OLD_SETTINGS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
MODEL, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class TokenTable:
    """The tokens of an LLM directory. Make one with `TokenTable.read`, which checks it.

    Attributes:
        directory: plain Hugging Face directory.
        ids: of every token that the tokenizer can produce.
        added: tokens that are matched verbatim anywhere in a text, such as "<|end_of_text|>".
        bos: id of the start token; None where the tokenizer has none (Qwen2).
        eos: id of the end token.
    """

    directory: Path
    ids: dict[str, int]
    added: frozenset[str]
    bos: int | None
    eos: int
    _document: dict[str, Any]

    @classmethod
    def read(cls, directory: str | Path) -> TokenTable:
        """Read the tokens of a directory and check them against its model.

        Raises:
            UserError: if a file is missing or damaged, a token has no row in the model's embeddings, there is no end
                token, or the model has another start or other end tokens.
        """
        directory = Path(directory)
        if not (directory / TOKENIZER).is_file():
            raise UserError(
                f"llm.path: {directory} has no {TOKENIZER}; fetch it, or save the tokenizer with transformers."
            )
        document, settings = _read(directory / TOKENIZER), _Settings.read(directory)
        try:
            own = {_text(token): token["id"] for token in document.get("added_tokens") or []}
            ids = _base_ids(document["model"])
            ids |= own
            surrounding = _template_ids(document.get("post_processor"))
            max(ids.values())  # numbers, and at least one
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"llm.path: {directory / TOKENIZER} is no tokenizer of the tokenizers library; fetch it again."
            ) from error
        ids |= {token: number for token, number in settings.added.items() if token not in ids}
        # transformers adds what only its own settings name behind all others.
        more = [*settings.named.values(), *settings.extra]
        new = dict.fromkeys(token for token in more if token not in ids)
        ids |= {token: number for number, token in enumerate(new, max(ids.values()) + 1)}
        check_rows(directory, ids)
        check_rows(directory, surrounding)
        eos = settings.named.get("eos_token")
        if eos is None:
            raise UserError(f"llm.path: {directory / SETTINGS} names no eos_token; fetch it again, or name one.")
        bos = settings.named.get("bos_token")
        added = frozenset([*own, *settings.added, *more])
        table = cls(directory, ids, added, None if bos is None else ids[bos], ids[eos], document)
        table._check_ends()
        return table

    def check_tags(self, tags: Mapping[str, str]) -> dict[str, int]:
        """The ids of the tags around speech, by their names in ``llm.tags``.

        Tags that close may be the same token; one that opens tells the model what follows, so no other tag is it.

        Raises:
            UserError: if a tag is not one token, ends or starts a sequence, or opens and is not unique.
        """
        for name, text in tags.items():
            if text not in self.ids:
                raise UserError(
                    f"llm.tags.{name}={text!r} is not one token of the tokenizer in {self.directory}: name an unused "
                    "one, such as a reserved special token."
                )
            for role, number in (("bos_token", self.bos), ("eos_token", self.eos)):
                if self.ids[text] == number:
                    raise UserError(
                        f"llm.tags.{name}={text!r} is the {role} of the tokenizer in {self.directory} (id {number}): "
                        "name an unused token."
                    )
            twins = [other for other in tags if other != name and tags[other] == text and name.endswith("_open")]
            if twins:
                raise UserError(
                    f"llm.tags.{name} and llm.tags.{twins[0]} are both {text!r}: name another token for one, so that "
                    "it tells which stream begins."
                )
        return {name: self.ids[text] for name, text in tags.items()}

    def check_prompts(self, prompts: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Refuse prompts that are empty, that the tokenizer cannot encode, or that hold a tag.

        Raises:
            UserError: naming the prompt and what is wrong with it.
        """
        for task, prompt in prompts.items():
            if not prompt.strip():
                raise UserError(f"task.prompts.{task}={prompt!r} is empty: say what the LLM is to write.")
            for name, tag in tags.items():
                if tag in self.added and tag in prompt:
                    raise UserError(
                        f"task.prompts.{task}={prompt!r} holds llm.tags.{name}={tag!r}: leave it out, tags are put "
                        "around speech by themselves."
                    )
        self.check_texts((f"task.prompts.{task}", prompt) for task, prompt in prompts.items())

    def check_texts(self, texts: Iterable[tuple[str, str]]) -> None:
        """Refuse texts that the tokenizer cannot encode whole: they would be learned as unknown tokens, or cut.

        Args:
            texts: pairs of where a text comes from and the text.

        Raises:
            UserError: naming the first such text and the part that has no token.
        """
        for place, text in texts:
            part = self._unknown_part(text)
            if part is not None:
                raise UserError(
                    f"{place}: the tokenizer in {self.directory} has no token for {part!r} in {text!r}: change the "
                    "text, or use an LLM whose tokenizer knows it."
                )

    def _unknown_part(self, text: str) -> str | None:
        """The first part of a text that is lost or unknown when it is encoded; None if there is none."""
        if self._missing_bytes is not None:
            lost = (char for char in text if not self._missing_bytes.isdisjoint(char.encode("utf-8", "surrogatepass")))
            return next(lost, None)
        model = self._document["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:  # Unigram
            unknown = model["vocab"][model["unk_id"]][0]
        if unknown is None:  # characters that a BPE does not know vanish
            normal = text if self._backend.normalizer is None else self._backend.normalizer.normalize_str(text)
            split = self._backend.pre_tokenizer
            pieces = [normal] if split is None else [piece for piece, _ in split.pre_tokenize_str(normal)]
            return next((char for piece in pieces for char in piece if char not in self.ids), None)
        encoding = self._backend.encode(text, add_special_tokens=False)
        number = self.ids.get(unknown)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return next((text[start:end] for token, (start, end) in found if token == number), None)

    @cached_property
    def _missing_bytes(self) -> frozenset[int] | None:
        """Bytes without a token, where the tokenizer falls back to bytes; None where it does not.

        Byte-level tokenizers spell byte b as a printable character of their own; SentencePiece's as "<0x0A>".
        """
        parts = [*_parts(self._document.get("normalizer")), *_parts(self._document.get("pre_tokenizer"))]
        if any(part.get("type") == "ByteLevel" for part in parts):
            return frozenset(byte for byte, spelling in enumerate(_byte_spellings()) if spelling not in self.ids)
        if self._document["model"].get("byte_fallback") and all(f"<0x{byte:02X}>" in self.ids for byte in range(256)):
            return frozenset()
        return None

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer itself, which takes a second to load if it is large; most are judged without."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.directory / TOKENIZER))

    def _check_ends(self) -> None:
        """The model starts and ends texts with the tokenizer's tokens, where its files name any."""
        files = [self.directory / name for name in (MODEL, GENERATION) if (self.directory / name).is_file()]
        for key, number in (("bos_token_id", self.bos), ("eos_token_id", self.eos)):
            found = [_read(path).get(key) for path in files]
            named = {each for value in found for each in (value if isinstance(value, list) else [value])} - {None}
            if number is not None and named and number not in named:
                token = key.removesuffix("_id")
                raise UserError(
                    f"llm.path: {token} of {self.directory / SETTINGS} has id {number}, but {MODEL} and {GENERATION} "
                    f"give {key}={', '.join(map(str, sorted(named, key=str)))}: use the tokenizer that belongs to "
                    f"these weights, or correct {token}."
                )


@dataclass(frozen=True)
class _Settings:
    """What transformers' files say beside tokenizer.json.

    Attributes:
        named: special tokens by their roles, such as "eos_token".
        extra: further special tokens, which have no role.
        added: ids of added tokens.
    """

    named: dict[str, str]
    extra: list[str]
    added: dict[str, int]

    @classmethod
    def read(cls, directory: Path) -> _Settings:
        settings: dict[str, Any] = {}
        for name in (OLD_SETTINGS, SETTINGS):  # the newer file wins
            if (directory / name).is_file():
                settings |= _read(directory / name)
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        try:
            return cls(
                # Keys such as add_bos_token hold no token but true or false.
                {
                    key: _text(value)
                    for key, value in settings.items()
                    if key.endswith("_token") and isinstance(value, str | dict)
                },
                [_text(value) for value in (extra.values() if isinstance(extra, dict) else extra)],
                {_text(value): int(key) for key, value in (settings.get("added_tokens_decoder") or {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"llm.path: {directory / SETTINGS} names tokens in no known form; fetch it again."
            ) from error


def check_rows(directory: Path, ids: Mapping[str, int]) -> None:
    """Refuse tokens that have no row in a model's embeddings.

    Args:
        directory: of the model; its ``config.json`` tells the rows.
        ids: by token.

    Raises:
        UserError: naming the token with the highest id.
    """
    rows = _read(directory / MODEL).get("vocab_size")
    if not isinstance(rows, int):
        raise UserError(f"llm.path: {directory / MODEL} has vocab_size={rows!r}; fetch it again.")
    if max(ids.values(), default=-1) >= rows:
        beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
        number, token = beyond[-1]
        others = f" ({len(beyond)} tokens are beyond them)" if len(beyond) > 1 else ""
        raise UserError(
            f"llm.path: the tokenizer in {directory} gives {token!r} the id {number}, but the model has {rows} "
            f"embeddings (vocab_size in {MODEL}){others}: use the tokenizer that belongs to these weights, or give "
            "the model rows for added tokens (transformers: resize_token_embeddings) and save it."
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(document, dict):
        raise UserError(f"llm.path: {path} holds no JSON object; fetch it again.")
    return document


def _text(token: str | dict[str, Any]) -> str:
    """The text of a token, which files give alone or with flags."""
    text = token if isinstance(token, str) else token["content"]
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text


def _base_ids(model: dict[str, Any]) -> dict[str, int]:
    """The vocabulary of a tokenizer's model: ids by token, or for Unigram pairs of token and score in order."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return {**vocabulary}
    return {token: number for number, (token, _) in enumerate(vocabulary)}


def _template_ids(processor: dict[str, Any] | None) -> dict[str, int]:
    """Ids that a tokenizer puts around texts by itself."""
    ids: dict[str, int] = {}
    for part in _parts(processor):
        for token, facts in (part.get("special_tokens") or {}).items():
            ids[token] = max(facts["ids"])
        for token, number in (part[role] for role in ("cls", "sep") if role in part):
            ids[token] = number
    return ids


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a component of a tokenizer, which may be a sequence of them."""
    if component is None:
        return
    yield component
    for key in ("normalizers", "pretokenizers", "processors"):
        for part in component.get(key) or []:
            yield from _parts(part)


def _byte_spellings() -> list[str]:
    """The characters for bytes 0 to 255 of byte-level tokenizers (GPT-2's): the printable ones of Latin-1 stand for
    themselves, the others are numbered from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
