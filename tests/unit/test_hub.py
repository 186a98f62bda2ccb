"""Models of the hub: fetched once from a server that speaks its interface, pinned, and found again."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM

from mome_dist.checkpoint.format import fingerprint
from mome_dist.commands import plan as plan_layout
from mome_dist.config import load_config, save_config
from mome_dist.config.load import load_saved_config
from mome_dist.config.models import settle_evaluation, settle_models
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.export.adapter import export_adapter
from mome_dist.hub import HubModel, cache_directory, directory_of, fetch, model_at, name_of
from mome_dist.inference.load import load_run
from mome_dist.launchers.local import check_request
from mome_dist.launchers.submitit.sweep import combinations, pinned
from mome_dist.llm.directory import check_directory
from mome_dist.preflight import validate_overrides
from tests.evaluation_run import add_checkpoint, make_run
from tests.hub_server import Hub, Repository, serving, use_hub
from tests.tiny_llms import llama3, save

ROOT = Path(__file__).resolve().parents[2]
MODEL = HubModel("owner/tiny-llama")
UNWANTED = (
    "LICENSE",
    "README.md",
    "pytorch_model.bin",
    "modeling_llama.py",
    "model.fp32.safetensors",
    "original/params.json",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it is published, with files beside it that nobody needs and some that nobody should load."""
    directory = save(llama3(), tmp_path_factory.mktemp("published") / "llm")
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "original").mkdir()
    for name in UNWANTED:
        (directory / name).write_text("{}", encoding="utf-8")
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without models, and an empty cache."""
    with serving() as served:
        use_hub(served.address, tmp_path / "home", monkeypatch)
        yield served


@pytest.fixture
def repository(hub: Hub, source: Path) -> Repository:
    """The model on that hub."""
    hub.repositories[MODEL.repository] = Repository()
    hub.repositories[MODEL.repository].commit(source)
    return hub.repositories[MODEL.repository]


def test_what_names_a_model_is_no_path() -> None:
    assert HubModel.parse("llm.path", "hf://o/n") == HubModel("o/n")
    assert HubModel.parse("llm.path", "hf://o-1/n_2.b@refs/pr/7") == HubModel("o-1/n_2.b", "refs/pr/7")
    for path in ("owner/name", "./hf", "/models/hf", "owner/name@main", ""):
        assert HubModel.parse("llm.path", path) is None
    for wrong in (
        "hf://",
        "hf://name",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/b@../c",
        "hf://a--b/c",
        "hf://-a/b",
        "hf://a/b c",
    ):
        with pytest.raises(UserError, match=r"llm\.path=.* names no model of the hub: write hf://OWNER/NAME or"):
            HubModel.parse("llm.path", wrong)


def test_only_what_is_needed_is_fetched_and_only_once(hub: Hub, repository: Repository, source: Path) -> None:
    directory = fetch("llm.path", MODEL)
    commit = repository.refs["main"]
    assert directory == cache_directory() / "models--owner--tiny-llama" / "snapshots" / commit
    wanted = {path.name for path in source.iterdir() if path.is_file()} - set(UNWANTED)
    assert hub.files == wanted == {path.name for path in directory.iterdir()}
    assert check_directory(directory) == check_directory(source)
    assert model_at(directory) == HubModel("owner/tiny-llama", commit)
    assert name_of(directory) == "tiny-llama" and name_of(source) == "llm" and model_at(source) is None
    asked = len(hub.asked)
    assert fetch("llm.path", HubModel(MODEL.repository, commit), local=True) == directory
    assert fetch("llm.path", MODEL, local=True) == directory
    assert len(hub.asked) == asked
    assert fetch("llm.path", MODEL) == directory
    assert not [line for line in hub.asked[asked:] if "/resolve/" in line]


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    published = save(llama3(), tmp_path / "sharded", "20KB")
    (published / "consolidated.safetensors").write_bytes(b"the same weights again")
    hub.repositories[MODEL.repository] = Repository()
    hub.repositories[MODEL.repository].commit(published)
    directory = fetch("llm.path", MODEL)
    assert len(list(directory.glob("model-*.safetensors"))) > 1 and "consolidated.safetensors" not in hub.files
    check_directory(directory)


def test_a_download_that_was_cut_off_is_completed(hub: Hub, repository: Repository) -> None:
    """As also where another program fetched a part of the model."""
    directory = fetch("llm.path", MODEL, weights=False)
    assert not (directory / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"nothing is fetched here .* has no model.safetensors of it"):
        fetch("llm.path", MODEL, local=True)
    check_directory(fetch("llm.path", MODEL))


def test_what_is_advised_where_there_is_no_network_fills_the_cache(
    hub: Hub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = use_hub(hub.address, tmp_path / "home", monkeypatch)
    for model in (MODEL, HubModel(MODEL.repository, repository.refs["main"])):
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        with pytest.raises(UserError) as error:
            fetch("llm.path", model, local=True)
        advised = re.search(r"`hf (.*?)`", str(error.value))
        assert advised is not None
        program = Path(sys.executable).with_name("hf")
        own = {"HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}  # hf does not start without a home
        environment = {**os.environ, **variables, **own}
        subprocess.run([program, *shlex.split(advised[1])], env=environment, capture_output=True, check=True)
        check_directory(fetch("llm.path", model, local=True))
        assert "pytorch_model.bin" not in hub.files


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_there_is_the_cache(
    hub: Hub, repository: Repository, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fetch("llm.path", MODEL)
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert fetch("llm.path", MODEL) == directory
    other = HubModel("owner/other", "v2")
    why = "nothing is fetched here" if offline else "127.0.0.1 cannot be reached"
    told = rf"^llm\.path: hf://owner/other@v2: {why}.*`hf download owner/other --revision v2 --include .*HF_HOME"
    with pytest.raises(UserError, match=told) as error:
        fetch("llm.path", other)
    assert "\n" not in str(error.value) and len(hub.asked) == asked


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((403, "GatedRepo"), r"accepted its terms: .* log in with `hf auth login`, or set HF_TOKEN"),
        ((401, "GatedRepo"), r"accepted its terms"),
        ((401, "RepoNotFound"), r"shows this user no model owner/tiny-llama: mend the name .* log in"),
        ((404, "RepoNotFound"), r"shows this user no model owner/tiny-llama"),
        ((404, "RevisionNotFound"), r"owner/tiny-llama has no revision v2: name a branch, a tag or a commit"),
        ((403, "Forbidden"), r"refuses hf://owner/tiny-llama@v2 to this user \(HTTP 403\): log in"),
        ((503, "Busy"), r"answers HTTP 503 for hf://owner/tiny-llama@v2: try again later"),
    ],
)
def test_refusals_are_one_line_without_the_token(
    hub: Hub, repository: Repository, refusal: tuple[int, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    repository.refusal = refusal
    with pytest.raises(UserError, match=rf"^llm\.path: .*{told}") as error:
        fetch("llm.path", HubModel(MODEL.repository, "v2"))
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert hub.tokens == {"Bearer hf_secretsecretsecret"}, "the user's token was not used at all"


def test_pickled_weights_are_no_weights(hub: Hub, repository: Repository, source: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(source, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    repository.commit(pickled)
    with pytest.raises(UserError, match=r"has no model\.safetensors at commit .* never from pickled files"):
        fetch("llm.path", MODEL)
    assert "pytorch_model.bin" not in hub.files
    (pickled / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    repository.commit(pickled)
    with pytest.raises(UserError, match=r"names 'pytorch_model\.bin', which is no safetensors file"):
        fetch("llm.path", MODEL)
    assert "pytorch_model.bin" not in hub.files


def test_others_may_use_the_same_cache(repository: Repository, source: Path, tmp_path: Path) -> None:
    directory = fetch("llm.path", MODEL)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, alone / name)
    assert fingerprint(directory) == fingerprint(alone)
    (directory / "model.fp32.safetensors").write_text("of another program")
    assert fingerprint(directory) == fingerprint(alone)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text("{}")
    assert fingerprint(directory) != fingerprint(alone)


def settled(*overrides: str) -> tuple[RunConfig, list[str]]:
    config = load_config(["experiment=tiny", "task=vsr", *overrides])
    return config, settle_models(config, ["llm"])


def test_a_run_names_the_commit(repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, overrides = settled(f"llm.path={MODEL}")
    address = f"hf://owner/tiny-llama@{repository.refs['main']}"
    assert overrides == [f"llm.path={address}"] and address in capsys.readouterr().err
    check_directory(config.llm.path)
    save_config(config, tmp_path / "config.yaml")
    saved = load_saved_config(tmp_path / "config.yaml")
    assert saved.llm.path == address and directory_of(saved.llm.path) == Path(config.llm.path)
    assert saved.video_encoder.path == config.video_encoder.path
    again, none = settled(*overrides)  # as a rank is given it
    assert again.llm.path == config.llm.path and none == []


def test_a_rank_reads_the_cache_only(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"nothing is fetched here \(a rank"):
        settled(f"llm.path={MODEL}")
    assert hub.asked == []


def test_a_wrong_configuration_is_told_before_anything_is_fetched(hub: Hub, repository: Repository) -> None:
    with pytest.raises(UserError, match=r"mome\.bottleneck=0"):
        settled(f"llm.path={MODEL}", "mome.bottleneck=0")
    assert hub.asked == []


def test_a_moved_branch_does_not_move_a_run(
    repository: Repository, source: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first, _ = settled(f"llm.path={MODEL}", f"output_dir={run}")
    began = repository.refs["main"]
    checkpoint = run / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    save_config(first, checkpoint / "config.yaml")
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    moved = repository.commit(shutil.copytree(source, tmp_path / "moved"))
    assert moved != began
    for again in (MODEL, HubModel(MODEL.repository, "main"), HubModel(MODEL.repository, began)):
        assert settled(f"llm.path={again}", f"output_dir={run}")[0].llm.path == first.llm.path
    other = repository.commit(source, branch="v2")
    told = (
        rf"^llm\.path=hf://owner/tiny-llama@v2 is commit {other} now, but .*/run was trained with hf://.*@{began}: give"
    )
    with pytest.raises(UserError, match=told):
        settled(f"llm.path={MODEL}@v2", f"output_dir={run}")
    assert settled(f"llm.path={MODEL}", f"output_dir={run}", "training.resume=false")[0].llm.path.endswith(moved)
    assert settled(f"llm.path={MODEL}", f"output_dir={tmp_path / 'new'}")[0].llm.path.endswith(moved)
    assert settled(f"llm.path={MODEL}", f"output_dir={run}")[0].llm.path == first.llm.path
    with pytest.raises(UserError, match=rf"@main is commit {moved} now, .* or hf://owner/tiny-llama for whatever"):
        settled(f"llm.path={MODEL}@main", f"output_dir={run}")  # what it now means to this machine, too


def test_a_plan_fetches_no_weights(hub: Hub, repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["experiment=tiny", f"llm.path={MODEL}", "audio_encoder.path=whisper-tiny.en", "video_encoder.path=visemes"]
    assert plan_layout.main(["--gpu", "h100", "--nodes", "1", "--ranks-per-node", "2", *own]) == 0
    assert "config.json" in hub.files and not any(name.endswith(".safetensors") for name in hub.files)


def test_nothing_else_asks_a_hub() -> None:
    """Whatever transformers loads is a directory, and code that is beside a model is never run."""
    loads = 0
    for path in [*(ROOT / "mome_dist").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        tree, theirs = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert path.name == "hub.py" or not any(name.startswith("huggingface_hub") for name in modules), path
            if isinstance(node, ast.ImportFrom) and modules[0].startswith("transformers"):
                theirs |= {name.name for name in node.names}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code", "False") == "False", path
                if isinstance(node.func.value, ast.Name) and node.func.value.id in theirs:
                    assert given.get("local_files_only") == "True", path
                    loads += 1
    assert loads >= 5, "the test looks at nothing"


def test_a_sweep_over_models_names_their_commits(repository: Repository) -> None:
    def checked(*overrides: str) -> list[str]:
        combined = combinations(overrides)
        return pinned(overrides, combined, [[*each, *settled(*each)[1]] for each in combined])

    commit = repository.refs["main"]
    shared = [f"llm.path={MODEL}", "seed=1,2"]
    assert checked(*shared) == [*shared, f"llm.path={MODEL}@{commit}"]
    with pytest.raises(UserError, match=rf"has to name their commits: write llm\.path={MODEL}@{commit}\."):
        checked(f"llm.path={MODEL},{MODEL}@{commit}")
    named = [f"llm.path={MODEL}@{commit},{MODEL}@{commit}"]
    assert checked(*named) == named


def test_an_old_run_is_evaluated_with_the_files_it_was_trained_with(
    hub: Hub, tiny_corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "made", tiny_corpus_dir)
    trained = load_run(run)
    for section, folder in (("llm", "llm"), ("audio_encoder", "whisper"), ("video_encoder", "lips")):
        name = f"owner/{folder}"
        hub.repositories[name] = Repository()
        hub.repositories[name].commit(shutil.copytree(tmp_path / "made" / folder, tmp_path / "published" / folder))
        getattr(trained.config, section).path = str(fetch(section, HubModel(name)))
    add_checkpoint(run, trained.config, trained.model, 8)
    other = LlamaForCausalLM(trained.model.llm.config)
    other.save_pretrained(shutil.copytree(tmp_path / "made/llm", tmp_path / "other"))
    hub.repositories["owner/llm"].commit(tmp_path / "other")
    shutil.rmtree(tmp_path / "made/llm")
    shutil.rmtree(cache_directory())

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^llm\.path: hf://owner/llm@[0-9a-f]{40}: nothing is fetched here"):
        load_run(run)
    monkeypatch.delenv("RANK")
    assert settle_evaluation([f"checkpoint={run}", "limit=2"]) == [f"checkpoint={run}", "limit=2"]
    asked = len(hub.asked)
    monkeypatch.setenv("RANK", "0")
    for found in (load_run(run), load_run(run / "checkpoints/step-000008")):
        assert found.config.llm.path == trained.config.llm.path and set(found.encoders()) == {"audio", "video"}
        for name, value in trained.model.llm.state_dict().items():
            torch.testing.assert_close(found.model.llm.state_dict()[name], value, rtol=0, atol=0)
    assert len(hub.asked) == asked
    monkeypatch.delenv("RANK")

    export_adapter(run, tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert str(tmp_path / "home") not in card and "https://huggingface.co/owner/llm, of which this is commit" in card
    assert (
        "base_model:\n- owner/llm\n- owner/whisper\n- owner/lips\n" in card
        and "\nbase_model_relation: adapter\n" in card
    )
    shutil.rmtree(cache_directory())
    again = load_run(tmp_path / "export")
    assert again.config.llm.path == trained.config.llm.path
    with pytest.raises(UserError, match=r"is not the model that .* was trained with"):
        load_run(tmp_path / "export", frozen={"llm": "hf://owner/llm"})
    given = [f"checkpoint={tmp_path / 'export'}", "llm=hf://owner/llm"]
    pins = validate_overrides("mome_dist.evaluate", given, 2)
    assert pins == [*given, f"llm=hf://owner/llm@{hub.repositories['owner/llm'].refs['main']}"]


def test_a_launcher_gives_commits_to_its_processes(
    tiny_corpus_dir: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "made", tiny_corpus_dir)
    hub.repositories["owner/llm"] = Repository()
    commit = hub.repositories["owner/llm"].commit(tmp_path / "made/llm")
    variables = use_hub(hub.address, tmp_path / "home", monkeypatch)
    command = [sys.executable, "-X", "importtime", "-m", "launchers.local", "--nproc", "2", "--dry-run"]
    command += ["experiment=tiny", "task=vsr", "parallel=single", f"data.corpus={tiny_corpus_dir}"]
    command += ["data.bucket_batches=1", "training.validate_every=0", "mome.routed_experts=4", "mome.top_k=2"]
    command += [
        f"video_encoder.path={tmp_path / 'made/lips'}",
        f"output_dir={tmp_path / 'run'}",
        "llm.path=hf://owner/llm",
    ]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, told
    assert done.stdout.rstrip().endswith(f"llm.path=hf://owner/llm llm.path=hf://owner/llm@{commit}")
    assert told == [f"llm.path: hf://owner/llm is hf://owner/llm@{commit}"]
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


@pytest.mark.parametrize("experiment", [False, True])
def test_a_launcher_fetches_for_any_module(
    configs: Path, hub: Hub, tmp_path: Path, experiment: bool, source: Path
) -> None:
    """As for training, before a rank starts: the encoders of what caches features, and what others are told to use."""
    hub.repositories["owner/llm"], hub.repositories["owner/whisper"] = Repository(), Repository()
    llm, whisper = (hub.repositories[name].commit(source) for name in ("owner/llm", "owner/whisper"))
    heard = "audio_encoder.path=hf://owner/whisper"
    if experiment:  # the user's own names it
        text = "# @package _global_\naudio_encoder:\n  path: hf://owner/whisper\nllm:\n  path: hf://owner/llm\n"
        (configs / "experiment/own.yaml").write_text(text)
        heard = "experiment=own"
    arguments = ["task=asr", heard, "--output", "features", "--split=test", "extra=1"]
    for module in ("tools.cache_features", "mome_dist.commands.features"):
        assert check_request(module, 2, arguments) == [
            *arguments,
            f"audio_encoder.path=hf://owner/whisper@{whisper}",
        ]
    assert fetch("x", HubModel("owner/whisper"), local=True).name == whisper
    assert not any("owner/llm" in line for line in hub.asked), "nobody reads the LLM there"

    other = ["--steps", "2", "llm.path=hf://owner/llm", "seed=many"]
    assert check_request("mome_dist.pretrain_llm", 2, other) == [*other[:2], f"llm.path=hf://owner/llm@{llm}", other[3]]
    assert fetch("x", HubModel("owner/llm"), local=True).name == llm
