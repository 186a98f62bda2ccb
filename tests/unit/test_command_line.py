"""``mome-dist``: its commands, their help, the doors to them, `config`, `doctor`, and what shells are told."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mome_dist.commands import completion, launch
from mome_dist.commands.main import main
from mome_dist.commands.registry import BY_NAME, COMMANDS, Command, main_of
from mome_dist.config.comments import comments_of, read_comments
from mome_dist.config.load import load_config, load_saved_config, options_of, save_config
from mome_dist.diagnosis.facts import Facts, find_facts
from mome_dist.diagnosis.findings import judge
from mome_dist.errors import UserError
from mome_dist.launchers import local
from mome_dist.launchers.options import SlurmOptions, SubmititOptions, parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PROBE = "tests.unit.launcher_probe"
OWN_TOOLS = {"compare_avhubert", "gpu_suite", "public_avhubert"}  # of a checkout, and no command


def test_every_command_is_listed_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {command.name} ")]
        assert line.endswith(command.what)
        assert lines.index(command.group) < lines.index(line)
    assert main([]) == 0 and main(["--version"]) == 0
    assert len(BY_NAME) == len(COMMANDS)


def test_every_help_has_an_example_and_needs_nothing_heavy() -> None:
    """In one process: what one command imports, none of those after it does without."""
    code = """
import sys
from mome_dist.commands.main import main
from mome_dist.commands.registry import COMMANDS
for line in [*(command.name for command in COMMANDS), "launch slurm", "launch submitit", "launch --nproc 2 check"]:
    print(f"== {line}")
    try:
        code = main([*line.split(), "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0, line
    heavy = {"torch", "transformers", "megatron", "deepspeed", "matplotlib"} & sys.modules.keys()
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = dict(page.split("\n", 1) for page in done.stdout.split("== ")[1:])
    assert len(pages) == len(COMMANDS) + 3
    for name, page in pages.items():
        shown = name.removeprefix("launch --nproc 2 ")
        assert re.search(rf"^    (?:eval .*)?mome-dist (?:launch .*)?{shown}(?: |$)", page, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_a_command_is_the_main_of_its_module(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(main_of(command))
    seen: list[list[str]] = []

    def command_main(words: list[str]) -> int:
        seen.append(words)
        return 3

    monkeypatch.setattr(importlib.import_module(command.module), "main", command_main)
    assert main([*command.name.split(), "a", "--b"]) == 3
    assert seen == [[*command.first, "a", "--b"]]


def test_tools_and_launchers_of_a_checkout_are_doors() -> None:
    places = {path.stem: f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")}
    places |= {path.stem: f"launchers.{path.stem}" for path in (ROOT / "launchers").glob("[a-z]*.py")}
    mains = [main_of(command) for command in COMMANDS] + [launcher[0] for launcher in launch.LAUNCHERS.values()]
    doors = {name: place for name, place in places.items() if name not in OWN_TOOLS}
    assert len(doors) == 18
    for place in doors.values():
        assert importlib.import_module(place).main in mains, place


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("launch --dry-run slurm", "mome-dist slurm is half a command: there are init."),
        ("evalute runs/x", "unknown command mome-dist evalute; did you mean mome-dist evaluate?"),
        ("zzz", "mome-dist --help lists the commands"),
        ("prepare lrs4 x", "did you mean mome-dist prepare lrs3"),
        ("convert gguf", "there are avhubert, family"),
        ("train", "no experiment is named: give experiment=NAME, one of lrs2, lrs3, quickstart, tiny"),
        ("train experiment=tiny seed=0,1", "seed=[0,1]; |mome-dist launch submitit --multirun train"),
        ("train --multirun experiment=tiny", "mome-dist launch submitit --multirun train"),
        ("launch --nproc 2 --multirun train experiment=tiny", "mome-dist launch submitit --multirun train"),
        ("launch --nproc 2 train -m experiment=tiny", "mome-dist launch submitit --multirun train"),
        ("launch --nproc 2", "no command is named: add one of train, "),
        ("launch --nproc 2 experiment=tiny", "such as train experiment=tiny"),
        ("launch --nproc 2 fetch", "mome-dist fetch runs in one process"),
        ("launch train experiment=tiny --nproc 2", "--nproc is the launcher's: write it before train"),
        ("launch --nproc 2 check --restarts 3", "--restarts is the launcher's: write it before check"),
        ("launch --nprocs 2 check", "--nprocs; did you mean --nproc?"),
        ("config show a b", "'b' is not of the form key=value"),
        ("config show experiment=tinny", "did you mean tiny"),
        ("config keys nothing_like_it", "no key matches 'nothing_like_it'"),
    ],
)
def test_mistakes(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    for part in told.split("|"):
        assert part in error


@pytest.mark.parametrize(
    ("command", "old"),
    [
        (
            "--nproc 3 --dry-run check --timeout 3",
            "--nproc 3 --dry-run --module mome_dist.commands.check -- --timeout 3",
        ),
        (
            "--dry-run pretrain video --steps 2 launcher.tasks_per_node=2",
            "--dry-run launcher.tasks_per_node=2 --module mome_dist.pretrain_video --steps 2",
        ),
        (f"--dry-run --module {PROBE} x", f"--dry-run --module {PROBE} x"),
        ("local --dry-run pretrain llm", "--dry-run --module mome_dist.pretrain_llm"),
    ],
)
def test_launch_is_the_local_launcher(command: str, old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *command.split()]) == 0
    told = capsys.readouterr().out
    assert local.main(old.split()) == 0
    assert told == capsys.readouterr().out and told.count("-m ") == 1


def test_launch_starts_ranks(tmp_path: Path) -> None:
    words = ["launch", "--nproc", "2", "--module", PROBE, f"*:write-environment={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "mome_dist", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_launch_asks_slurm_for_what_its_launchers_do() -> None:
    own, command, rest = launch.divide(
        "slurm", ["launcher.nodes=2", "tasks_per_node=8", "train", "experiment=lrs3", "launcher.mem_gb=9", "seed=1"]
    )
    assert command is not None
    new = parse_arguments("slurm", "", SlurmOptions, [*own, "--module", command.module, "--", *rest], sweeps=False)
    words = ["launcher.nodes=2", "launcher.tasks_per_node=8", "launcher.mem_gb=9", "experiment=lrs3", "seed=1"]
    assert new == parse_arguments("slurm", "", SlurmOptions, words, sweeps=False)

    own, command, rest = launch.divide("submitit", ["--multirun", "nodes=2", "train", "experiment=lrs3", "seed=0,1"])
    assert command is not None
    new = parse_arguments("submitit", "", SubmititOptions, [*own, "--module", command.module, "--", *rest], sweeps=True)
    words = ["--multirun", "launcher.nodes=2", "experiment=lrs3", "seed=0,1"]
    assert new == parse_arguments("submitit", "", SubmititOptions, words, sweeps=True) and new.multirun


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=tiny"],
        ["experiment=lrs3", "method=omni_avsr/st", "optimizer.learning_rate=1e-4"],
        ["experiment=tiny", "llm.lora={rank: 8}", "mome/router=separate", "name='a: b, c'", "task.prompts.asr='1e-4'"],
    ],
)
def test_config_show_loads_again_as_the_same(
    words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", *words]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert load_saved_config(tmp_path / "config.yaml") == load_config(words)

    save_config(load_config(words), tmp_path / "config.yaml")  # as a run does
    assert main(["config", "show", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(page)
    assert load_saved_config(tmp_path / "again.yaml") == load_config(words)
    assert "\nseed: 0                            # of initial values" in page


def test_comments_are_found_at_the_keys_that_they_are_about(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "# @package _global_\n# What it is.\n#   an example\ndefaults:\n  - base   # no key\n\n"
        "a: 'b # c'   # of a\n             #   and on\n# of the section\nsection:\n  inner: 1\n  other: [1,\n    2]\n"
        "d: {e: 1}  # of d\n"
    )
    top, keys = read_comments(tmp_path / "x.yaml")
    assert top == ("What it is.", "  an example")
    assert keys == {"a": ("of a", "  and on"), "section": ("of the section",), "d": ("of d",)}


def test_the_nearest_comment_counts() -> None:
    of_key = comments_of(["experiment=lrs3"]).of_key
    assert of_key["optimizer.learning_rate"][0].startswith("peak; with task=vsr")
    assert comments_of([]).of_key["optimizer.learning_rate"] == ("peak",)
    given = comments_of(["experiment=lrs3", "optimizer.learning_rate=1"]).of_key
    assert given["optimizer.learning_rate"] == ("peak",), "what the experiment says of its own value"
    assert comments_of(["experiment=lrs3", "method=omni_avsr/st"]).of_all[-1][0] == "published/lrs3/omni_avsr"


def test_config_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "llm.lora.*"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("llm.lora.rank: unset") and any("b_random" in line for line in told)
    assert main(["config", "keys", "learning", "optimizer.learning_rate=0.5"]) == 0
    assert "optimizer.learning_rate: 0.5       # peak" in capsys.readouterr().out
    assert main(["config", "keys"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """Those of this machine, with a cache that can be written to: that of whoever runs the tests need not be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return find_facts({"HF_TOKEN": "hf_abc", "WANDB_API_KEY": "0123", "CUDA_VISIBLE_DEVICES": "", "PASSWORD": "pw"})


def test_doctor_tells_no_secret(facts: Facts) -> None:
    assert facts.environment == {"HF_TOKEN": "set", "WANDB_API_KEY": "set", "CUDA_VISIBLE_DEVICES": ""}
    told = json.dumps(facts.as_json())
    assert not any(secret in told for secret in ("hf_abc", "0123", 'pw"'))


def test_doctor_finds_nothing_broken_where_the_tests_run(facts: Facts) -> None:
    assert not [finding for finding in judge(facts) if finding.broken]
    assert (
        facts.torch["gloo"] is True and facts.packages["torch"] and facts.cpu["cores"] == len(os.sched_getaffinity(0))
    )


@pytest.mark.parametrize(
    ("changed", "what", "broken"),
    [
        ({"torch": {"error": "libcudart.so"}}, "torch cannot be imported: libcudart.so", True),
        ({"driver_gpus": ["0000:17:00.0"]}, "the driver shows 1 GPUs, torch sees 0", True),
        ({"driver_gpus": "the GPU driver did not answer"}, "the GPU driver did not answer", True),
        ({"speech": []}, "no speech synthesiser", False),
        ({"models": {"visemes": None}}, "visemes is not in the cache", False),
        ({"slurm": {"sbatch": None}}, "no sbatch", False),
        ({"packages": {"jiwer": None}}, "jiwer is not installed", False),
        ({"packages": {"av": None}}, "av is not installed", True),
        (
            {"places": {"cache": {"path": "/c", "writable": False, "free_gb": 9.0}}},
            "/c cannot be written to",
            True,
        ),
        ({"places": {"runs": {"path": "/r", "writable": True, "free_gb": 0.2}}}, "/r has 0.2 GB left", True),
    ],
)
def test_doctor_names_what_is_wrong(facts: Facts, changed: dict[str, object], what: str, broken: bool) -> None:
    (finding,) = [finding for finding in judge(replace(facts, **changed)) if finding.what.startswith(what)]  # type: ignore[arg-type]
    assert finding.broken is broken and finding.commands and finding.fix


def test_doctor_ends_with_1_where_something_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path / "cache"))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Nothing is broken.\n")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["places"]["cache"]["writable"] is False
    (finding,) = [finding for finding in found["findings"] if finding["broken"]]
    assert finding["fix"] == "set MOME_DIST_CACHE" and str(tmp_path) in finding["what"]
    assert main(["doctor"]) == 1
    page = capsys.readouterr().out
    assert "\nBroken\n" in page and page.endswith("Something is broken.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bash_completes(tmp_path: Path) -> None:
    """In a real shell, which calls this program."""
    asked = {
        "mome-dist ev": ["evaluate"],
        "mome-dist launch --nproc 2 train experiment=ti": ["tiny", "tiny_noise"],
        "mome-dist prepare lrs3 --geo": ["--geometry"],
    }
    program = tmp_path / "mome-dist"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mome_dist "$@"\n')
    program.chmod(0o755)
    lines = ['eval "$(mome-dist completion bash)"']
    for line in asked:
        lines.append(f'COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=9')
        lines.append('_python_argcomplete mome-dist 2>/dev/null; (IFS=,; echo "${COMPREPLY[*]}")')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=True)
    told = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    assert told == list(asked.values())


def test_zsh_is_told_the_same_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef mome-dist")


def test_completion_of_keys_and_groups() -> None:
    assert completion.overrides_like("experiment=") == [f"experiment={name}" for name in options_of("experiment")]
    assert completion.overrides_like("optimizer.lear") == ["optimizer.learning_rate="]
    assert completion.overrides_like("meth") == ["method="]
    assert completion.overrides_like("seed=") == []
    assert "video_corruption=" in completion.evaluation_keys("video_")


def test_a_command_that_makes_no_sense_on_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="in one process, without launch; on several run train"):
        launch.divide("local", ["doctor"])
