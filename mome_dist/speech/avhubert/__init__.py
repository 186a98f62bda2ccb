"""AV-HuBERT (Shi et al., "Learning Audio-Visual Speech Representation by Masked Multimodal Cluster Prediction", 2022).

Written from the paper's description. Here it is a video encoder: the audio stream is absent, as in Llama-AVSR and MoME.
"""

from mome_dist.speech.avhubert.config import AVHubertConfig
from mome_dist.speech.avhubert.model import AVHubertEncoder

__all__ = ["AVHubertConfig", "AVHubertEncoder"]
