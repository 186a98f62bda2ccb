"""A DeepSpeed file says what acts, or all that is wrong with it in one message, before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import (
    _REMOVED_TOP_LEVEL_CONFIG_KEYS,
    _REMOVED_ZERO_CONFIG_KEYS,
    DeepSpeedConfig,
    HybridEngineConfig,
)
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from mome_dist.commands import plan as plan_layout
from mome_dist.commands import tune as tune_deepspeed
from mome_dist.commands import verify as verify_layouts
from mome_dist.config import RunConfig, load_config
from mome_dist.config.deepspeed.file import deepspeed_of, settled, write_deepspeed
from mome_dist.config.deepspeed.keys import KEYS, ZERO
from mome_dist.config.deepspeed.rules import Rule, Section
from mome_dist.config.deepspeed.table import table
from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import check_settings
from mome_dist.errors import UserError
from mome_dist.paths import configs_dir
from tests.deepspeed_configurations import PUBLIC, named_keys, public, stripped, without

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=tiny"]  # 16 utterances a step, adamw


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(TINY)


def _refusal(settings: Any, config: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        settled(settings, config, 2, "it")
    assert "\n" not in str(error.value)
    return str(error.value)


# The table has every key that DeepSpeed has.


class _Asked(dict):
    """Settings that note which keys are asked for."""

    seen: set[str]

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.seen = set()

    def __copy__(self) -> _Asked:
        return self

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed asks whether a key is in keys()


def test_every_key_that_deepspeed_reads_is_in_the_table() -> None:
    asked = _Asked({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(asked)
    assert len(asked.seen) > 50
    assert (asked.seen | _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()) - KEYS.keys() == set()


def _fields(model: type[DeepSpeedConfigModel]) -> set[str]:
    return {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}


def _nested(rules: dict[str, Rule], *path: str) -> set[str]:
    section = rules[path[0]]
    assert isinstance(section, Section) and section.keys is not None
    return _nested(dict(section.keys), *path[1:]) if path[1:] else set(section.keys)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (("bf16",), DeepSpeedBF16Config),
        (("bfloat16",), DeepSpeedBF16Config),
        (("fp16",), DeepSpeedFP16Config),
        (("zero_optimization", "offload_optimizer"), DeepSpeedZeroOffloadOptimizerConfig),
        (("zero_optimization", "offload_param"), DeepSpeedZeroOffloadParamConfig),
        (("tensorboard",), TensorBoardConfig),
        (("wandb",), WandbConfig),
        (("csv_monitor",), CSVConfig),
        (("comms_logger",), CommsLoggerConfig),
        (("hybrid_engine",), HybridEngineConfig),
        (("timers", "throughput"), DeepSpeedThroughputTimerConfig),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_every_nested_key_is_in_the_table(path: tuple[str, ...], model: type[DeepSpeedConfigModel]) -> None:
    assert _fields(model) <= _nested(KEYS, *path)


def test_every_key_of_zero_is_in_the_table_and_no_other() -> None:
    assert _fields(DeepSpeedZeroConfig) | _REMOVED_ZERO_CONFIG_KEYS.keys() == ZERO.keys()


def test_the_page_has_the_table() -> None:
    assert table() in (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")


def test_the_page_shows_a_refusal(config: RunConfig) -> None:
    with pytest.raises(UserError) as error:
        settled(public("megatron_deepspeed_zero3"), config, 2, "deepspeed.file: megatron.json")
    page = " ".join((ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8").split())
    assert f"error: {error.value}" in page


# What a file comes to.


def test_what_acts_is_all_that_deepspeed_is_told() -> None:
    config = load_config([*TINY, "data.accumulation=1"])
    settings = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": "auto", "sub_group_size": 1e9},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "betas": [0.9, 0.98], "eps": "auto"}},
        "fp16": {"enabled": False},
        "bf16": {"enabled": "auto"},
        "amp": {"enabled": False, "opt_level": "O1"},
        "wandb": None,
        "prescale_gradients": True,
        "steps_per_print": 10,
    }
    found = settled(settings, config, 2, "it")
    assert found.acts == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": False}}
    assert isinstance(found.acts["zero_optimization"]["reduce_bucket_size"], int)
    said = found.describe()
    assert said.startswith("DeepSpeed: ZeRO 2, reduce_bucket_size=500000000, overlap_comm=false; without effect here: ")
    assert "prescale_gradients" in said and "zero_optimization.sub_group_size" in said


def test_auto_is_the_projects_own_value(config: RunConfig) -> None:
    own = json.loads((configs_dir() / "deepspeed" / "zero1.json").read_text())
    section = dict.fromkeys(own["zero_optimization"], "auto")
    assert settled({"zero_optimization": section}, config, 2, "it").acts == own


def test_without_zero_nothing_else_of_it_acts(config: RunConfig) -> None:
    found = settled({"zero_optimization": {"overlap_comm": True}}, config, 2, "it")
    assert found.acts == {"zero_optimization": {"stage": 0}}
    assert found.without_effect == ("zero_optimization.overlap_comm",)
    assert settled({"zero_optimization": False}, config, 2, "it").stage == settled({}, config, 2, "it").stage == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_allreduce_op": "sum"}, "a sum would multiply gradients by the data-parallel ranks"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"'data_types.grad_accum_dtype' \(\"bf16\"\): .* fp32: remove"),
        ({"communication_data_type": "fp16"}, "gradients are reduced in fp32"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "its previous gradient again"),
        ({"zero_optimization": {"cpu_offload": True}}, "its previous gradient again"),
        ({"zero_optimization": {"stage": 3}}, r"'zero_optimization.stage' \(3\): must be 0, 1 or 2"),
        ({"zero_optimization": {"stage": True}}, "must be 0, 1 or 2"),
        ({"zero_optimization": {"stage": "1"}}, "must be 0, 1 or 2"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "must be a whole number above 0"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "must be a whole number above 0"),
        ({"zero_optimization": {"reduce_bucket_size": 10**400}}, "must be a whole number above 0"),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "must be an even whole number above 0"),
        ({"zero_optimization": {"overlap_comm": 1}}, "must be true or false"),
        ({"zero_optimization": {"reduce_scatter": False}}, "where there are experts"),
        ({"zero_optimization": {"ignore_unused_parameters": False}}, "leaves the other one's projector unused"),
        ({"zero_optimization": True}, r"must be an object of settings; for ZeRO 1 write \{\"stage\": 1\}"),
        ({"fp16": "yes"}, r"'fp16' \(\"yes\"\): must be an object of settings"),
        ({"fp16": {"enabled": True}}, "set llm.precision"),
        ({"bfloat16": {"enabled": True}}, "set llm.precision"),
        (
            {"fp16": {"enabeld": False}},
            r"'fp16.enabeld' \(false\): is no key .* \(did you mean enabled\?\)\.$",
        ),
        ({"zero_optimisation": {"stage": 1}}, r"'zero_optimisation': .*did you mean zero_optimization\?"),
        ({"stage": 2}, r"'stage' \(2\): belongs into zero_optimization"),
        ({"zero_optimization": {"reduce_bucket": 5}}, r"did you mean reduce_bucket_size\?"),
        ({"monitor_config": {}}, "is no key of DeepSpeed's: remove it"),
        ({"train_batch_size": 32}, r"\(32\): data.batch_size decides, and is 16: change that, or remove it here"),
        ({"train_micro_batch_size_per_gpu": 16}, r"data-parallel ranks decides, and is \"auto\":"),
        ({"gradient_accumulation_steps": 1}, r"data.accumulation decides, and is \"auto\": change that, or remove"),
        ({"gradient_clipping": 0.5}, r"optimizer.gradient_clipping decides, and is 1.0"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer.name decides, and is \"adamw\""),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.warmup_steps and optimizer.final_fraction"),
        ({"wall_clock_breakdown": True}, "seconds of a step are in metrics.jsonl"),
        ({"tensorboard": {"enabled": True}}, "a run always writes tensorboard/"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set parallel.recompute=full or selective"),
        ({"tensor_parallel": {"autotp_size": 4}}, "set parallel.tp"),
        ([1], r"it holds a list; give an object"),
        (None, r"it holds null; give an object"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(config: RunConfig, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(settings, config, 2, "it")


def test_everything_wrong_is_in_one_message(config: RunConfig) -> None:
    message = _refusal(
        {
            "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "stag": 1},
            "fp16": {"enabled": True},
            "wall_clock_breakdown": True,
            "flops_profiler": {"enabled": True, "profile_step": 1},
        },
        config,
    )
    assert message.startswith("it has 6 settings to change: ")
    assert named_keys(message) == [
        "zero_optimization.stage",
        "zero_optimization.offload_param",
        "zero_optimization.stag",
        "fp16",
        "wall_clock_breakdown",
        "flops_profiler",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"ds.json is not JSON"),
        (b"\xff", r"ds.json is not JSON"),
        (b'{"gradient_clipping": NaN}', r"ds.json is not JSON \(NaN is no number of JSON's\)"),
        (b"[]", r"ds.json holds a list"),
        (
            b'{"fp16": {}, "zero_optimization": {"stage": 1, "stage": 0}, "fp16": {}}',
            r"'stage': is there twice.*'fp16'",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        deepspeed_of(load_config([*TINY, f"deepspeed.file={tmp_path / 'ds.json'}"]), 2)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (verify_layouts.main, ["--shrink"]),
        (verify_layouts.main, ["--shrink", "--nproc", "2"]),
        (tune_deepspeed.main, ["--shrink", "--nproc", "2"]),
        (plan_layout.main, ["--gpu", "h100"]),
    ],
    ids=["verify_layouts", "verify_layouts of a layout", "tune_deepspeed", "plan_layout"],
)
def test_every_command_refuses_a_file_at_once(
    command: Callable[[Sequence[str]], int],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_allreduce_op": "sum", "zero_optimisation": {}}')
    assert command([*arguments, *TINY, f"deepspeed.file={tmp_path / 'ds.json'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 settings to change: 'gradient_allreduce_op'" in error and "'zero_optimisation'" in error


# Configurations of public projects.


def test_twenty_public_configurations_are_at_hand() -> None:
    assert len(PUBLIC) >= 20


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_configuration_is_accepted_or_refused_once(config: RunConfig, name: str) -> None:
    settings = public(name)
    acts = stripped(settings, config, 2).acts
    # DeepSpeed's own class takes what is left, and what is left was in the file, or is what "auto" stands for.
    check_settings(acts, OptimizerConfig())
    given = settings.get("zero_optimization", {})
    for key, value in acts["zero_optimization"].items():
        stands_for = given.get(key) if isinstance(given, dict) else None
        assert stands_for in (value, "auto") or (key, value) == ("stage", 0)


def test_a_key_that_a_message_names_can_be_cut_out() -> None:
    assert without({"a": {"b": 1, "c": 2}, "d": 3}, ["a.b", "d"]) == {"a": {"c": 2}}


# Around the file.


def test_deepspeeds_own_objection_is_one_line() -> None:
    with pytest.raises(UserError, match=r"DeepSpeed does not take .*greater than 0") as error:
        check_settings({"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}, OptimizerConfig())
    assert "\n" not in str(error.value)


def test_the_files_that_ship_act_whole(config: RunConfig) -> None:
    files = sorted((configs_dir() / "deepspeed").glob("*.json"))
    assert [path.stem for path in files] == ["zero0", "zero1", "zero2"]
    for stage, path in enumerate(files):
        settings = json.loads(path.read_text())
        found = settled(settings, config, 2, path.name)
        assert found.acts == settings and found.stage == stage and not found.without_effect


def test_a_written_file_is_found_as_the_hint_says(configs: Path, tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    for file, override in (
        (tmp_path / "mine.json", f"deepspeed.file={tmp_path / 'mine.json'}"),
        (configs / "deepspeed" / "planned.json", "deepspeed=planned"),
    ):
        assert write_deepspeed(settings, file) == override
        assert deepspeed_of(load_config([*TINY, override]), 2).acts == settings


def test_a_file_is_checked_without_torch() -> None:
    code = "import sys, mome_dist.preflight, mome_dist.config.deepspeed.file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
