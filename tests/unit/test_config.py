"""Wrong inputs end before training with one message that names the key or file and the fix."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mome_dist.assets import asset_dir
from mome_dist.config import RunConfig, load_config, save_config
from mome_dist.config.derived import schedule_of
from mome_dist.config.load import load_saved_config, register_resolvers
from mome_dist.config.schema import TaskWeights
from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.paths import configs_dir
from mome_dist.preflight import settled_order, validate, validate_overrides, validation_batches
from mome_dist.speech.video_encoder import VideoEncoder


@pytest.fixture(scope="module")
def overrides(tiny_corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A valid run over the real SmolLM2."""
    folder = tmp_path_factory.mktemp("config")
    VideoEncoder().save_pretrained(folder / "video")
    return [
        "experiment=quickstart",
        f"llm.path={asset_dir('smollm2-135m')}",
        f"audio_encoder.path={asset_dir('whisper-tiny.en')}",
        f"video_encoder.path={folder / 'video'}",
        f"data.corpus={tiny_corpus_dir}",
        f"output_dir={folder / 'run'}",
    ]


def test_a_valid_configuration_passes(overrides: list[str]) -> None:
    assert validate(load_config(overrides), world_size=2).describe() == "2 processes = tp 1 x pp 1 x dp 2 (ep 2)"
    validate(load_config([*overrides, "data.batch_size=null", "data.max_frames=900"]), world_size=2)


@pytest.mark.parametrize("experiment", ["lrs2", "lrs3"])
def test_the_papers_runs_are_ten_epochs_of_whatever_was_prepared(experiment: str) -> None:
    assert load_config([f"experiment={experiment}"]).training.epochs == 10
    short = [f"experiment={experiment}", "training.steps=7"]
    with pytest.raises(UserError, match=r"training\.steps=7 would have no effect.*add training\.epochs=null"):
        load_config(short)
    assert load_config([*short, "training.epochs=null"]).training.steps == 7


def test_epochs_decide_the_steps(tiny_corpus_dir: Path) -> None:
    train = Corpus.open(tiny_corpus_dir).split("train")  # 24 utterances
    for settings, steps in (
        (["training.steps=7"], 7),
        (["training.steps=7", "training.epochs=2"], 3),
        (["training.epochs=2", "data.batch_size=null", "data.max_frames=100000"], 2),
    ):
        config = load_config(["experiment=tiny", *settings])
        assert settled_order(config, train, Layout.for_world(1))[1] == steps


@pytest.mark.parametrize("batches", [("data.batch_size=8",), ("data.batch_size=null", "data.max_frames=3000")])
@pytest.mark.parametrize("utterances", [7, 8, 9, 30])
def test_a_validation_sees_every_utterance_once_whatever_the_ranks(batches: tuple[str, ...], utterances: int) -> None:
    clips = [Utterance(f"u{number}", "", "", "", 0, 50 + 40 * number, {}) for number in range(utterances)]
    for world in (1, 2, 7):
        config = load_config(["experiment=tiny", "parallel=single", *batches])
        validation = validation_batches(config, clips, Layout.for_world(world))
        assert sorted(index for batch in validation for index in batch) == list(range(utterances))
        assert min(map(len, validation)) >= world
    assert validation_batches(load_config(["experiment=tiny", "training.validate_every=0"]), clips, LAYOUT) == []


LAYOUT = Layout.for_world(1)
BY_RATES = ["task.sampling=rates"]

WRONG = [
    (["mome.top_kk=3"], 2, r"unknown configuration key 'mome.top_kk'; did you mean mome.top_k"),
    (["+mome.extra=3"], 2, r"unknown configuration key 'mome.extra'"),
    (["mome.top_k=many"], 2, r"'mome.top_k'.*'many'.*Integer"),
    (["experiment=nothing"], 2, r"experiment/nothing.*quickstart.*tiny"),
    (["steps"], 2, r"'steps' is not of the form key=value"),
    (["mome.router=separate"], 2, r"write mome/router=NAME"),
    (["mome/router=nothing"], 2, r"mome/router=nothing: there is no configs/mome/router/nothing.yaml.*separate.*top_k"),
    (["mome.router.name=nothing"], 2, r"mome.router.name='nothing': choose from top_k, separate"),
    (["+mome.router.by=task"], 2, r"mome.router.by of the router 'top_k': Key 'by' not in .*see configs/mome/router"),
    (["mome/router=separate", "mome.router.by=view"], 2, r"mome.router.by='view': choose from rate, task, modality"),
    (["mome=none", "mome/router=separate"], 2, r"mome/router=separate would have no effect: the run has no experts"),
    (["mome.top_k=1"], 2, r"mome.top_k=1 and mome.renormalize=true: .* learns nothing.*mome.renormalize=false"),
    (["mome.score=relu"], 2, r"mome.score='relu': choose from softmax, sigmoid"),
    (["mome.bias_rate=-0.1"], 2, r"mome.bias_rate=-0.1: must be at least 0"),
    (["mome.placement=attention"], 2, r"mome.placement='attention': choose from mhsa, ffn, layer"),
    (["data.validation_split=test"], 2, r"validation_split and data.test_split are both 'test'.*another validation"),
    (["decoding.max_new_tokens=null"], 2, r"max_new_tokens=null leaves .* without any limit"),
    (["decoding.num_beams=0"], 2, r"decoding.num_beams=0: must be at least 1"),
    (["task.tasks=[asr,lip]"], 2, r"task.tasks='lip': choose from asr, vsr, avsr"),
    (
        ["parallel.tp=2"],
        4,
        r"parallel.tp=2 does not divide the LLM's 9 attention heads in 3 key-value groups.*pad_heads",
    ),
    (["parallel.tp=3"], 2, r"parallel.tp=3 x parallel.pp=1 = 3 does not divide the 2 started processes"),
    (["parallel.pp=31", "parallel.ep=1"], 31, r"parallel.pp=31 is more than the LLM's 30 layers"),
    (
        ["parallel.pp=4"],
        8,
        r"parallel.pp=4 does not divide the LLM.s 30 layers: choose from .* or say with parallel.stage_layers",
    ),
    (
        ["parallel.pp=2", "parallel.ep=1", "parallel.stage_layers=[10,10]"],
        2,
        r"parallel.stage_layers=\[10, 10\] adds up to 20, but the LLM has",
    ),
    (
        ["parallel.pp=2", "parallel.ep=1", "parallel.stage_layers=[30]"],
        2,
        r"parallel.stage_layers=\[30\] names 1 stages, but there are 2",
    ),
    (["parallel.virtual=2"], 2, r"parallel.virtual=2 interleaves pipeline stages, but parallel.pp=1"),
    (["data.accumulation=often"], 1, r"data.accumulation='often': give a number of microbatches, or auto"),
    (
        ["data.accumulation=2", "data.microbatch_tokens=500"],
        1,
        r"microbatch_tokens=500 .* only with data.accumulation=auto",
    ),
    (
        ["parallel.pp=3", "parallel.ep=1", "parallel.virtual=2", "data.validation_utterances=2"],
        3,
        r"but 3 are needed, one for each of 1 data-parallel ranks in every microbatch \(data.accumulation=auto\)",
    ),
    (["data.microbatch_tokens=0"], 1, r"data.microbatch_tokens=0: must be at least 1"),
    (
        ["parallel.pp=3", "parallel.ep=1", "parallel.virtual=2", "data.accumulation=2"],
        3,
        r"needs a multiple of parallel.pp=3 microbatches a step, but data.accumulation=2: choose a multiple, or auto",
    ),
    (["parallel.sequence_parallel=true"], 2, r"parallel.sequence_parallel=true splits sequences .* parallel.tp=1"),
    (
        ["parallel.ep=2", "mome.dispatch=local"],
        2,
        r"mome.dispatch=local keeps every expert on every rank, but parallel.ep=2",
    ),
    (["parallel.recompute=most"], 1, r"parallel.recompute='most': choose from none, selective, full"),
    (["mome=none"], 2, r"parallel.ep=2 spreads routed experts over ranks, but the run has none.*: set parallel.ep=1"),
    (["mome=none", "parallel.ep=1", "mome.top_k=3"], 2, r"mome.top_k=3 would have no effect: the run has no experts"),
    (["mome.routed_experts=-1"], 2, r"mome.routed_experts=-1: must be at least 0"),
    (["mome.expert=wide"], 2, r"mome.expert='wide': choose from bottleneck, gated, linear"),
    (["mome.routed_experts=1"], 2, r"mome.routed_experts=1 leaves the router nothing to choose: .*routed_experts=0"),
    (
        ["mome.routed_experts=0", "mome.shared_experts=0"],
        1,
        r"mome.routed_experts=0 and mome.shared_experts=0 leave no",
    ),
    (["method=dense_bottleneck", "mome.top_k=3"], 1, r"mome.top_k=3 would have no effect: the run has no routed exper"),
    (["method=dense_bottleneck", "parallel.ep=2"], 2, r"parallel.ep=2 spreads routed experts over ranks, but the run"),
    (["mome.placement=none", "mome.top_k=3"], 2, r"mome.top_k=3 would have no effect: the run has no experts"),
    (
        ["mome=none", "parallel.ep=1", "projector.trainable=false", "training.init_from=runs/other"],
        2,
        r"mome.placement=none and projector.trainable=false leave nothing to train: set projector.trainable=true",
    ),
    (["mome.routed_experts=23"], 2, r"parallel.ep=2 does not divide mome.routed_experts=23: choose ep from \[1\]"),
    (["parallel.ep=2"], 3, r"parallel.ep=2 does not divide the data-parallel size 3"),
    (["parallel.ep=0"], 2, r"parallel.ep=0: must be at least 1"),
    (["mome.top_k=25"], 2, r"mome.top_k=25 is more than mome.routed_experts=24"),
    (["task.avsr_audio_rates=[4,0]"], 2, r"task.avsr_audio_rates=\[4, 0\]: give rates of at least 1"),
    (["task.views_per_step=9"], 2, r"task.views_per_step=9: must be null or from 1 to 8"),
    (["task.sampling=pairs"], 2, r"task.sampling='pairs': choose from views, rates"),
    (
        [*BY_RATES, "task.views_per_step=2"],
        2,
        r"task.views_per_step=2 would have no effect: .* Set it to null, or task.sampling=vi",
    ),
    (
        [*BY_RATES, "task.asr_audio_rates=[4]"],
        2,
        r"task.asr_audio_rates=\[4\] and task.avsr_audio_rates=\[4, 16\]: .* make them equal, or set task.sampling=v",
    ),
    (
        [*BY_RATES, "task.tasks=[vsr,avsr]", "task.vsr_video_rates=[1,5]"],
        2,
        r"task.vsr_video_rates=\[1, 5\] and task.avsr_video_rates=\[2, 5\]: .* make them equal",
    ),
    (["task.weights.vsr=-1"], 2, r"task.weights.vsr=-1.0: a weight is a number of at least 0"),
    (["task.weights.vsr=inf"], 2, r"task.weights.vsr=inf: a weight is a number of at least 0"),
    (["task.weights.lip=1"], 2, r"unknown configuration key 'task.weights.lip'"),
    (
        ["task.tasks=[asr,vsr]", "task.weights={asr: 0, vsr: 0}"],
        2,
        r"task.weights gives each of task.tasks=\['asr', 'vsr'\] a weight of 0",
    ),
    (
        ["task.tasks=[asr,vsr]", "task.weights.vsr=0"],
        2,
        r"task.weights.vsr=0 leaves the video projector without a task to train on: leave vsr out of task.tasks, or",
    ),
    (
        ["task.asr_audio_rates=[4,8]", "task.weights.asr=0", "projector.per_rate=true"],
        2,
        r"task.weights.asr=0 leaves the audio projector of rate 8 without a task to train on",
    ),
    (["data.batch_size=15"], 2, r"data.batch_size=15 is not a multiple of 2"),
    (["data.max_frames=900"], 2, r"data.batch_size=16 and data.max_frames=900: .* set one of them"),
    (["data.batch_size=null"], 2, r"data.batch_size=None and data.max_frames=None: .* set one of them"),
    (["data.batch_size=null", "data.max_frames=0"], 2, r"data.max_frames=0: must be at least 1"),
    (
        ["data.batch_size=null", "data.max_frames=30"],
        2,
        r"data.max_frames=30 has no room for train-\d+ \(\d+\), .*more",
    ),
    (
        ["data.batch_size=null", "data.max_frames=120"],
        2,
        r"step \d+ would have 1 utterances, but 2 = .*raise data.max_f",
    ),
    (["training.epochs=0"], 2, r"training.epochs=0: must be at least 1"),
    (
        ["data.batch_size=10", "data.accumulation=5"],
        2,
        r"validation uses 4 utterances of split 'validation', but 10 are needed, .* set training.validate_every=0",
    ),
    (["projector.compression=stack"], 2, r"projector.compression=stack needs projector.per_rate=true"),
    (["llm.path=/nowhere"], 2, r"llm.path='/nowhere': /nowhere/config.json does not exist.*hf://OWNER/NAME"),
    (["audio_encoder.path=/nowhere"], 2, r"audio_encoder.path='/nowhere' holds no encoder.*a Hugging Face Whisper"),
    (["video_encoder.path=/nowhere"], 2, r"video_encoder.path='/nowhere' holds no encoder.*mome-dist pretrain video"),
    (["data.corpus=/nowhere"], 2, r"/nowhere"),
    (["data.train_split=dev"], 2, r"'?dev'?"),
    (["augmentation=paper"], 2, r"data.features=cached reads .* set data.features=online, or augmentation=none"),
    (["augmentation.flip=0.5"], 2, r"data.features=cached reads .* set data.features=online"),
    (["data.features=live"], 2, r"data.features='live': choose from cached, online"),
    (["augmentation.flip=1.5", "data.features=online"], 2, r"augmentation.flip=1.5: a probability is from 0 to 1"),
    (["augmentation.noise.probability=-1"], 2, r"augmentation.noise.probability=-1.0: a probability"),
    (["augmentation.crop=0"], 2, r"augmentation.crop=0: must be at least 1"),
    (["augmentation.video_time_mask.stride=0"], 2, r"augmentation.video_time_mask.stride=0: must be at least 1"),
    (
        ["augmentation.modality_dropout.audio=0.6", "augmentation.modality_dropout.video=0.6"],
        2,
        r"audio=0.6 and video=0.6 add up to more than 1",
    ),
    (
        [f"augmentation.modality_dropout.{key}" for key in ("schedule=linear", "audio_to=0.6", "video=0.5")],
        2,
        r"audio_to=0.6 and video_to=0.5 add up to more than 1",
    ),
    (["augmentation.modality_dropout.audio_to=2"], 2, r"modality_dropout.audio_to=2.0: a probability is from 0 to 1"),
    (["augmentation.modality_dropout.audio_to=0.5"], 2, r"schedule=constant with audio_to=0.5 and video_to=None"),
    (["augmentation.modality_dropout.schedule=cosine"], 2, r"schedule=cosine with audio_to=None and video_to=None"),
    (["augmentation.modality_dropout.over=0"], 2, r"modality_dropout.over=0.0: a share of training.steps is above 0"),
    (["augmentation.modality_dropout.schedule=step"], 2, r"schedule='step': choose from constant, linear, cosine"),
    (["augmentation=paper", "augmentation.noise.snr=[]"], 2, r"augmentation.noise.snr is empty"),
    (["augmentation.noise.snr=[loud]"], 2, r"'augmentation.noise.snr.*'loud'.*Float"),
    (
        ["augmentation=paper", "data.features=online", "augmentation.noise.source=/nowhere"],
        2,
        r"/nowhere does not exist; give one with WAV or FLAC recordings of noise",
    ),
    (["deepspeed.file=none.json"], 2, r"deepspeed.file='none.json': .*none.json does not exist"),
]


@pytest.mark.parametrize(("wrong", "world", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_values_are_named(overrides: list[str], wrong: list[str], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate_overrides("mome_dist.train", [*overrides, *wrong], world)
    assert "\n" not in str(error.value)


def _damage(corpus: Path, kind: str) -> None:
    shard = next(corpus.glob("train-*.tar"))
    if kind == "missing shard":
        shard.unlink()
    elif kind == "empty shard":
        shard.write_bytes(b"")
    elif kind == "empty split":
        (corpus / "train.jsonl").write_text("")
    else:
        (corpus / "manifest.json").unlink()


@pytest.mark.parametrize("kind", ["missing shard", "empty shard", "empty split", "missing manifest"])
def test_broken_corpora_are_named(overrides: list[str], tiny_corpus_dir: Path, tmp_path: Path, kind: str) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus_dir, corpus)
    _damage(corpus, kind)
    with pytest.raises(UserError, match=re.escape(str(corpus))):
        validate(load_config([*overrides, f"data.corpus={corpus}"]), 2)


def test_the_launcher_prints_the_message_once_and_starts_nothing(overrides: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launchers.local", "--nproc", "2", *overrides, "mome.top_k=25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("mome.top_k=25 is more than mome.routed_experts=24") == 1
    assert "Traceback" not in done.stderr


def test_every_rank_refuses_by_itself_when_no_launcher_checked(overrides: list[str]) -> None:
    command = [sys.executable, "-m", "mome_dist.train", *overrides, "task.vsr_video_rates=[0]"]
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 2
        assert "task.vsr_video_rates=[0]: give rates of at least 1" in done.stderr


def test_a_saved_configuration_is_the_one_that_ran(overrides: list[str], tmp_path: Path) -> None:
    config = load_config([*overrides, "training.steps=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == config


def test_ratios_of_zero_and_clean_survive_the_configuration(overrides: list[str], tmp_path: Path) -> None:
    paper = load_config(["augmentation=paper", "data.features=online"])
    assert paper.augmentation.noise.snr == [-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, None]
    config = load_config([*overrides, "augmentation=paper", "data.features=online", "augmentation.noise.snr=[0,null]"])
    validate(config, 2)
    assert config.augmentation.noise.snr == [0.0, None] and config.augmentation.noise.snr[0] is not None
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"path: caf\xe9\n", r"odd\.yaml:1: column 10: byte 0xe9 is not UTF-8"),
        (b"path: x\ntags: [1,\n", r"odd\.yaml:\d: not YAML: .*node"),
        (b"path: x\npath: y\n", r"odd\.yaml:2: not YAML: found duplicate key path"),
        (b"path: a\x0cb\n", r"odd\.yaml: not YAML: .*(?:control|special) characters"),
    ],
    ids=["latin-1", "unfinished", "twice", "form feed"],
)
def test_a_file_that_is_no_yaml_is_named(configs: Path, tmp_path: Path, content: bytes, told: str) -> None:
    (configs / "llm/odd.yaml").write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_config(["experiment=tiny", "llm=odd"])
    (tmp_path / "odd.yaml").write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_saved_config(tmp_path / "odd.yaml")
    assert load_config(["experiment=tiny"]).name == "tiny", "a file that is not chosen stops nobody"


YAML_FILES = sorted(configs_dir().rglob("*.yaml"))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(configs_dir())))
def test_every_key_is_commented(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "the file says what it is for"
    uncommented = [
        line
        for line in text.splitlines()
        if re.match(r"\s*[a-z_]+: *\S", line) and " #" not in line and not line.startswith(("name:", "- override"))
    ]
    # An experiment's plain step counts explain themselves in config.yaml, where the keys are commented.
    allowed = r"\s+(steps|save_every|validate_every):" if path.parent.name == "experiment" else r"$^"
    assert [line for line in uncommented if not re.match(allowed, line)] == [
        line for line in uncommented if path.parent.name == "task" and re.match(r"  (asr|vsr|avsr): Transcribe", line)
    ]


def _values(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _values(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize("group", ["data", "mome", "parallel", "task"])
def test_every_choice_of_a_group_says_the_same_keys(group: str) -> None:
    """As files compose, before the schema would fill in what one of them forgot."""
    keys: dict[str, frozenset[str]] = {}
    register_resolvers()
    for path in sorted((configs_dir() / group).glob("*.yaml")):
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            chosen = compose("config", [f"{group}={path.stem}"])[group]
        keys[path.stem] = frozenset(_values(OmegaConf.to_container(chosen, resolve=True)))  # type: ignore[arg-type]
    in_schema = frozenset(_values(dataclasses.asdict(getattr(RunConfig(), group))))
    assert len(keys) > 3 and set(keys.values()) == {in_schema}


def test_the_omni_task_is_the_published_one(overrides: list[str]) -> None:
    config = load_config(["task=omni"])
    hands = [[str(view) for view in hand] for hand in schedule_of(config).hands]
    pairs = [(4, 2), (4, 5), (16, 2), (16, 5)]
    assert hands == [[f"asr({audio})", f"vsr({video})", f"avsr({audio},{video})"] for audio, video in pairs]
    assert config.task.weights == TaskWeights(asr=1.0, vsr=1.5, avsr=1.0)
    own = load_config([*overrides, "task=omni"])  # of an experiment that draws two views a step
    validate(own, 2)
    assert own.task.views_per_step is None


def test_what_counts_for_nothing_is_allowed_where_others_train_the_projectors(overrides: list[str]) -> None:
    weights = "task.weights={asr: 0, vsr: 0, avsr: 3}"
    validate(load_config([*overrides, "task=omni", weights, "projector.per_rate=true"]), 2)


# Those of one section of a run; configs/launcher belongs to the launchers.
OTHERS = ("config.yaml", "experiment", "method", "published", "launcher")
GROUPS = [path for path in YAML_FILES if path.relative_to(configs_dir()).parts[0] not in OTHERS]


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_group_option_composes(path: Path) -> None:
    group = path.parent.relative_to(configs_dir())
    section: Any = load_config([f"{group.as_posix()}={path.stem}"])
    for part in group.parts:
        section = getattr(section, part)
    values = yaml.safe_load(path.read_text())
    values.pop("defaults", None)
    for key, value in _values(values).items():
        if not (isinstance(value, str) and "${" in value):
            found = section
            for part in key.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            assert found == value
