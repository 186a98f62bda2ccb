"""Every message leads somewhere: files, sections, commands, options, keys and groups that the source names exist.

Messages are read from the source, so that a new one is checked as well. What a message fills in is left out of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from mome_dist.commands.launch import LAUNCHERS
from mome_dist.commands.launch import command_line as launch_line
from mome_dist.commands.registry import BY_NAME, family_of
from mome_dist.config.load import _known_keys, groups, options_of
from mome_dist.config.schema import RunConfig
from mome_dist.data.preparation.clips import SPLITS
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.evaluation.request import EvaluationRequest
from mome_dist.hints import ELSEWHERE, NAMES, hint
from mome_dist.launchers.options import LocalOptions, SlurmOptions, SubmititOptions
from mome_dist.origins import HUB, MADE
from mome_dist.paths import configs_dir

ROOT = Path(__file__).resolve().parents[2]
FILLED = "\0"  # stands for what a message fills in
COMMAND = r"(?<![\w/-])mome-dist((?: +(?![.,;:(])[^\s`'\")\0]+)+)"
RUN_KEYS = frozenset(_known_keys(RunConfig, "")) | {"mome.router.name"}  # a router's settings are those of its kind
LAUNCHER_KEYS = frozenset(
    f"launcher.{key}" for schema in (LocalOptions, SlurmOptions, SubmititOptions) for key in _known_keys(schema, "")
)
GROUPS = tuple(groups())
# Of git, pip, hf, sbatch, srun, scontrol and apptainer.
FOREIGN = {"--local-dir", "--include", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--array"}
FOREIGN |= {"--bind"}


def _text(node: ast.expr) -> str | None:
    """A string of the source, an f-string too."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or FILLED if isinstance(part, ast.Constant) else FILLED for part in node.values)
    return None


def _strings(tree: ast.AST) -> Iterator[str]:
    """All strings, each once: pieces of an f-string are no strings of their own."""
    text = _text(tree) if isinstance(tree, ast.expr) else None
    if text is not None:
        yield text
        nested = [part.value for part in getattr(tree, "values", []) if isinstance(part, ast.FormattedValue)]
        for part in nested:
            yield from _strings(part)
        return
    for child in ast.iter_child_nodes(tree):
        yield from _strings(child)


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in ("mome_dist", "launchers", "tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


@cache
def texts() -> list[tuple[str, str]]:
    """Every string of the source with its file; docstrings are what ``--help`` prints."""
    return [(str(path), text) for path, tree in _trees() for text in _strings(tree)]


@cache
def messages() -> list[tuple[str, str]]:
    """What errors are raised with, with its file."""
    found = []
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                found += [(str(path), text) for argument in node.args for text in _strings(argument)]
    return found


@cache
def options() -> set[str]:
    """Every option that a command of the project defines."""
    found = set()
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found |= {text for argument in node.args for text in _strings(argument) if text.startswith("--")}
    return found


def _wrong(pattern: str, strings: list[tuple[str, str]], right: object) -> list[str]:
    """What a pattern finds in strings and is not right."""
    assert callable(right)
    compiled = re.compile(pattern)
    found = [(path, match) for path, text in strings for match in compiled.finditer(text)]
    assert found, f"nothing matches {pattern}: this test looks at nothing"
    return [f"{path}: {match[0]}" for path, match in found if not right(match)]


def test_files_and_sections() -> None:
    sections = re.compile(r"README(?:\.md)?,? \(?['\"]")
    assert not any(sections.search(text) for _, text in texts()), "name the page of docs/: sections of the README move"
    assert not _wrong(r"(?<![\w./])docs/[\w/-]+\.md", texts(), lambda found: (ROOT / found[0]).is_file())
    assert not _wrong(r"(?<![\w./])slurm/\w+\.sh", texts(), lambda found: (ROOT / found[0]).is_file())
    assert not _wrong(r"(?<![\w./])configs/[\w/]+(?:\.\w+)?(?![\w/]*\0)", texts(), _is_config)


def _is_config(found: re.Match[str]) -> bool:
    place = ROOT / found[0].rstrip("/")
    if place.name.isupper():  # a name that the reader fills in
        place = place.parent
    # Examples of what a user would write there.
    return place.exists() or place.name in ("planned.yaml", "planned.json", "tuned.json")


def test_commands() -> None:
    assert not _wrong(r"(?<![\w/])tools/\w+\.(?:py|sh)", texts(), lambda found: (ROOT / found[0]).is_file())
    assert not _wrong(COMMAND, texts(), lambda found: _is_command(found[1]))
    yaml_and_shell = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "slurm").iterdir()]
    comments = [(str(path), path.read_text(encoding="utf-8")) for path in yaml_and_shell if path.is_file()]
    assert not _wrong(COMMAND, comments, lambda found: _is_command(found[1]))
    example = ("my.module", "module", "MODULE")
    assert not _wrong(
        r"(?:python|PYTHON\") -m ([\w]+(?:\.\w+)*)", texts(), lambda found: found[1] in example or find_spec(found[1])
    )


def _is_command(line: str) -> bool:
    """Whether what follows ``mome-dist`` begins with a command, and under ``launch`` with options and another one."""
    line = re.split(r"[.,:;](?:\s|$)", f"{line} ")[0]
    words = line.split()
    if words[0] == "launch":
        launcher = words[1] if words[1:2] and words[1] in LAUNCHERS else "local"
        parser = launch_line(launcher)
        own, rest = parser.divide(words[1 + (launcher != "local") :], lambda word: "=" in word)
        known = all(parser.has_option(word) for word in own if word.startswith("-"))
        return known and (not rest or _is_command(" ".join(rest)))
    if family_of(words[0]) and (len(words) == 1 or words[1].startswith("-")):
        return True
    return words[0] in ("COMMAND", "--help", "--version") or " ".join(words[:2]) in BY_NAME or words[0] in BY_NAME


def test_a_wrong_command_is_seen() -> None:
    for right in ("prepare lrs3 /data", "prepare", "launch --nproc 2 train x=1", "launch slurm.", "launch --nproc N"):
        assert _is_command(right)
    for wrong in ("prepares", "prepare lrs4", "launch --nprocs 2 train", "launch --nproc 2 trains", "launch slurms x"):
        assert not _is_command(wrong)


def test_options() -> None:
    made = {f"--{field.name.replace('_', '-')}" for field in fields(PreparationSettings)}  # mome-dist prepare
    made |= {f"--{split}" for split in SPLITS}
    known = options() | made | FOREIGN | {"--help"}
    assert not _wrong(r"(?<![\w-])--[a-z][a-z-]+(?![\w-]*\0)", messages(), lambda found: found[0] in known)


def test_keys_and_groups() -> None:
    sections = {key.partition(".")[0] for key in RUN_KEYS if "." in key}
    ends = r"(?!\.?(?:json|yaml|jsonl|py|tar)\b)"
    assert not _wrong(
        rf"(?<![\w./\0-])(?:{'|'.join(sections)})\.{ends}[a-z_]+(?:\.[a-z_]+)*(?![\w]*[\0(])",
        messages(),
        lambda found: found[0] in RUN_KEYS,
    )
    assert not _wrong(
        r"(?<![\w./])launcher\.[a-z_]+(?:\.[a-z_]+)*(?!\w*\0)", messages(), lambda found: found[0] in LAUNCHER_KEYS
    )
    assert not _wrong(
        rf"(?<![\w./])({'|'.join(GROUPS)})=([a-z][\w/]*)(?!\w*\0)",
        messages(),
        lambda found: found[2] == "null" or found[2] in options_of(found[1]),
    )


def test_every_name_of_another_framework_leads_to_a_key() -> None:
    evaluation = frozenset(_known_keys(EvaluationRequest, ""))
    assert NAMES.keys() <= RUN_KEYS | LAUNCHER_KEYS | evaluation
    words = [name for names in (*NAMES.values(), *ELSEWHERE) for name in names.split()]
    for name in words:
        for known in (RUN_KEYS, LAUNCHER_KEYS, evaluation):
            assert "\0" not in hint(name, known)
    for wrong, right in {
        "lr": "optimizer.learning_rate",
        "num_train_epochs": "training.epochs",
        "per_device_train_batch_size": "data.batch_size",
        "gradient_accumulation_steps": "data.accumulation",
        "tensor_model_parallel_size": "parallel.tp",
        "pipeline_model_parallel_size": "parallel.pp",
        "expert_model_parallel_size": "parallel.ep",
        "bf16": "llm.precision",
        "max_steps": "training.steps",
        "wandb": "training.wandb_project",
        "output_dir": "output_dir",
        "resume_from_checkpoint": "training.resume",
        "warmup_ratio": "optimizer.warmup_steps",
        "weight_decay": "optimizer.weight_decay",
        "grad_clip": "optimizer.gradient_clipping",
    }.items():
        for key in (wrong, f"trainer.{wrong}", f"optimizer.{wrong}"):
            assert f"did you mean {right}" in hint(key, RUN_KEYS), key


@pytest.mark.parametrize("section", ["llm", "audio_encoder", "video_encoder"])
def test_every_model_that_a_group_names_has_an_origin(section: str) -> None:
    """The file of the option names the same command, or the same model of the hub."""
    for path in (configs_dir() / section).glob("*.yaml"):
        text = path.read_text()
        for name in re.findall(r"^path: \$\{cache:\w+/([\w.-]+)\}", text, re.MULTILINE):
            assert name in MADE or name in HUB, path
            told = HUB.get(name) or re.findall(r"`(mome-dist [a-z ]*[a-z])", MADE[name])[0]
            assert told in text, f"{path} does not name {told}"
