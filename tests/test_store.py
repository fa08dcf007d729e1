"""What stays on disk is whole or not there, and a damaged file is never read as a result."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qexp.store import StoreError, TensorCache, read_metrics, replacing, running, writable, write_json


def write(folder: Path, content: str) -> None:
    with replacing(folder) as aside:
        (aside / "file").write_text(content)


def test_a_folder_takes_the_place_of_the_old_one_and_nothing_else_stays(tmp_path):
    folder = tmp_path / "runs" / "id"
    write(folder, "old")
    write(folder, "new")
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["id"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_ends_in_an_error_leaves_the_old_folder(tmp_path, error):
    folder = tmp_path / "runs" / "id"
    write(folder, "old")
    with pytest.raises(error), replacing(folder) as aside:
        (aside / "file").write_text("half")
        raise error
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["id"]


def test_nobody_sees_a_folder_before_it_is_whole(tmp_path):
    with replacing(tmp_path / "runs" / "id") as aside:
        (aside / "metrics.json").write_text("{}")
        assert not list((tmp_path / "runs").iterdir())


def test_leftovers_of_a_killed_run_are_removed_by_the_next_one(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from qexp.store import replacing\n"
        "with replacing(Path(sys.argv[1])) as aside: (aside / 'file').write_text('half'); os.kill(os.getpid(), 9)"
    )
    folder = tmp_path / "runs" / "id"
    assert python(code, folder).returncode == -9
    assert read_metrics(folder) is None
    assert [path.name for path in tmp_path.rglob("file")] == ["file"]
    write(folder, "new")
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["id"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = TensorCache(tmp_path / "float", {"seed": 0}, "train again")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="paths.outputs: cannot write .*: No space left on device"):
        cache.save({"weight": torch.zeros(2)})
    assert cache.load() is None


@pytest.mark.parametrize("below", ["file/below", "file"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="paths.outputs: cannot write to .*file"):
        writable(tmp_path / below)


def test_a_folder_of_the_system_is_refused():
    with pytest.raises(StoreError, match="paths.outputs: cannot write to /proc/qexp"):
        writable(Path("/proc/qexp"))


def test_json_says_what_it_can(tmp_path):
    values = {"inf": float("inf"), "low": -float("inf"), "nan": float("nan"), "b": 1.5, "a": "text", "c": True}
    write_json(tmp_path / "metrics.json", values)
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail) == {
        "inf": None, "low": None, "nan": None, "a": "text", "b": 1.5, "c": True,
    }  # fmt: skip


STATE = {"weight": torch.arange(6.0), "bias": torch.ones(2)}


@pytest.fixture
def cache(tmp_path) -> TensorCache:
    cache = TensorCache(tmp_path / "float", {"seed": 0}, "train again")
    cache.save(STATE)
    return cache


def test_a_network_comes_back_as_it_was(cache):
    found = TensorCache(cache.root, {"seed": 0}, "train again").load()
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert TensorCache(cache.root, {"seed": 1}, "train again").load() is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "note missing": lambda path: path.with_name("cache.json").unlink(),
    "note broken": lambda path: path.with_name("cache.json").write_text('{"sha256": '),
    "note of another shape": lambda path: path.with_name("cache.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused(cache, damage):
    DAMAGES[damage](cache.folder / "tensors.pt")
    with pytest.raises(StoreError, match="float cache .*tensors.pt is damaged .*; delete .* to train again"):
        cache.load()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forge(cache: TensorCache, content: bytes) -> None:
    (cache.folder / "tensors.pt").write_bytes(content)
    (cache.folder / "cache.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))


def test_code_in_a_cache_is_not_run_even_with_a_right_checksum(cache, tmp_path):
    forge(cache, pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(StoreError, match="is damaged"):
        cache.load()
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "bomb.pt")
    forge(cache, (tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(StoreError, match="is damaged"):
        cache.load()
    assert not (tmp_path / "boom").exists()


def python(code: str, *arguments: object, wait: bool = True):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    if wait:
        process.communicate()
    return process


def test_processes_that_start_together_train_once(tmp_path):
    code = (
        "import sys, time, torch; from pathlib import Path; from qexp.store import TensorCache\n"
        "root = Path(sys.argv[1]); cache = TensorCache(root, {'seed': 0}, 'train again')\n"
        "(root / sys.argv[2]).touch()\n"
        "while len(list(root.glob('ready*'))) < 3: time.sleep(0.01)\n"
        "with cache.lock():\n"
        "    if cache.load() is None:\n"
        "        time.sleep(0.3)\n"
        "        (root / 'trained').open('a').write('x')\n"
        "        cache.save({'weight': torch.ones(1)})\n"
    )
    processes = [python(code, tmp_path, f"ready{number}", wait=False) for number in range(3)]
    assert [process.communicate()[1] for process in processes] == [""] * 3
    assert (tmp_path / "trained").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    cache = TensorCache(tmp_path / "cache" / "float", {}, "train again")
    with pytest.raises(StoreError, match="^paths.outputs: cannot write to .*cache"), cache.lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    cache = TensorCache(tmp_path / "cache" / "float", {}, "train again")
    for held in running(tmp_path, "a"), replacing(tmp_path / "runs" / "a"), cache.lock():
        with pytest.raises(StoreError, match=f"^paths.outputs: cannot lock .*: {os.strerror(number)}$"), held:
            pass
    assert not list(tmp_path.glob("runs/*"))
