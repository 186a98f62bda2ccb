"""What people get wrong, and what they are told: one line that names the key or file and what to write instead.

Every row is a command as somebody types it, and words that the message must have. All run in this process through the
commands' own entry points. Nothing may load a model before it has told a mistake: the frozen models of the run here are
not there at all, so that whoever looks for them first says so.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mome_dist.data.corpus import Corpus
from mome_dist.data.media import encode_flac, encode_video
from tests.evaluation_run import make_run

ROOT = Path(__file__).resolve().parents[2]

# Commands by the word that a row begins with.
COMMANDS = {
    "train": "mome_dist.train",
    "evaluate": "mome_dist.evaluate",
    "report": "mome_dist.report",
    "transcribe": "mome_dist.transcribe",
    "pretrain_llm": "mome_dist.pretrain_llm",
    "pretrain_video": "mome_dist.pretrain_video",
    "local": "mome_dist.launchers.local",
    "slurm": "mome_dist.launchers.slurm.__main__",
    "submitit": "mome_dist.launchers.submitit.__main__",
    **{path.stem: f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")},
}
TINY = "local --dry-run --nproc 2 experiment=tiny"
OWN = f"{TINY} llm.path={{llm}} audio_encoder.path={{whisper}} video_encoder.path={{lips}} data.corpus={{corpus}}"

MISTAKES: list[tuple[str, str]] = [
    # No experiment, or a wrong one.
    ("train", "no experiment is named: give experiment=NAME|quickstart|tiny"),
    ("local --nproc 2 llm=tiny", "no experiment is named|experiment=null"),
    ("train tiny", "did you mean experiment=tiny?"),
    ("train --experiment tiny", "no options here"),
    ("train experiment=tinny", "experiment=tinny|did you mean tiny"),
    ("train experiments=tiny", "'experiments'; did you mean experiment?"),
    ("train experiment=tiny mom=ffn", "'mom'; did you mean mome?"),
    ("train experiment=tiny mome=fnn", "mome=fnn|did you mean ffn"),
    ("train experiment=tiny method=llama_mtsk", "did you mean llama_mtsk/ms"),
    ("train experiment=tiny deepspeed=zero3", "deepspeed=zero3|zero0, zero1, zero2"),
    ("train experiment=tiny llm=/models/llama", "write llm.path=/models/llama"),
    ("train --config runs/x/config.yaml", "--config|experiment=NAME"),
    # Keys of other frameworks and of other sections.
    ("train experiment=tiny lr=1e-4", "'lr'; did you mean optimizer.learning_rate?"),
    ("train experiment=tiny optimizer.lr=1e-4", "'optimizer.lr'; did you mean optimizer.learning_rate?"),
    ("train experiment=tiny training.learning_rate=1", "did you mean optimizer.learning_rate?"),
    ("train experiment=tiny num_train_epochs=3", "did you mean training.epochs?"),
    ("train experiment=tiny per_device_train_batch_size=8", "did you mean data.batch_size?"),
    ("train experiment=tiny gradient_accumulation_steps=2", "did you mean data.accumulation?"),
    ("train experiment=tiny tensor_model_parallel_size=2", "did you mean parallel.tp?"),
    ("train experiment=tiny trainer.bf16=true", "did you mean llm.precision?"),
    ("train experiment=tiny max_steps=10", "did you mean training.steps?"),
    ("train experiment=tiny gpus=2", "--nproc N|launcher.nodes=N"),
    ("train experiment=tiny trainer.devices=2", "--nproc N"),
    ("train experiment=tiny wandb=mine", "did you mean training.wandb_project?"),
    ("train experiment=tiny resume_from_checkpoint=runs/x", "did you mean training.resume?"),
    ("train experiment=tiny training.warmup_ratio=0.1", "did you mean optimizer.warmup_steps?"),
    ("train experiment=tiny optimizer.grad_clip=1", "did you mean optimizer.gradient_clipping?"),
    ("train experiment=tiny mome.num_experts=8", "did you mean mome.routed_experts?"),
    ("train experiment=tiny optimizer.wieght_decay=0", "did you mean optimizer.weight_decay?"),
    ("train experiment=tiny optimizer.momentum=0.9", "keys of optimizer: betas, epsilon"),
    ("local --dry-run experiment=tiny launcher.gpus=2", "did you mean launcher.tasks_per_node|launcher/local.yaml"),
    (
        "slurm --dry-run experiment=tiny launcher.gpus=2",
        "did you mean launcher.tasks_per_node or launcher.gpus_per_node",
    ),
    ("local --nprocs 2 experiment=tiny", "unknown option --nprocs; did you mean --nproc?"),
    ("local --module mome_dist.evalute runs/x", "mome_dist.evalute|did you mean mome_dist.evaluate?"),
    ("submitit --dry-runs experiment=tiny", "--dry-runs; did you mean --dry-run?"),
    # Values.
    (f"{TINY} optimizer.learning_rate=-1e-3", "optimizer.learning_rate=-0.001: must be at least 0"),
    (f"{TINY} optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
    (f"{TINY} optimizer.learning_rate=fast", "'optimizer.learning_rate'|'fast'|give a number"),
    (f"{TINY} optimizer.warmup_steps=500", "optimizer.warmup_steps=500|training.steps=300"),
    (f"{TINY} optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]|below 1"),
    (f"{TINY} optimizer.final_fraction=2", "optimizer.final_fraction=2.0|from 0 to 1"),
    (f"{TINY} training.steps=1e3", "'training.steps'|give a whole number"),
    (f"{TINY} training.resume=maybe", "'training.resume'|give true or false"),
    (f"{TINY} task.tasks=asr", "'task.tasks'|task.tasks=[...]"),
    (f"{TINY} task.tasks=[asr,lips]", "task.tasks='lips': choose from asr, vsr, avsr"),
    (f"{TINY} task.prompts.asr=", "task.prompts.asr is empty"),
    (f"{TINY} output_dir=", "output_dir is empty"),
    (f"{OWN} training.wandb_project=mine", "training.wandb_project='mine': wandb is not installed|mome_dist[wandb]"),
    (f"{TINY} training.wandb_group=seeds", "training.wandb_group=seeds|training.wandb_project"),
    (f"{TINY} training.wandb_project=us/mine", "training.wandb_project='us/mine'|training.wandb_entity"),
    (f"{OWN} training.init_from=runs/none", "training.init_from|runs/none: there is no such folder"),
    (f"{OWN} training.init_from={{export}}", "training.init_from={export} is an export"),
    # Layouts.
    (f"{OWN} parallel.tp=3", "parallel.tp=3|2 started processes"),
    ("local --dry-run experiment=tiny", "parallel.ep=2|start a multiple of 2 processes"),
    (f"{OWN} parallel.pp=2", "parallel.ep=2 does not divide the data-parallel size 1"),
    # What is not there.
    (TINY, "llm.path='{cache}/llms/tiny'|mome-dist pretrain llm"),
    ("local --dry-run --nproc 2 experiment=quickstart", "mome-dist fetch smollm2-135m"),
    ("local --dry-run --nproc 2 experiment=lrs3", "llm.path=hf://meta-llama/Llama-3.2-3B"),
    (f"{TINY} llm.path={{llm}}", "audio_encoder.path|mome-dist fetch whisper-tiny.en"),
    (
        f"{OWN} video_encoder=visemes video_encoder.path={{empty}}",
        "video_encoder.path='{empty}'|mome-dist convert avhubert",
    ),
    (f"{TINY} llm.path={{empty}}", "llm.path='{empty}'|hf://OWNER/NAME"),
    (f"{OWN} data.corpus={{cache}}/corpora/none", "corpora/none does not exist|mome-dist prepare synthetic"),
    (f"{OWN} data.corpus={{empty}}", "{empty}|manifest.json|mome-dist prepare"),
    (f"{OWN} data.corpus={{text}}", "notes.txt is a file, not a folder"),
    (f"{OWN} deepspeed.file={{empty}}", "{empty} is a folder, not a file; choose deepspeed=zero0"),
    (f"{OWN} data.train_split=training", "no split 'training'|train"),
    # Places of what was trained.
    ("evaluate", "a run, a checkpoint of it, or an export"),
    ("evaluate {runs}/smal", "{runs}/smal: there is no such folder; did you mean {run}?"),
    ("evaluate checkpoint={empty}", "{empty} is an empty folder; name a run"),
    ("evaluate {runs}", "{runs} holds {run}: name one of them"),
    ("evaluate {unsaved}", "is a run without a checkpoint yet|training.save_every"),
    ("evaluate {hugging_face}", "is a model of transformers"),
    ("evaluate {text}", "notes.txt is a file"),
    ("evaluate {export}", "say with output=DIR where results go"),
    ("evaluate {run} rate=asr(4)", "unknown key 'rate'; did you mean rates?"),
    ("evaluate {run} beam=4", "did you mean num_beams?"),
    ("evaluate {run} --rates asr(4)", "unknown --rates|did you mean rates?"),
    ("evaluate {run} rates=asr", "write views as asr(4)"),
    ("evaluate {run} rates=asr(44)", "asr(44) was not trained; trained are asr(4), asr(16)|untrained_rates=true"),
    ("evaluate {run} select=last", "select='last': choose latest, best or average:N"),
    ("evaluate {checkpoint} select=best", "select=best needs the directory of a run"),
    ("evaluate {run} split=tests", "no split 'tests'|test"),
    ("evaluate {run} corpus={empty}", "{empty}"),
    ("evaluate {run} noise=babel", "noise=babel does not exist; name clean, babble"),
    ("evaluate {run} num_beams=0", "num_beams=0: must be at least 1"),
    ("evaluate {run} limit=0", "limit=0 must be at least 1"),
    ("evaluate {run} baselines=[random]", "'random' is unknown; choose from chance, untrained"),
    ("report", "runs/NAME"),
    ("report {export}", "is an export|name the run"),
    ("report compare {run}", "two runs or more"),
    ("report compare {run} {runs}/smal", "did you mean {run}?"),
    ("report {runs}/none", "there is no such folder"),
    ("local --module mome_dist.evaluate {runs}/smal", "did you mean {run}?"),
    # Transcribing.
    ("transcribe {run}", "no film is named: give files, folders or patterns"),
    ("transcribe {run} {sound}", "add --audio-rate A to listen"),
    ("transcribe {run} {sound} --rate 4", "unknown option --rate; did you mean --audio-rate or --video-rate?"),
    ("transcribe {run} {text} --audio-rate 4", "notes.txt"),
    ("transcribe {run} {empty} --audio-rate 4", "{empty}: no film in this folder or below it"),
    ("transcribe {run} none.mp4 --audio-rate 4", "none.mp4 does not exist"),
    ("transcribe {run} {film} --audio-rate 4", "has no audio stream: leave out --audio-rate"),
    ("transcribe {run} {sound} --audio-rate 4 --video-rate 2", "has no video stream: leave out --video-rate"),
    ("transcribe {runs}/smal {sound} --audio-rate 4", "did you mean {run}?"),
    ("transcribe {run} {sound} --audio-rate four", "--audio-rate|invalid int value: 'four'"),
    ("transcribe {asr_only} {film} --video-rate 2", "needs video|trained without video|asr(4)"),
    ("transcribe {export} {sound} --audio-rate 4", "SHA256SUMS cannot be read|export the run again"),
    # Tools.
    ("export_adapter {run}", "required: target"),
    ("export_adapter {export} {empty}", "{empty} exists"),
    ("export_adapter {runs}/smal out", "did you mean {run}?"),
    ("inspect_checkpoint {export}", "is an export, which has no checkpoints"),
    ("average_checkpoints {run} out --last 5", "has 1 checkpoints, and 5 were asked for"),
    ("reshard_checkpoint {empty} out", "{empty} is an empty folder"),
    ("reshard_checkpoint {run}", "required: DST"),
    ("convert_avhubert {text} --output out", "notes.txt"),
    ("convert_avhubert {empty} --output out", "{empty} is a folder, not a file"),
    ("convert_avhubert none.pt --output out", "none.pt"),
    ("convert_family none.ckpt out", "none.ckpt"),
    ("convert_family {text} out --audio-rates four", "--audio-rates four: give whole numbers"),
    ("fetch_assets smollm", "smollm|smollm2-135m"),
    ("make_corpus --trian 4", "--trian; did you mean --train?"),
    ("make_corpus --train 0", "train: 0 utterances"),
    ("prepare_lrs lrs3 {empty} out", "{empty}"),
    ("prepare_lrs manifests out", "no list is given: add --train LIST"),
    ("prepare_lrs manifests out --train {text}", "notes.txt: lists end in"),
    ("plan_layout experiment=lrs3", "--gpu NAME"),
    ("plan_layout --gpu h1000 experiment=lrs3", "h1000|h100"),
    ("plan_layout --gpu h100 --llm llama-9 experiment=lrs3", "llama-9"),
    ("cache_features experiment=tiny", "mome-dist fetch whisper-tiny.en"),
    ("cache_features experiment=tiny --ouput x", "--ouput; did you mean --output?"),
    ("tune_deepspeed experiment=tiny", "required: --nproc"),
    ("tune_deepspeed --nproc 2", "no experiment is named"),
    ("fault_drill --only kil --shrink experiment=tiny", "kil"),
    ("verify_layouts --only nothing --shrink experiment=tiny", "nothing"),
    ("gpu_suite --only disptach", "disptach|dispatch"),
    ("check_cluster --writ x", "--writ; did you mean --write?"),
    ("pretrain_llm --corpus {empty}", "{empty}"),
    ("pretrain_video --corpus {empty} --step 3", "--step; did you mean --steps?"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path, tiny_corpus: Corpus) -> dict[str, Path]:
    """What the rows name, by name."""
    root = tmp_path_factory.mktemp("mistakes")
    run = make_run(root, tiny_corpus_dir)
    utterance = tiny_corpus.split("test")[0]
    found = {name: root / name for name in ("empty", "cache", "runs", "llm", "lips", "whisper", "export", "unsaved")}
    found |= {"run": run, "checkpoint": run / "checkpoints/step-000007", "corpus": tiny_corpus_dir}
    found |= {"text": root / "notes.txt", "sound": root / "sound.flac", "film": root / "film.mp4"}
    for name in ("empty", "cache", "unsaved"):
        found[name].mkdir()
    found["text"].write_text("What was said.\n")
    found["sound"].write_bytes(encode_flac(tiny_corpus.audio(utterance)))
    found["film"].write_bytes(encode_video(tiny_corpus.video(utterance)))
    shutil.copy(run / "config.yaml", found["unsaved"])
    found["hugging_face"] = found["llm"]
    found["export"].mkdir()
    config = json.dumps({"format": "mome_dist.adapter/1", "config": {"task": {"tasks": ["asr"]}}})
    (found["export"] / "config.json").write_text(config)
    found["asr_only"] = found["export"]
    # The run's own frozen models are gone.
    for file in (run / "config.yaml", run / "checkpoints/step-000007/config.yaml"):
        file.write_text(file.read_text().replace(str(root / "llm"), "/gone/llm"))
    return found


def _main(command: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command]).main
    return main


@pytest.mark.parametrize(("row", "words"), MISTAKES, ids=[row for row, _ in MISTAKES])
def test_a_mistake_is_told_with_its_fix(
    row: str,
    words: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOME_DIST_CACHE", str(places["cache"]))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where the extra is not installed
    named = {name: str(path) for name, path in places.items()}
    command, *arguments = shlex.split(row.replace("(", "'('").replace(")", "')'").format(**named))
    monkeypatch.setattr("sys.argv", [command, *arguments])
    code = _main(command)(arguments)
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2
    for part in words.format(**named).split("|"):
        assert part in line, line
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


QUICK = [
    ["transcribe", "{run}", "{sound}", "--audio-rate", "4", "--video-rate", "2"],
    ["transcribe", "{asr_only}", "{film}", "--video-rate", "2"],
    ["evaluate", "{run}", "rates=asr(44)"],
    ["evaluate", "{run}", "split=tests"],
    ["report", "{export}"],
    ["commands.convert_avhubert", "none.pt"],
    ["commands.convert_avhubert", "{text}", "--output", "{empty}"],
    ["commands.convert_family", "none.ckpt", "out"],
    ["commands.export", "none", "out"],
    ["commands.export", "{run}", "{empty}"],
    ["commands.average", "none", "out"],
    ["pretrain_llm", "--corpus", "{empty}"],
    ["commands.launch", "--nproc", "2", "pretrain", "llm", "--corpus", "{empty}"],
    ["commands.launch", "slurm", "--dry-run", "pretrain", "video", "--corpus", "none"],
    ["pretrain_video", "--corpus", "none"],
    ["pretrain_llm", "--corpus", "{corpus}", "--out", "{run}"],
    ["train", "experiment=tiny", "lr=1"],
    ["train", "experiment=tiny"],
    ["commands.verify", "experiment=nothing"],
    ["commands.reshard", "none", "out"],
]


def test_mistakes_are_told_before_torch_is_imported(places: dict[str, Path], tmp_path: Path) -> None:
    """It alone takes longer than a mistake should; so nothing that computes can have been loaded."""
    rows = [[word.format(**{name: str(path) for name, path in places.items()}) for word in row] for row in QUICK]
    code = f"""
import importlib, sys
for command, *arguments in {rows!r}:
    assert importlib.import_module("mome_dist." + command).main(arguments) == 2
    assert "torch" not in sys.modules, command
"""
    environment = {**os.environ, "MOME_DIST_CACHE": str(places["cache"]), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(QUICK)
