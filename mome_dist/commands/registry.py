"""The commands of ``mome-dist``: their names, what they do in a line, and the module whose ``main`` each of them is.

A module is imported when its command is used, and no other: names and lines are all that ``mome-dist --help`` needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mome_dist.errors import UserError
from mome_dist.hints import did_you_mean, near

TRAINING, TRAINED, MATERIAL = "Train", "Use what was trained", "Data and models"
CHECKPOINTS, BEFORE, HERE = "Checkpoints", "Before a long run", "This installation"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: of one word or two, as they are typed after ``mome-dist``.
        group: that the help lists it in.
        what: it does, in a line.
        module: whose ``main`` takes the arguments that follow.
        first: arguments that come before those, where one module has several commands.
        ranks: whether it makes sense on several processes, under ``mome-dist launch``.
    """

    name: str
    group: str
    what: str
    module: str
    first: tuple[str, ...] = ()
    ranks: bool = False


_PREPARE, _CONFIG = "mome_dist.commands.prepare", "mome_dist.commands.config"
COMMANDS = (
    Command("train", TRAINING, "train a run", "mome_dist.train", ranks=True),
    Command("launch", TRAINING, "start a command on several processes, here or on Slurm", "mome_dist.commands.launch"),
    Command("pretrain video", TRAINING, "pre-train the small video encoder", "mome_dist.pretrain_video", ranks=True),
    Command("pretrain llm", TRAINING, "pre-train the tiny LLM", "mome_dist.pretrain_llm", ranks=True),
    Command("evaluate", TRAINED, "word error rates in any views and conditions", "mome_dist.evaluate", ranks=True),
    Command("transcribe", TRAINED, "what is said in an audio or video file", "mome_dist.transcribe"),
    Command("report", TRAINED, "a run as a page with figures", "mome_dist.report"),
    Command("export", TRAINED, "a directory that needs nothing else of its run", "mome_dist.commands.export"),
    Command("fetch", MATERIAL, "pretrained models into the cache", "mome_dist.commands.fetch"),
    Command("prepare lrs3", MATERIAL, "a corpus of LRS3", _PREPARE, ("lrs3",)),
    Command("prepare lrs2", MATERIAL, "a corpus of LRS2", _PREPARE, ("lrs2",)),
    Command("prepare manifests", MATERIAL, "a corpus of your own films, from lists", _PREPARE, ("manifests",)),
    Command("prepare synthetic", MATERIAL, "the synthetic corpus of spoken commands", "mome_dist.commands.synthetic"),
    Command("prepare features", MATERIAL, "encode a corpus once, ahead", "mome_dist.commands.features", ranks=True),
    Command(
        "convert avhubert", MATERIAL, "a video encoder of a published AV-HuBERT", "mome_dist.commands.convert_avhubert"
    ),
    Command(
        "convert family",
        MATERIAL,
        "an export of what the family's authors publish",
        "mome_dist.commands.convert_family",
    ),
    Command("inspect", CHECKPOINTS, "what is in a checkpoint, every byte checked", "mome_dist.commands.inspect"),
    Command("average", CHECKPOINTS, "the mean of a run's newest checkpoints", "mome_dist.commands.average"),
    Command("reshard", CHECKPOINTS, "a checkpoint for another layout or format", "mome_dist.commands.reshard"),
    Command("config show", BEFORE, "the configuration of a run, with what every key means", _CONFIG, ("show",)),
    Command("config keys", BEFORE, "keys whose name or meaning has a word in it", _CONFIG, ("keys",)),
    Command("plan", BEFORE, "the fastest layout that fits a cluster", "mome_dist.commands.plan"),
    Command("tune", BEFORE, "the fastest DeepSpeed settings, by trying them", "mome_dist.commands.tune"),
    Command("verify", BEFORE, "prove that a layout trains what one process trains", "mome_dist.commands.verify"),
    Command("check", BEFORE, "the nodes and links of an allocation", "mome_dist.commands.check", ranks=True),
    Command("drill", BEFORE, "break small runs on purpose, and see that they survive", "mome_dist.commands.drill"),
    Command("slurm init", BEFORE, "the scripts for sbatch, into a folder", "mome_dist.commands.slurm_init"),
    Command("doctor", HERE, "what works here, and what is missing for which command", "mome_dist.commands.doctor"),
    Command("completion", HERE, "what makes bash or zsh complete commands", "mome_dist.commands.completion"),
)
BY_NAME = {command.name: command for command in COMMANDS}


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that a line begins with, and what follows it.

    Raises:
        UserError: there is none.
    """
    for count in (2, 1):
        command = BY_NAME.get(" ".join(words[:count]))
        if command is not None and len(words) >= count:
            return command, list(words[count:])
    if not words:
        raise UserError("no command is named; mome-dist --help lists them.")
    if family := family_of(words[0]):
        names = [command.name.partition(" ")[2] for command in family]
        if len(words) == 1:
            raise UserError(f"mome-dist {words[0]} is half a command: there are {', '.join(names)}.")
        meant = did_you_mean([f"mome-dist {words[0]} {name}" for name in near(words[1], names)])
        raise UserError(
            f"unknown command mome-dist {words[0]} {words[1]}{meant or ': there are ' + ', '.join(names) + '.'}"
        )
    meant = did_you_mean([f"mome-dist {name}" for name in near(words[0], BY_NAME)])
    raise UserError(f"unknown command mome-dist {words[0]}{meant or '; mome-dist --help lists the commands.'}")


def family_of(word: str) -> list[Command]:
    """The commands of two words that begin with this one."""
    return [command for command in COMMANDS if command.name.startswith(f"{word} ")]


def main_of(command: Command) -> Callable[[list[str]], int]:
    """The function that a command is."""
    function: Callable[[list[str]], int] = importlib.import_module(command.module).main
    return function
