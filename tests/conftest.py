"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from mome_dist.config import load
from mome_dist.config.deepspeed import file
from mome_dist.data.corpus import Corpus
from mome_dist.data.synthetic import SyntheticSettings, generate_corpus
from mome_dist.paths import configs_dir
from mome_dist.planning import write
from tests.patience import patience

_HERE = Path(__file__).parent
_ORDER = ["slurm", "quickstart", "parallel", "gpu", "unit"]


def pytest_configure(config: pytest.Config) -> None:
    """Put everything temporary, also what killed processes leave, into one folder that is removed at the end.

    SIGTERM ends the tests as Ctrl-C does, so that fixtures are torn down and the folder goes; their forks just die.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    folder = Path(tempfile.mkdtemp(prefix="mome-tests-"))
    folder.chmod(0o755)  # the daemons of the test cluster are other users
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # asked for anew
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share files out to the processes of `make test`; all that uses the cluster stays in one of them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for a cluster most of the time, while the other process goes on with the rest.

    Worlds are forked before unit tests have started torch's threads, which a fork would miss.
    """
    items.sort(key=lambda item: _ORDER.index(item.path.relative_to(_HERE).parts[0]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Stretch the test's timeout by how slow this machine is."""
    marker = item.get_closest_marker("timeout")
    seconds = marker.args[0] if marker else float(item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)
    return (yield)


def pytest_collection_finish() -> None:
    """Keep what was imported out of every garbage collection, which took a fifth of the unit tests' time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go of it: Triton's bindings tell on standard error what is alive when the process ends."""
    gc.unfreeze()


TINY = SyntheticSettings(
    train=24, validation=4, test=4, train_speakers=8, validation_speakers=4, test_speakers=4, seed=7
)


@pytest.fixture(scope="session")
def tiny_settings() -> SyntheticSettings:
    """Settings of `tiny_corpus`."""
    return TINY


@pytest.fixture(scope="session")
def tiny_corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a synthetic corpus of 24 training, 4 validation and 4 test utterances. Do not change files in it."""
    return generate_corpus(TINY, tmp_path_factory.mktemp("corpora") / "tiny", workers=1)


@pytest.fixture(scope="session")
def tiny_corpus(tiny_corpus_dir: Path) -> Corpus:
    """That corpus, opened."""
    return Corpus.open(tiny_corpus_dir)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configuration tree in place of it, for what writes into it."""
    copy = shutil.copytree(configs_dir(), tmp_path / "configs")
    for module in (load, file, write):
        monkeypatch.setattr(module, "configs_dir", lambda: copy)
    return copy
