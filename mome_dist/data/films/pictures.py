"""Pictures of a film as grey levels: upright, of square pixels, 25 a second.

What a camera or an editor meant is in a stream's metadata: a display matrix (a telephone held upright stores pictures
that lie on their side), the shape of its pixels, the range of its grey levels, the time of each picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.sidedata.sidedata import SideData
from numpy.typing import NDArray

from mome_dist.data.films.sound import LONGEST_HOLE_SECONDS, LONGEST_OVERLAP_SECONDS, REMUX
from mome_dist.data.media import FPS, Video, grey_levels
from mome_dist.errors import FilmError

Picture = NDArray[np.uint8]
"""Grey levels of one picture, uint8 [height, width]."""

_WIDEST_PIXEL = 8.0
_UNIT = 1 << 16  # a display matrix holds fixed-point numbers of 16 fractional bits


def at_25_fps(frames: Iterable[av.VideoFrame], origin: float, pixel_shape: float, source: str) -> Iterator[Picture]:
    """Sample a stream at the middle of every 40 ms from ``origin`` (seconds) on.

    A picture is shown until the next one; before the first one, that is shown.

    Args:
        frames: in the order in which they are shown.
        pixel_shape: width of a pixel, relative to its height.
        source: names the file in errors.

    Raises:
        FilmError: the size changes on the way, the time stamps are those of no film, or a metadatum cannot be followed.
    """
    shown: Picture | None = None
    taken, end, interval = 0, origin, 1.0 / FPS
    last: float | None = None
    turns: dict[int, _Turn] = {}
    for frame in frames:
        start = end if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
        if last is not None and not -LONGEST_OVERLAP_SECONDS <= start - last <= LONGEST_HOLE_SECONDS:
            raise FilmError(
                f"{source}: the time stamps of its pictures jump by {start - last:+.2f} s at {last - origin:.2f} s; "
                f"{REMUX}"
            )
        while shown is not None and origin + (taken + 0.5) * interval < start:
            yield shown
            taken += 1
        if frame.rotation not in turns:  # looked at once: a frame whose side data was asked for is freed late
            turns[frame.rotation] = _turn(frame, source)
        picture = turns[frame.rotation](_of_square_pixels(grey_levels(frame), pixel_shape, source))
        if shown is not None and picture.shape != shown.shape:
            raise FilmError(f"{source}: the picture size changes within the film; convert it to one size")
        shown, last = picture, start
        end = start + (float(frame.duration * frame.time_base) if frame.duration and frame.time_base else interval)
    while shown is not None and origin + (taken + 0.5) * interval < end:
        yield shown
        taken += 1


def _of_square_pixels(picture: Picture, pixel_shape: float, source: str) -> Picture:
    if abs(pixel_shape - 1.0) < 0.01:  # less than a pixel of a mouth crop
        return picture
    if not 1 / _WIDEST_PIXEL <= pixel_shape <= _WIDEST_PIXEL:
        raise FilmError(f"{source}: its pixels are {pixel_shape:g} times as wide as high; mend its aspect ratio")
    height, width = picture.shape
    size = (max(round(width * pixel_shape), 1), height)
    method = cv2.INTER_AREA if pixel_shape < 1 else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=method).astype(np.uint8, copy=False)


class _Turn(NamedTuple):
    """How a stored picture becomes upright: transposed first or not, then its rows and columns in these steps."""

    transposed: bool
    rows: int
    columns: int

    def __call__(self, picture: Picture) -> Picture:
        picture = picture.T if self.transposed else picture
        return np.ascontiguousarray(picture[:: self.rows, :: self.columns])


def _turn(frame: av.VideoFrame, source: str) -> _Turn:
    """What the display matrix of a frame says: x' = a x + c y, y' = b x + d y, y pointing down."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return _Turn(False, 1, 1)
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    small = max(abs(value) for value in (a, b, c, d)) / 100
    if abs(b) <= small and abs(c) <= small:
        return _Turn(False, -1 if d < 0 else 1, -1 if a < 0 else 1)
    if abs(a) <= small and abs(d) <= small:
        return _Turn(True, -1 if b < 0 else 1, -1 if c < 0 else 1)
    raise FilmError(
        f"{source}: its display matrix turns pictures by other than a quarter turn "
        f"({', '.join(f'{value / _UNIT:g}' for value in (a, b, c, d))}); write them upright, such as with "
        "'ffmpeg -i OLD NEW.mp4'"
    )


def stacked(pictures: Iterable[Picture], count: int) -> Video:
    """Pictures of one size in one array, uint8 [count, height, width]."""
    video: Video | None = None
    for number, picture in enumerate(pictures):
        if video is None:
            video = np.empty((count, *picture.shape), np.uint8)
        video[number] = picture
    assert video is not None
    return video
