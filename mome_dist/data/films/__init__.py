"""Films and recordings of a user's own, of any container and codec, read by their own clock and metadata."""

from mome_dist.data.films.film import Film, film_with
from mome_dist.data.films.pictures import Picture
from mome_dist.data.films.sound import resample_audio

__all__ = ["Film", "Picture", "film_with", "resample_audio"]
