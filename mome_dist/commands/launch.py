"""Start a command on several processes: of this machine, or of a Slurm cluster.

    mome-dist launch --nproc 2 train experiment=quickstart
    mome-dist launch --nproc 2 --restarts 3 train experiment=tiny
    mome-dist launch --nproc 2 evaluate runs/quickstart
    mome-dist launch slurm launcher.nodes=2 launcher.tasks_per_node=8 launcher.gpus_per_node=8 train experiment=lrs3
    mome-dist launch submitit --multirun launcher.tasks_per_node=8 train experiment=lrs3 seed=0,1

What is the launcher's comes before the command, what is the command's after it; launcher.* keys may come anywhere.
The commands are train, evaluate, pretrain video, pretrain llm, prepare features and check; --module M in the place of a
command runs any other module. `mome-dist launch slurm --help` and `mome-dist launch submitit --help` say what Slurm can
be asked for. On this machine rank 0 writes to the terminal and the others to rank-N.log; when a rank fails, the others
are ended, and the exit code is its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from omegaconf import OmegaConf

from mome_dist.cli import Parser, main_guard
from mome_dist.commands.registry import COMMANDS, Command, find_command, main_of
from mome_dist.errors import UserError
from mome_dist.hints import SWEEP
from mome_dist.launchers import local, options
from mome_dist.launchers.slurm import __main__ as slurm
from mome_dist.launchers.submitit import __main__ as submitit
from mome_dist.paths import configs_dir

_HELP = ("-h", "--help")
LAUNCHERS: dict[str, tuple[Callable[[list[str]], int], type]] = {
    "local": (local.main, options.LocalOptions),
    "slurm": (slurm.main, options.SlurmOptions),
    "submitit": (submitit.main, options.SubmititOptions),
}


def command_line(launcher: str = "local") -> Parser:
    """The options of a launcher, as they come before a command."""
    if launcher == "local":
        parser = local.command_line()
        parser.prog, parser.description = "mome-dist launch", __doc__
    else:
        module = slurm if launcher == "slurm" else submitit
        parser = options.command_line(launcher, str(module.__doc__), sweeps=launcher == "submitit")
        parser.prog = f"mome-dist launch {launcher}"
        keys = (configs_dir() / "launcher" / f"{launcher}.yaml").read_text(encoding="utf-8")
        parser.epilog = f"The launcher.* keys, configs/launcher/{launcher}.yaml:\n\n{keys}"
    parser.usage = f"%(prog)s {parser.one_line()} [launcher.key=value ...] COMMAND ..."
    return parser


def divide(launcher: str, words: Sequence[str]) -> tuple[list[str], Command | None, list[str]]:
    """What is the launcher's, the command, and what is its own.

    Returns:
        With None for the command where ``--module`` names another one; all words are then the launcher's.

    Raises:
        UserError: there is no command, or none that makes sense on several processes.
    """
    parser, schema = command_line(launcher), set(OmegaConf.structured(LAUNCHERS[launcher][1]))

    def is_own(word: str) -> bool:
        key, given, _ = word.partition("=")
        return bool(given) and (key.startswith(options.PREFIX) or (launcher != "local" and key in schema))

    own, rest = parser.divide(words, is_own)
    if any(word.partition("=")[0] == "--module" for word in own) or any(word in _HELP for word in own):
        return list(words), None, []
    for word in own:
        if word in ("-m", "--multirun") and not parser.has_option(word):
            raise UserError(f"one run has one value of each key; {SWEEP}.")
        if word.startswith("-") and not parser.has_option(word):
            parser.error(f"unrecognized arguments: {word}")
    known = ", ".join(command.name for command in COMMANDS if command.ranks)
    if not rest:
        raise UserError(f"no command is named: add one of {known}, such as train experiment=quickstart.")
    if "=" in rest[0]:
        raise UserError(f"{rest[0]} comes before any command: write one of {known} before it, such as train {rest[0]}.")
    command, arguments = find_command(rest)
    if not command.ranks:
        raise UserError(f"mome-dist {command.name} runs in one process, without launch; on several run {known}.")
    _refuse_late_options(parser, command, arguments)
    keys = [word for word in arguments if word.startswith(options.PREFIX)]
    return [*own, *keys], command, [*command.first, *(word for word in arguments if word not in keys)]


def _refuse_late_options(parser: Parser, command: Command, arguments: Sequence[str]) -> None:
    """Refuse an option of the launcher after a command that has none of that name.

    Raises:
        UserError: naming it.
    """
    own = getattr(importlib.import_module(command.module), "command_line", None)
    for word in arguments:
        late = word.startswith("--") and parser.has_option(word) and word not in _HELP
        if late and (own is None or not own().has_option(word)):
            raise UserError(f"{word} is the launcher's: write it before {command.name}.")


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Divide the line, and hand it to the launcher."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    launcher = words.pop(0) if words and words[0] in LAUNCHERS else "local"
    own, command, rest = divide(launcher, words)
    if command is None:
        if any(word in _HELP for word in own):
            command_line(launcher).print_help()
            return 0
        return LAUNCHERS[launcher][0](own)
    if any(word in _HELP for word in rest):
        return main_of(command)([*command.first, "--help"])
    check = getattr(importlib.import_module(command.module), "check_arguments", None)
    if check is not None:
        check(rest)
    return LAUNCHERS[launcher][0]([*own, "--module", command.module, "--", *rest])
