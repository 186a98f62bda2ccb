"""The commands that the Slurm launchers make: sbatch, srun, containers, Submitit's parameters."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mome_dist.config.load import register_resolvers
from mome_dist.errors import UserError
from mome_dist.launchers.options import (
    Request,
    SlurmOptions,
    SubmititOptions,
    cores_of_rank,
    load_options,
    parse_arguments,
)
from mome_dist.launchers.slurm.__main__ import job_environment, sbatch_command
from mome_dist.launchers.slurm.allocation import load_steps
from mome_dist.launchers.slurm.allocation import parse_arguments as parse_job_arguments
from mome_dist.launchers.slurm.job import Job
from mome_dist.launchers.slurm.steps import Steps
from mome_dist.launchers.submitit.__main__ import parameters
from mome_dist.launchers.submitit.sweep import hydra_arguments
from mome_dist.launchers.submitit.task import RankTask
from mome_dist.paths import configs_dir

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "mome_dist.train"


def request(*arguments: str) -> Request:
    return parse_arguments("slurm", "", SlurmOptions, arguments, sweeps=False)


def slurm(*arguments: str) -> SlurmOptions:
    return load_options("slurm", SlurmOptions, request(*arguments))


def submitit(*arguments: str) -> SubmititOptions:
    asked = parse_arguments("submitit", "", SubmititOptions, arguments, sweeps=True)
    return load_options("submitit", SubmititOptions, asked)


def test_a_rank_has_a_core_for_each_thread_that_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cores_of_rank(TRAIN, ["experiment=lrs3"]) == 6  # four decode
    assert cores_of_rank(TRAIN, ["experiment=lrs3", "data.decode_threads=9"]) == 11
    assert cores_of_rank(TRAIN, ["experiment=tiny"]) == cores_of_rank("mome_dist.evaluate", ["checkpoint=x"]) == 2
    asked = request("experiment=lrs3")
    assert "--cpus-per-task=6" in sbatch_command(asked, slurm("experiment=lrs3"))
    assert slurm("experiment=lrs3", "launcher.cpus_per_task=16").cpus_per_task == 16


@pytest.mark.parametrize("script", ["train.sh", "train_lrs2.sh", "train_lrs3.sh", "eval.sh"])
def test_a_script_that_is_submitted_asks_for_those_cores(script: str) -> None:
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    (asked,) = [int(line.partition("=")[2]) for line in lines if line.startswith("#SBATCH --cpus-per-task=")]
    experiment = script.removesuffix(".sh").removeprefix("train_")
    wanted = cores_of_rank(TRAIN, [f"experiment={experiment}"]) if experiment.startswith("lrs") else 2
    assert asked >= wanted


def test_submitit_gives_ranks_their_cores_interface_and_options() -> None:
    given = submitit("experiment=lrs3", "launcher.interface=ib0", "launcher.srun=['--mpi=none']")
    assert parameters(given, "x")["slurm_srun_args"] == [
        *("--kill-on-bad-exit=1", "--distribution=block", "--cpus-per-task=6", "--mpi=none")
    ]
    assert parameters(given, "x")["cpus_per_task"] == 6
    # Submitit pickles what it starts; these bytes are of this process.
    task = pickle.loads(pickle.dumps(RankTask("this_module_says_nothing", (), 3, given.variables)))
    assert task.variables == {"MOME_DIST_INTERFACE": "ib0"}


def test_a_sweep_gives_them_the_same() -> None:
    awkward = "--comment=it's a \\ b"
    options = SubmititOptions(cpus_per_task=6, interface="ib0", srun=[awkward])
    words = hydra_arguments(options, ["experiment=tiny"], Path("runs/x"))
    register_resolvers()
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        config = compose("config", words[1:], return_hydra_config=True)
    assert list(config.hydra.launcher.srun_args) == options.srun_arguments
    assert "--cpus-per-task=6" in options.srun_arguments and options.srun_arguments[-1] == awkward
    assert config.hydra.job.env_set == {"MAX_TRIES": "3", "MOME_DIST_INTERFACE": "ib0"}


def test_options_of_srun_and_the_container_go_with_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    own = ["launcher.srun=['--mpi=none']", "launcher.container.image=/i/m.sqsh", "launcher.container.mounts=[/d,/s:/t]"]
    words = ["experiment=tiny", "launcher.nodes=2", "launcher.interface=ib0", *own]
    command = sbatch_command(request(*words), slurm(*words))
    script = command.index("slurm/train.sh")
    assert command[script + 1 :] == [*own, "experiment=tiny"]
    assert job_environment(slurm(*words))["MOME_DIST_INTERFACE"] == "ib0"
    module, rest, inside = parse_job_arguments(command[script + 1 :])
    assert (module, rest) == (TRAIN, ["experiment=tiny"])
    assert load_steps(inside).command(["--ntasks=4"], "some.module", "a b") == [
        *("srun", "--ntasks=4", "--mpi=none", "--container-image=/i/m.sqsh"),
        f"--container-mounts={ROOT}:{ROOT},/d:/d,/s:/t",
        *(f"--container-workdir={ROOT}", "python", "-m", "some.module", "a b"),
    ]


def test_other_containers_are_words_before_the_command() -> None:
    steps = load_steps(
        ["launcher.container.prefix=[apptainer,exec,'--nv',my image.sif]", "launcher.container.python=py"]
    )
    assert steps.command([], "m") == ["srun", "apptainer", "exec", "--nv", "my image.sif", "py", "-m", "m"]
    assert Steps().command(["-n2"], "m") == ["srun", "-n2", sys.executable, "-m", "m"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("launcher.container.mounts=[/data]", r"launcher.container.image is not.*--bind"),
        ("launcher.srun=none", "'srun'.*is not a ListConfig"),
        ("launcher.nodes=2", "launcher.nodes=2: inside a job only launcher.srun and launcher.container act"),
    ],
)
def test_what_would_not_act_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_steps([word])
    if "nodes" not in word:
        with pytest.raises(UserError, match=message):
            slurm("experiment=tiny", word)


def test_gpus_without_cores_for_their_ranks_are_refused() -> None:
    allocated = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "8"}
    with pytest.raises(UserError, match=r"8 cores on a node for 8 ranks of 8: add --ntasks-per-node=8"):
        Job.from_environment(allocated)


def test_a_rank_of_submitit_has_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr("mome_dist.launchers.submitit.rank.run_rank", lambda *_: seen.update(os.environ))
    monkeypatch.setenv("MOME_DIST_INTERFACE", "wrong")
    RankTask("m", (), 3, {"MOME_DIST_INTERFACE": "ib0"})()
    assert seen["MOME_DIST_INTERFACE"] == "ib0"
