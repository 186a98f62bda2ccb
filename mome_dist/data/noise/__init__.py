"""Noise for speech: where it comes from, and mixing it in at a signal-to-noise ratio.

    mixing      speech and noise to a mixture of a given ratio, and back to the ratio
    source      the interface of all sources; `add` puts noise on an utterance and says which
    babble      other speakers of the corpus, talking at once
    files       a directory of recordings (MUSAN, NOISEX-92, one's own)

Noise is a pure function of (seed, utterance id, draw): an evaluation hears the same noise in every run, on every rank
and in any order, and training asks for another ``draw`` every epoch. ``snr=None`` means no noise at all; ``snr=0.0``
means noise as loud as speech.
"""

from mome_dist.data.noise.babble import Babble
from mome_dist.data.noise.files import NoiseFiles
from mome_dist.data.noise.mixing import measure_snr, mix_at_snr
from mome_dist.data.noise.opening import BABBLE, open_noise
from mome_dist.data.noise.source import NoiseSource, Origin, add

__all__ = [
    "BABBLE",
    "Babble",
    "NoiseFiles",
    "NoiseSource",
    "Origin",
    "add",
    "measure_snr",
    "mix_at_snr",
    "open_noise",
]
