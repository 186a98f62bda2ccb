"""What the launchers share: the ``launcher.*`` keys of a command line, and its checks before anything starts.

The keys of each launcher are in ``configs/launcher/``; all other arguments belong to the module that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from omegaconf import OmegaConf

from mome_dist.cli import Parser
from mome_dist.config import load_config, load_group
from mome_dist.errors import UserError
from mome_dist.hints import SWEEP, did_you_mean, near
from mome_dist.launchers.environment import INTERFACE
from mome_dist.preflight import validate_overrides

DEFAULT_MODULE = "mome_dist.train"
PREFIX = "launcher."
MODULES = (  # that make sense on several processes
    DEFAULT_MODULE,
    "mome_dist.evaluate",
    "mome_dist.pretrain_llm",
    "mome_dist.pretrain_video",
    "mome_dist.commands.features",
    "mome_dist.commands.check",
)


@dataclass
class ContainerOptions:
    """The container that ranks run in; the YAML file says what each key means."""

    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)
    python: str = "python"


@dataclass
class ClusterOptions:
    """What to ask Slurm for; the YAML files say what each key means."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_minutes: int | None = None
    warning_seconds: int = 120
    max_tries: int = 3
    interface: str | None = None
    srun: list[str] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of every rank."""
        return {} if self.interface is None else {INTERFACE: self.interface}


@dataclass
class SlurmOptions(ClusterOptions):
    """Options of ``python -m launchers.slurm``."""

    extra: list[str] = field(default_factory=list)
    container: ContainerOptions = field(default_factory=ContainerOptions)


@dataclass
class SubmititOptions(ClusterOptions):
    """Options of ``python -m launchers.submitit``."""

    max_timeouts: int = 100
    folder: str = "runs/submitit"
    parallel_jobs: int = 256

    @property
    def srun_arguments(self) -> list[str]:
        """Options of the srun that starts the ranks."""
        # srun no longer takes the cores from sbatch by itself.
        cores = [] if self.cpus_per_task is None else [f"--cpus-per-task={self.cpus_per_task}"]
        # The other ranks cannot go on without one that is gone.
        return ["--kill-on-bad-exit=1", "--distribution=block", *cores, *self.srun]


@dataclass
class LocalOptions:
    """Options of ``python -m launchers.local``."""

    tasks_per_node: int = 1
    timeout_seconds: float | None = None
    restarts: int = 0
    log_dir: str | None = None


Options = TypeVar("Options", SlurmOptions, SubmititOptions)


@dataclass(frozen=True)
class Request:
    """A command line.

    Attributes:
        module, arguments: what the ranks run.
        launcher: the ``launcher.*`` arguments.
        dry_run: only print what would be run.
        multirun: one job for each combination of comma-separated values.
    """

    module: str
    arguments: list[str]
    launcher: list[str]
    dry_run: bool = False
    multirun: bool = False


def command_line(name: str, description: str, sweeps: bool) -> Parser:
    """The options of a launcher of Slurm jobs."""
    parser = Parser(
        prog=f"python -m launchers.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument("--module", default=DEFAULT_MODULE, metavar="M", help=f"what to run ({DEFAULT_MODULE})")
    if sweeps:
        parser.add_argument("--multirun", action="store_true", help="a job for each combination of values: key=1,2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, or launcher.key=value")
    return parser


def parse_arguments(name: str, description: str, schema: type, arguments: Sequence[str], sweeps: bool) -> Request:
    """Divide a command line; a key of the launcher may leave ``launcher.`` out where no run has one of that name.

    What follows ``--`` is no option of the launcher.
    """
    words, after = list(arguments), []
    if "--" in words:
        position = words.index("--")
        words, after = words[:position], words[position + 1 :]
    options = command_line(name, description, sweeps).parse_intermixed_args(words)
    own = set(OmegaConf.structured(schema))
    launcher, rest = [], []
    for word in [*options.overrides, *after]:
        key = word.partition("=")[0]
        if key.startswith(PREFIX):
            launcher.append(word)
        elif key in own:
            launcher.append(PREFIX + word)
        else:
            rest.append(word)
    return Request(options.module, rest, launcher, options.dry_run, getattr(options, "multirun", False))


def load_options(name: str, schema: type[Options], request: Request) -> Options:
    """The launcher's options: its YAML file, then the command line, and the cores that the run itself asks for.

    Raises:
        UserError: for an unknown key, or a value that is wrong.
    """
    options = load_group("launcher", name, request.launcher, schema)
    check_container(options)
    for key in ("nodes", "tasks_per_node", "max_tries"):
        if getattr(options, key) < 1:
            raise UserError(f"launcher.{key}={getattr(options, key)}: must be at least 1.")
    require_module(request.module)
    if options.cpus_per_task is None and not request.multirun:
        options.cpus_per_task = cores_of_rank(request.module, request.arguments)
    return options


def check_container(options: ClusterOptions) -> None:
    """Refuse a container that would silently be none, or half of one.

    Raises:
        UserError: naming the keys.
    """
    container = getattr(options, "container", None)
    if container is not None and container.mounts and container.image is None:
        raise UserError(
            "launcher.container.mounts is set, but launcher.container.image is not: name the image, or give the mounts "
            "to the program of launcher.container.prefix (--bind of apptainer)."
        )


def cores_of_rank(module: str, arguments: Sequence[str]) -> int:
    """Cores that a rank keeps busy: one computes and one waits for others and files, and a training whose clips are
    encoded online decodes on more (`data.decode_threads`)."""
    if module != DEFAULT_MODULE:
        return 2
    data = load_config(arguments).data
    return 2 + (data.decode_threads if data.features == "online" else 0)


def refuse_options(module: str, arguments: Sequence[str], own: Sequence[str]) -> None:
    """Raise `UserError` for an option that neither the launcher nor a training has.

    Args:
        own: options of the launcher.
    """
    if module == DEFAULT_MODULE and {"-m", "--multirun"} & set(arguments):
        raise UserError(f"one run has one value of each key; {SWEEP}.")
    wrong = next((word for word in arguments if word.startswith("-") and word not in ("-h", "--help", "--")), None)
    if module == DEFAULT_MODULE and wrong is not None:
        meant = did_you_mean(near(wrong.partition("=")[0], own, looks=0.7))
        keys = f": a training has keys (experiment=tiny training.steps=50), and this launcher {', '.join(own)}."
        raise UserError(f"unknown option {wrong}{meant or keys}")


def require_module(module: str) -> None:
    """Raise `UserError` where there is no such module."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UserError(
            f"--module {module}: there is no such Python module{did_you_mean(near(module, MODULES)) or '.'}"
        )


def check_run(request: Request, options: ClusterOptions, arguments: Sequence[str]) -> list[str]:
    """Refuse here, before the queue, what the ranks would refuse; return the arguments for the ranks.

    Raises:
        UserError: naming the key and the fix.
    """
    try:
        return validate_overrides(request.module, list(arguments), options.world_size)
    except UserError as error:
        size = f"launcher.nodes={options.nodes} x launcher.tasks_per_node={options.tasks_per_node}"
        raise UserError(f"{error} ({size} are {options.world_size} processes.)") from error
