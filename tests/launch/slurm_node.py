"""A real Slurm of one node on this machine, for as long as a block runs; it needs no rights and touches nothing else.

The programs are those on the PATH, or those in the folder that QEXP_SLURM_ROOT names. On Debian and Ubuntu it fills so:

    mkdir slurm && cd slurm
    apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.1-0
    for package in *.deb; do dpkg -x $package .; done
    export QEXP_SLURM_ROOT=$PWD
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# Debian's names of the daemons where they are only unpacked, and their own.
DAEMONS = {name: (f"{name}-wlm", name) for name in ("slurmctld", "slurmd", "slurmstepd")} | {"munged": ("munged",)}
UP_S = 30.0  # until the node must be idle

CONF = """
ClusterName=qexp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
{plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP
"""


class Missing(Exception):
    """Why there is no Slurm to start; the message is one sentence."""


@contextmanager
def slurm_node(cpus: int = 4, memory_mb: int = 8000) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch, squeue, scancel and srun reach it. Errors: Missing."""
    environment = {**os.environ, **_search_paths()}
    programs = {name: _program(name, environment) for name in (*DAEMONS, "sbatch", "srun", "sinfo", "scancel")}
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="qexp-slurm-", ignore_cleanup_errors=True))
        )
        for name in "state", "spool":
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        plugins = [f"PluginDir={found.parent}" for found in _root().glob("usr/lib/*/slurm-wlm/auth_munge.so")]
        values = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "folder": folder}
        values |= {"cpus": cpus, "memory_mb": memory_mb, "ports": _free_ports(2), "plugins": "".join(plugins)}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        environment["SLURM_CONF"] = str(folder / "slurm.conf")

        def start(name: str, *options: str) -> None:
            log = stack.enter_context((folder / f"{name}.out").open("w"))
            command = [programs[name], *options]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            stack.callback(_stop, process)

        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        own = [f"--{option}={folder / name}" for option, name in munge.items()]
        start("munged", "--foreground", "--force", *own, f"--log-file={folder / 'munge.log'}")
        _until(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "-D", "-i", "-L", str(folder / "slurmctld.log"))
        start("slurmd", "-D", "-d", programs["slurmstepd"], "-L", str(folder / "slurmd.log"))
        state = [programs["sinfo"], "--noheader", "--format=%T"]
        _until(lambda: "idle" in subprocess.run(state, env=environment, capture_output=True, text=True).stdout, folder)
        stack.callback(_cancel_all, programs["scancel"], environment)
        yield environment


def _root() -> Path:
    return Path(os.environ.get("QEXP_SLURM_ROOT", "/"))


def _search_paths() -> dict[str, str]:
    root = _root()
    if not root.is_dir():
        raise Missing(f"QEXP_SLURM_ROOT={root}: no such folder")
    before = [str(root / "usr" / "bin"), str(root / "usr" / "sbin")]
    libraries = [str(path) for path in root.glob("usr/lib/*-linux-gnu")] if root != Path("/") else []
    libraries += [f"{path}/slurm-wlm" for path in libraries]
    paths = {"PATH": os.pathsep.join([*before, os.environ.get("PATH", "")])}
    return paths | ({"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {})


def _program(name: str, environment: dict[str, str]) -> str:
    found = [shutil.which(each, path=environment["PATH"]) for each in DAEMONS.get(name, (name,))]
    if not any(found):
        raise Missing(f"no {name} on the PATH or below QEXP_SLURM_ROOT (tests/launch/slurm_node.py says how)")
    return next(filter(None, found))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _until(met, folder: Path) -> None:
    end = time.monotonic() + UP_S
    while not met():
        if time.monotonic() > end:
            told = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in folder.glob("*.*ou*t"))
            raise RuntimeError(f"Slurm did not start in {UP_S:g} s\n{told}")
        time.sleep(0.05)


def _cancel_all(scancel: str, environment: dict[str, str]) -> None:
    subprocess.run([scancel, "--user", getpass.getuser()], env=environment, capture_output=True)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
