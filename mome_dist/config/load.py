"""Compose a run's configuration: YAML groups through Hydra, command-line overrides, then the typed schema."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from mome_dist.config.schema import RunConfig
from mome_dist.config.synthetic import SyntheticSettings, default_corpus_dir
from mome_dist.config.yaml_files import told_by_file
from mome_dist.errors import UserError
from mome_dist.files import write_text
from mome_dist.hints import SWEEP, did_you_mean, hint, near
from mome_dist.hub import SCHEME, portable
from mome_dist.paths import cache_root, configs_dir
from mome_dist.system_errors import note_places

Section = TypeVar("Section")


def register_resolvers() -> None:
    # ${cache:assets/x} in a YAML file is x in the cache directory of whoever runs it.
    OmegaConf.register_new_resolver("cache", lambda path: str(cache_root() / path), replace=True)
    # ${synthetic_corpus:} is where mome-dist prepare synthetic puts the corpus of the default settings.
    OmegaConf.register_new_resolver(
        "synthetic_corpus", lambda: str(default_corpus_dir(SyntheticSettings())), replace=True
    )


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Compose ``configs/config.yaml`` with overrides as Hydra writes them (``experiment=tiny training.steps=5``).

    Raises:
        UserError: for an unknown group, option or key, or a value of the wrong type; it names the key and near ones.
            For steps that the epochs of an experiment would overrule.
    """
    register_resolvers()
    for override in overrides:
        if "=" not in override:
            raise UserError(_no_override(override))
        if override.partition("=")[0] == "mome.router":
            raise UserError(f"{override}: a router is a group of settings, write mome/router=NAME.")
    try:
        config = _to_schema(_composed(overrides))
        _let_go_of_idle_views(config, overrides)
        _refuse_idle_steps(config, overrides)
        _refuse_idle_experts(config, overrides)
        _refuse_idle_warmup(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from error
    note_places(_paths_of(config))
    return config


@contextmanager
def hydra_on_configs() -> Iterator[None]:
    """Hydra on the files of ``configs/``. Raises UserError for one that is no YAML."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"), told_by_file(configs_dir().rglob("*.yaml")):
        yield


def _composed(overrides: Sequence[str]) -> DictConfig:
    """The YAML files that overrides choose, and after them what a method's authors set in the experiment: the file of
    ``configs/published/EXPERIMENT`` that is named after the method's family, and perhaps the task. It may replace
    groups; the command line still has the last word."""
    with hydra_on_configs():
        composed = compose("config", list(overrides), return_hydra_config=True)
        if published := _published(composed):
            return compose("config", [*overrides, published])
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return composed


def _published(composed: DictConfig) -> str | None:
    """The override that chooses the file of ``configs/published`` for a composition, if there is one."""
    chosen = composed.hydra.runtime.choices
    family = (chosen.method or "mome").partition("/")[0]
    group = f"published/{chosen.experiment}"
    names = (f"{family}_{chosen.task}", family)
    return next((f"+{group}={name}" for name in names if (configs_dir() / group / f"{name}.yaml").is_file()), None)


def files_of(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """The YAML files that `load_config` composes, the last word last.

    Returns:
        Of each, its place in ``configs`` without the suffix, and the key that its own keys are below ("" for none).
    """
    with hydra_on_configs():
        composed = compose("config", list(overrides), return_hydra_config=True)
        words = [*overrides, *filter(None, [_published(composed)])]
        chosen = GlobalHydra.instance().config_loader().compute_defaults_list("config", words, RunMode.RUN).defaults
    files = [(each.config_path or "", each.package or "") for each in chosen]
    return [(path, package) for path, package in files if path and not path.startswith("hydra/")]


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """The values of a command line by key."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}


def _let_go_of_idle_views(config: RunConfig, overrides: Sequence[str]) -> None:
    """Leave out how many views an experiment draws a step where it is made to draw rates; a number of the command line
    stays, to be refused with the other values."""
    if config.task.sampling == "rates" and "task.views_per_step" not in _given(overrides):
        config.task.views_per_step = None


def _refuse_idle_steps(config: RunConfig, overrides: Sequence[str]) -> None:
    given = _given(overrides)
    if "training.steps" in given and "training.epochs" not in given and config.training.epochs is not None:
        raise UserError(
            f"training.steps={given['training.steps']} would have no effect, because training.epochs="
            f"{config.training.epochs} of the experiment decides the steps: add training.epochs=null."
        )


# Keys of experts that a run without a router heeds.
UNROUTED: tuple[str, ...] = ("placement", "routed_experts", "shared_experts", "expert", "bottleneck")


def _refuse_idle_experts(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse keys of experts on the command line of a run without experts, and those of a router without a router."""
    if config.mome.experts:
        return
    heeded, lack = (UNROUTED, "no routed experts") if config.mome.placed else (UNROUTED[:1], "no experts (mome=none)")
    for override in overrides:
        group, _, key = override.lstrip("+").partition("=")[0].replace("/", ".").partition(".")
        if group == "mome" and key and key not in heeded:
            raise UserError(f"{override} would have no effect: the run has {lack}. Leave it out.")


def names_key(word: str) -> bool:
    """Whether an argument sets a group of ``configs/`` or a key of the schema."""
    key, given, _ = word.lstrip("+").partition("=")
    return bool(given) and (key in _known_keys(RunConfig, "") or (configs_dir() / key).is_dir())


def load_training(overrides: Sequence[str]) -> RunConfig:
    """`load_config` for a training, which has to be told what to train: ``configs/config.yaml`` alone is a base.

    Raises:
        UserError: as `load_config`, and if no experiment is named.
    """
    config = load_config(overrides)
    if "experiment" not in _given(overrides):
        raise UserError(
            f"no experiment is named: give experiment=NAME, one of {', '.join(options_of('experiment'))}, or "
            "experiment=null for a run that your other arguments describe."
        )
    return config


def _refuse_idle_warmup(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse a warm-up on the command line that outlasts the steps; where an experiment has it, `mome_dist.preflight`
    says so."""
    steps, warmup = config.training.steps, config.optimizer.warmup_steps
    if config.training.epochs is None and warmup >= steps > 0 and "optimizer.warmup_steps" in _given(overrides):
        raise UserError(
            f"optimizer.warmup_steps={warmup} is no shorter than the run, training.steps={steps}: its learning rate "
            "would never reach optimizer.learning_rate. Lower the first or raise the second."
        )


def load_group(group: str, option: str, overrides: Sequence[str], schema: type[Section]) -> Section:
    """Compose one file of ``configs/`` that is no part of a run, such as ``launcher/slurm.yaml``.

    Args:
        overrides: with the group's name before each key (``launcher.nodes=2``).

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    try:
        with hydra_on_configs():
            composed = compose(f"{group}/{option}", list(overrides))
        plain = OmegaConf.to_container(composed[group], resolve=True)
        return cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain)))
    except (HydraException, OmegaConfBaseException) as error:
        known = [f"{group}.{key}" for key in _known_keys(schema, "")]
        raise UserError(f"{_one_line(error, overrides, known)} See configs/{group}/{option}.yaml.") from error


def load_saved_config(path: Path) -> RunConfig:
    """Read the resolved configuration that a run saved (`save_config`)."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the directory of a run, of one of its checkpoints, or of an export."
        )
    with told_by_file([path]):
        values = OmegaConf.load(path)
    return config_of(values, path)


def config_of(values: Any, origin: Path) -> RunConfig:
    """The configuration that a mapping of values describes; what it leaves out has its default.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming ``origin``, the file that it comes from.
    """
    register_resolvers()
    try:
        return _to_schema(OmegaConf.create(values))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_one_line(error, [])}") from error


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, whole or not at all; models of the hub are named by their commit."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(portable_config(config))))


def portable_config(config: RunConfig) -> RunConfig:
    """The same with models of the hub named by their commit there, not by the folder that they were fetched to."""
    sections = {name: getattr(config, name) for name in ("llm", "audio_encoder", "video_encoder")}
    named = {name: dataclasses.replace(model, path=portable(model.path)) for name, model in sections.items()}
    return dataclasses.replace(config, **named)


def resolve_deepspeed_file(config: RunConfig) -> Path:
    """The DeepSpeed JSON file of a run: a path as given, or a name in ``configs/deepspeed``."""
    given = Path(config.deepspeed.file)
    return given if given.is_file() or given.is_absolute() else configs_dir() / "deepspeed" / given


def _paths_of(config: RunConfig) -> dict[str, str]:
    """The paths that a run reads and writes, by key."""
    paths = {
        "output_dir": config.output_dir,
        "data.corpus": config.data.corpus,
        "data.features_dir": config.data.features_dir,
        "llm.path": config.llm.path,
        "audio_encoder.path": config.audio_encoder.path,
        "video_encoder.path": config.video_encoder.path,
        "training.init_from": config.training.init_from,
    }
    return {key: path for key, path in paths.items() if path and not path.startswith(SCHEME)}


def unreadable(override: str) -> str:
    """What to say of an argument that is not written as Hydra reads it."""
    key, _, value = override.partition("=")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f"argument {override!r} cannot be read: a value with =, commas, brackets, spaces or quotes has to be quoted, "
        f"for Hydra and for the shell: '{key}=\"{quoted}\"'."
    )


def _to_schema(composed: Any) -> RunConfig:
    plain = OmegaConf.to_container(composed, resolve=True)
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(_schema(), plain)))


@functools.cache
def _schema() -> DictConfig:
    """The typed schema with its defaults, which merging copies: to make it takes longer than all the rest."""
    return OmegaConf.structured(RunConfig)


def _one_line(error: Exception, overrides: Sequence[str], known: Sequence[str] | None = None) -> str:
    """Say what Hydra or OmegaConf found, the key it found it at, and what was meant (`mome_dist.hints`).

    Args:
        known: all keys that there are; None for those of a run.
    """
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    # What a resolver such as ${cache:...} has to say stands for itself.
    told = str(error).replace(f"{UserError.__name__} raised while resolving interpolation: ", "")
    if missing := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)'", told):
        return _no_option(missing[2], missing[1].removeprefix(f"{missing[2]}/"))
    if ambiguous := re.match(r"Ambiguous value for argument '([^']*)'", told):
        key, _, value = ambiguous[1].partition("=")
        return f"{ambiguous[1]} are several values: one value as a list is {key}=[{value}]; {SWEEP}."
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    unknown = bool(lines) and (lines[0].startswith(("Could not override", "Key")) and lines[0] != key)
    if unknown and lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
    elif unknown and " not in " not in lines[0]:
        unknown = False
    if not key:
        message = " ".join(lines)
        return message if message.endswith((".", "?")) else f"{message}."
    if not unknown:
        return f"configuration key {key!r}: {lines[0].rstrip('.')}{_expected(lines[0], key)}."
    keys = list(_known_keys(RunConfig, "")) if known is None else known
    if key in keys:
        section, _, last = key.rpartition(".")
        return f"{key} cannot be set, because {section} is null here: set '{section}={{{last}: ...}}'."
    if known is None and "." not in key and (group := near(key, groups(), 1, looks=0.8)):
        return f"unknown configuration key {key!r}{did_you_mean(group)}"
    return f"unknown configuration key {key!r}{hint(key, keys)}"


# By what OmegaConf says of a value: what to give instead.
_KINDS = {
    "converted to Integer": "give a whole number",
    "converted to Float": "give a number",
    "not a valid bool": "give true or false",
    "not a ListConfig": "give a list, such as {key}=[...]",
    "not a DictConfig": "give keys and values, such as '{key}={{...}}'",
    "is not optional": "give a value",
}


def _expected(told: str, key: str) -> str:
    return next((f": {words.format(key=key)}" for sign, words in _KINDS.items() if sign in told), "")


def _no_override(word: str) -> str:
    """What to say of an argument without ``=``: which experiment, option or key it may stand for."""
    if word in options_of("experiment"):
        return f"argument {word!r} is not of the form key=value; did you mean experiment={word}?"
    if word in ("-m", "--multirun"):
        return f"{word} is no option of one run; {SWEEP}."
    if word.startswith("-"):
        meant = hint(word.lstrip("-").replace("-", "_"), list(_known_keys(RunConfig, "")))
        return f"argument {word!r} is not of the form key=value, and there are no options here{meant}"
    return f"argument {word!r} is not of the form key=value, such as experiment=tiny or training.steps=50."


def groups() -> list[str]:
    """The groups of a run, which overrides choose a file of."""
    others = ("launcher", "published")
    return sorted(path.name for path in configs_dir().iterdir() if path.is_dir() and path.name not in others)


def options_of(group: str) -> list[str]:
    """What a group of ``configs/`` may be set to; groups inside of it (``mome/router``) are none of its options."""
    folder, inner = configs_dir() / group, set(_known_keys(RunConfig, ""))
    files = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(name for name in files if name != "base" and f"{group}.{name.partition('/')[0]}" not in inner)


def _no_option(group: str, option: str) -> str:
    known = options_of(group)
    told = f"{group}={option}: there is no configs/{group}/{option}.yaml"
    if option.startswith(("/", "hf:", ".", "~")) and f"{group}.path" in _known_keys(RunConfig, ""):
        return f"{told}; for a model of your own write {group}.path={option}"
    inside = [name for name in known if name.startswith(f"{option}/")]
    return f"{told}{did_you_mean(inside or near(option, known)) or '.'} There are {', '.join(known)}."


def all_keys() -> list[str]:
    """Every key of a run, those too of sections that may be null."""
    return list(_known_keys(RunConfig, ""))


def _known_keys(schema: Any, prefix: str) -> Iterator[str]:
    """Yield the keys of a class of the schema and of all sections in it, those too that may be null."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name
        for section in (kind, *get_args(kind)):
            if dataclasses.is_dataclass(section):
                yield from _known_keys(section, f"{prefix}{name}.")
