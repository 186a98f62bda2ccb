"""Lists of clips in the forms that other projects use. The suffix tells which.

``.csv``    Llama-AVSR, and auto_avsr with a text: ``dataset,path,frames,tokens,text`` a line; the text may hold commas
``.tsv``    av_hubert: the root, then ``id video audio video-frames audio-samples`` with tabs; the text is in ``.wrd``
            beside it, a line a clip
``.jsonl``, ``.jsonl.gz``
            lhotse: a cut a line (`lhotse`)

Frames are at 25 fps, samples at 16 kHz; a list may leave them empty, and one that does not has them compared with the
film. Paths are below the root (the second form names one of its own, if need be relative to the list); nothing but
local files is ever read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mome_dist.data.preparation.clips import Clip, below
from mome_dist.data.preparation.lhotse import read_cut
from mome_dist.data.preparation.utterances import Rejection
from mome_dist.errors import UserError, no_file, no_folder
from mome_dist.text_files import lines_of

_AUDIO_SUFFIXES = (".wav", ".flac")


class Listed(NamedTuple):
    """What a list names: clips in its order, and what is left out of it whatever its films are like."""

    clips: list[Clip]
    left_out: list[Rejection]


def read_manifest(path: Path, split: str, root: Path | None) -> Listed:
    """Clips that a list names, for one split.

    Args:
        root: folder that its paths are below; None: the list's own, or the folder that it lies in.

    Raises:
        UserError: the list or the root is missing, the list is of another form, or names no clip that can be used, or a
            line of it is wrong, which the message names.
    """
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} {no_folder(root)}; give the folder that the paths of the lists begin in")
    reader = next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{path}: lists end in {', '.join(_READERS)}; see docs/how-to/prepare.md")
    if not path.is_file():
        raise UserError(f"{path} {no_file(path)}; give a list of clips")
    found = Listed([], [])
    for entry in reader(path, split, root):
        if isinstance(entry, Clip):
            found.clips.append(entry)
        else:
            found.left_out.append(entry)
    if not found.clips:
        why = f" that can be used; the first one: {found.left_out[0].detail}" if found.left_out else ""
        raise UserError(f"{path} names no clip{why}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with the place that messages name."""
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _read_csv(path: Path, split: str, root: Path | None) -> Iterator[Clip]:
    root = root or path.parent
    for where, line in _rows(path):
        fields = line.split(",", 4)
        if len(fields) != 5:
            raise UserError(
                f"{where}: {len(fields)} fields, not 5: dataset,path,frames,tokens,text, of which dataset, frames "
                "and tokens may be empty: ',path,,,text'"
            )
        dataset, name, frames, tokens, text = fields
        # A header, a comma in a path, a list without tokens: its fields are not these five.
        if not re.fullmatch(r"[0-9 ]*", tokens):
            raise UserError(f"{where}: {tokens!r:.50} where the tokens should be, numbers or nothing")
        if '"' in dataset + name or (text.lstrip().startswith('"') and text.count('"') % 2):
            raise UserError(f"{where}: a quoted path, or a quoted text of several lines; write both without quotes")
        media = below(root, f"{dataset}/{name}" if dataset else name, where)
        yield Clip(
            name=media.relative_to(root).with_suffix("").as_posix(),
            split=split,
            speaker=media.parent.name,
            media=media,
            audio=_audio_beside(media),
            text=text,
            listed_frames=_count(where, "frames", frames),
        )


def _read_tsv(path: Path, split: str, root: Path | None) -> Iterator[Clip]:
    texts_path = path.with_suffix(".wrd")
    if not texts_path.is_file():
        raise UserError(f"{texts_path} is missing: it holds the text of {path.name}, a line a clip")
    texts, (first, *rows) = list(lines_of(texts_path)), list(_rows(path)) or [("", "\t")]
    if "\t" in first[1]:
        raise UserError(f"{path}: its first line must be the root folder of the paths")
    root = root or path.parent / first[1].strip()
    if len(texts) != len(rows):
        raise UserError(f"{texts_path} has {len(texts)} lines for the {len(rows)} clips of {path.name}")
    for (where, line), text in zip(rows, texts, strict=True):
        fields = line.split("\t")
        if len(fields) != 5:
            raise UserError(f"{where}: {len(fields)} fields, not 5: id, video, audio, frames, samples")
        media, audio = (below(root, name, where) for name in fields[1:3])
        yield Clip(
            name=fields[0],
            split=split,
            speaker=media.parent.name,
            media=media,
            audio=audio if audio != media else None,
            text=text,
            listed_frames=_count(where, "frames", fields[3]),
            listed_samples=_count(where, "samples", fields[4]),
        )


def _read_cuts(path: Path, split: str, root: Path | None) -> Iterator[Clip | Rejection]:
    for where, line in _rows(path):
        yield read_cut(line, where, split, root or path.parent)


def _count(where: str, what: str, text: str) -> int | None:
    """A number of a list; None where its list does not say."""
    if not text.strip(" "):
        return None
    if not re.fullmatch(r" *[0-9]{1,15} *", text):
        raise UserError(f"{where}: {text!r:.50} where the number of {what} should be, or nothing")
    return int(text)


def _audio_beside(media: Path) -> Path | None:
    """A file of the same name with sound alone, as auto_avsr keeps it."""
    found = (media.with_suffix(suffix) for suffix in _AUDIO_SUFFIXES)
    return next((path for path in found if path != media and path.is_file()), None)


_READERS: dict[str, Callable[[Path, str, Path | None], Iterator[Clip | Rejection]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_cuts,
    ".jsonl.gz": _read_cuts,
}
