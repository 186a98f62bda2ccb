"""Configuration: its schema, and its composition from YAML and command line."""

from mome_dist.config.load import load_config, load_group, resolve_deepspeed_file, save_config
from mome_dist.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "load_config",
    "load_group",
    "resolve_deepspeed_file",
    "save_config",
]
