"""Lists of clips in the forms that other projects use. The suffix tells which.

``.csv``    auto_avsr: ``dataset,path,frames,tokens,text`` a line; the text may hold commas
``.tsv``    av_hubert: the root, then ``id video audio video-frames audio-samples`` with tabs; the text is in ``.wrd``
            beside it, a line a clip
``.jsonl``  lhotse: a cut a line, with its recording's files and one supervision or more

Paths are below the root (the second form names one of its own); nothing but local files is ever read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mome_dist.data.preparation.clips import Clip, below
from mome_dist.errors import UserError

_AUDIO_SUFFIXES = (".wav", ".flac")


def read_manifest(path: Path, split: str, root: Path | None) -> list[Clip]:
    """Clips that a list names, in its order, for one split.

    Args:
        root: folder that its paths are below; None: the list's own, or the folder that it lies in.

    Raises:
        UserError: the list is missing, empty, of another form, or a line of it is wrong; the message names the line.
    """
    if path.suffix not in _READERS:
        raise UserError(f"{path}: lists end in {', '.join(_READERS)}; see README, 'Your own data'")
    if not path.is_file():
        raise UserError(f"{path}: no such list")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error
    clips = _READERS[path.suffix](path, lines, split, root)
    if not clips:
        raise UserError(f"{path} names no clip")
    return clips


def _read_csv(path: Path, lines: list[str], split: str, root: Path | None) -> list[Clip]:
    root, clips = root or path.parent, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.split(",", 4)
        if len(fields) != 5:
            raise UserError(f"{path}:{number}: {len(fields)} fields, not 5: dataset,path,frames,tokens,text")
        dataset, name, _, _, text = fields
        media = below(root, f"{dataset}/{name}" if dataset else name, f"{path}:{number}")
        clips.append(_clip(root, media, split, text, audio=_audio_beside(media)))
    return clips


def _read_tsv(path: Path, lines: list[str], split: str, root: Path | None) -> list[Clip]:
    texts_path = path.with_suffix(".wrd")
    if not texts_path.is_file():
        raise UserError(f"{texts_path} is missing: it holds the text of {path.name}, a line a clip")
    texts = texts_path.read_text(encoding="utf-8").splitlines()
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if len(texts) != len(rows):
        raise UserError(f"{texts_path} has {len(texts)} lines for the {len(rows)} clips of {path.name}")
    root, clips = root or Path(lines[0].strip()), []
    for (number, line), text in zip(rows, texts, strict=True):
        fields = line.split("\t")
        if len(fields) != 5:
            raise UserError(f"{path}:{number}: {len(fields)} fields, not 5: id, video, audio, frames, samples")
        media, audio = (below(root, name, f"{path}:{number}") for name in fields[1:3])
        clips.append(_clip(root, media, split, text, name=fields[0], audio=audio if audio != media else None))
    return clips


def _read_jsonl(path: Path, lines: list[str], split: str, root: Path | None) -> list[Clip]:
    root = root or path.parent
    clips = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                clips.append(_cut(where, json.loads(line), split, root))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{where}: no cut with id, start, duration, recording and supervisions "
                    f"({type(error).__name__}: {error})"
                ) from error
    return clips


def _cut(where: str, cut: dict[str, Any], split: str, root: Path) -> Clip:
    recording, supervisions = cut["recording"], cut["supervisions"]
    files = []
    for source in recording["sources"]:
        if source["type"] != "file":
            raise UserError(f"{where}: a source of type {source['type']!r}; only files are read, no URL and no command")
        files.append(below(root, str(source["source"]), where))
    return Clip(
        name=str(cut["id"]),
        split=split,
        speaker=str(supervisions[0].get("speaker") or files[0].parent.name),
        media=files[0],
        audio=files[1] if len(files) > 1 else None,
        text=" ".join(str(supervision["text"]) for supervision in supervisions),
        start=float(cut["start"]),
        seconds=float(cut["duration"]),
    )


def _clip(root: Path, media: Path, split: str, text: str, *, audio: Path | None, name: str | None = None) -> Clip:
    name = name or media.relative_to(root).with_suffix("").as_posix()
    return Clip(name, split, media.parent.name, media, audio, text)


def _audio_beside(media: Path) -> Path | None:
    """A file of the same name with sound alone, as auto_avsr keeps it."""
    found = (media.with_suffix(suffix) for suffix in _AUDIO_SUFFIXES)
    return next((path for path in found if path != media and path.is_file()), None)


_READERS: dict[str, Callable[[Path, list[str], str, Path | None], list[Clip]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
}
