"""What the system refuses is one line with the path, what named it, and the fix; real commands on real places."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mome_dist.cli import main_guard
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.files import published_directory, save_tensors, written_aside
from mome_dist.paths import cache_root
from mome_dist.system_errors import explain, note_places

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 12345  # a number that no user has


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("where", "refusal"),
    [
        ("file/cache", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("circle/cache", "Too many levels of symbolic links"),
    ],
)
def test_a_cache_that_cannot_be_is_one_line(tmp_path: Path, where: str, refusal: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    done = run("tools/make_corpus.py", MOME_DIST_CACHE=str(tmp_path / where))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {tmp_path}/\S+: {refusal} \(MOME_DIST_CACHE\); .+\n", done.stderr), done.stderr


def test_the_word_of_the_command_line_that_named_the_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("tools/make_corpus.py", "--out", str(tmp_path / "file/corpus"))
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"error: {tmp_path}/file") and "Not a directory (--out); a file is where" in done.stderr
    )


def test_a_user_whom_the_system_does_not_know_has_a_name() -> None:
    # Imported first: the interpreter may lie in a folder that only its owner may enter.
    script = (
        f"import os, getpass, mome_dist.processes as p; os.setuid({NOBODY}); p.ensure_user_name(); "
        "print(getpass.getuser())"
    )
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout == f"user-{NOBODY}\n".encode()


def test_a_key_that_named_the_place_is_told(tmp_path: Path) -> None:
    note_places({"data.features_dir": str(tmp_path / "features")})
    told = explain(OSError(errno.EROFS, "Read-only file system", str(tmp_path / "features/ab/cd")))
    assert told == (
        f"{tmp_path}/features/ab/cd: Read-only file system (data.features_dir); name a place that can be written to."
    )
    load_config(["experiment=tiny", f"output_dir={tmp_path}/run"])
    told = explain(OSError(errno.EACCES, "Permission denied", str(tmp_path / "run")))
    assert told is not None and told.startswith(f"{tmp_path}/run: Permission denied (output_dir); give this user")


def test_bugs_and_what_may_pass_keep_their_traceback() -> None:
    for error in (
        OSError(errno.EIO, "Input/output error", "/data/x"),
        OSError(errno.ESTALE, "Stale file handle", "/data/x"),
        FileNotFoundError(errno.ENOENT, "No such file", str(ROOT / "mome_dist/gone.json")),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a call that has nothing to do with files
        OSError("transformers says so"),
    ):
        assert explain(error) is None

    @main_guard
    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/x")

    with pytest.raises(OSError, match="Input/output"):
        broken()


def test_safetensors_say_which_file_could_not_be_written(tmp_path: Path) -> None:
    import resource

    import torch

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "x.safetensors")
    assert "ulimit -f" in str(explain(caught.value))


def test_no_home_is_told_with_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_DIST_CACHE", "~no-such-user/cache")  # looked up as a home directory is
    with pytest.raises(UserError, match=r"no home directory: set MOME_DIST_CACHE to a directory"):
        cache_root()
    with pytest.raises(UserError, match=r"^configuration key 'llm.path': the cache is in ~no-such-user/cache, but"):
        load_config(["experiment=tiny"])


@pytest.mark.parametrize("value", ["runs/lr=1e-3", 'a"b=c', "runs/x(1)"])
def test_a_value_that_hydra_cannot_read_is_shown_quoted(value: str) -> None:
    with pytest.raises(UserError, match=r"has to be quoted, for Hydra and for the shell: '") as caught:
        load_config(["experiment=tiny", f"output_dir={value}"])
    shown = str(caught.value).rpartition("shell: '")[2].removesuffix("'.")
    assert load_config(["experiment=tiny", shown]).output_dir == value, "what is advised does not work"


def test_a_corpus_that_has_moved_names_the_keys(tmp_path: Path) -> None:
    from mome_dist.data.corpus import Corpus

    with pytest.raises(UserError, match=r"train: data\.corpus=DIR, evaluate: corpus=DIR"):
        Corpus.open(tmp_path / "moved")


def test_sigterm_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script = (
        "import sys, tempfile, time\nfrom mome_dist.cli import main_guard\n"
        "@main_guard\ndef main():\n    with tempfile.TemporaryDirectory():\n        print(flush=True)\n        "
        "time.sleep(60)\nsys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert list(tmp_path.iterdir())
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_of_two_that_publish_a_directory_the_first_or_the_last_wins(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with published_directory(target, replace=False) as slow:
        (slow / "who").write_text("slow")
        with published_directory(target, replace=False) as fast:
            (fast / "who").write_text("fast")
        third = published_directory(target, replace=False)
        with pytest.raises(UserError, match="has come into being meanwhile"), third as folder:
            (folder / "who").write_text("third")
        with published_directory(target, replace=True) as last:
            (last / "who").write_text("last")
        for path in target.iterdir():
            path.unlink()
    assert (target / "who").read_text() == "slow", "an empty directory is in nobody's way"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_is_written_aside_of_a_long_name_fits(tmp_path: Path) -> None:
    with written_aside(tmp_path / ("ü" * 120)) as path:
        path.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["ü" * 120]
