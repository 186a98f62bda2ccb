"""Configuration: its schema, its composition from YAML and command line, and its validation before a run starts."""

from mome_dist.config.load import load_config, load_group, resolve_deepspeed_file, save_config
from mome_dist.config.schema import RunConfig
from mome_dist.config.validate import validate, validate_overrides

__all__ = [
    "RunConfig",
    "load_config",
    "load_group",
    "resolve_deepspeed_file",
    "save_config",
    "validate",
    "validate_overrides",
]
