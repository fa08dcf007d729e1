"""What sweeps cost beside the work itself, and whether they survive kills."""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

QEXP = [sys.executable, "-m", "qexp"]
# 2 models x 3 calibrations x 2 granularities x 2 widths
GRID = [
    "-m", "model=resnet8,mobilenet", "calibration=minmax,mse,entropy", "granularity=per_tensor,per_channel",
    "quantizer=int8,w4a8", "logger.mode=offline",
]  # fmt: skip
TWELVE = [
    "-m", "trainer.epochs=2", "engine.seconds=0.05", "seed=0,1,2", "calibration=minmax,mse", "quantizer=int8,int4",
]  # fmt: skip


def call(folder: Path, *words: str) -> tuple[float, str]:
    """Seconds and stderr of one command, which must end well."""
    start = time.perf_counter()
    done = subprocess.run([*QEXP, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"qexp {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - start, done.stderr


def overhead(folder: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Of runs in one process, W&B offline: seconds of each, and seconds of it outside of the run's own stages."""
    words = ["hydra/launcher=in_process", "logger.mode=offline", "engine.seconds=0.1", "trainer.epochs=2"]
    call(folder, "-m", *words, "seed=0", "calibration=mse")  # trains the float network, and warms the disk
    _, told = call(folder, "-m", *words, "seed=0", f"quantizer.weight.bits={','.join(map(str, range(3, 3 + repeats)))}")
    whole, own = [], []
    for part in told.split("\nrun ")[-repeats:] if "\nrun " in told else []:
        lines = re.findall(r"^ +([\d.]+) s  (.*)$", part, re.M)
        whole.append(float(lines[-1][0]))
        own.append(sum(float(seconds) for seconds, what in lines[:-1]))
    return whole, [total - inside for total, inside in zip(whole, own, strict=True)]


def grid(folder: Path) -> dict[str, float]:
    """24 runs from nothing; with the float networks there; and when all is finished."""
    cold, _ = call(folder, *GRID)
    for name in "runs", "wandb", "sweeps", "logs":
        shutil.rmtree(folder / "outputs" / name)
    for name in "sketch", "onnx":
        shutil.rmtree(folder / "outputs" / "cache" / name)
    warm, _ = call(folder, *GRID)
    again, _ = call(folder, *GRID)
    return {"24 runs, cold cache": cold, "24 runs, float networks cached": warm, "24 runs, all finished": again}


def skipped(folder: Path) -> float:
    """1,000 finished runs: records are made up, as their content does not matter here."""
    words = [
        "-m", "seed=range(0,10)", "quantizer=int8,w4a8,int4,uint8,int8_pow2", "logger=none",
        "calibration=minmax,mse,entropy,percentile,aciq", "granularity=per_tensor,per_channel",
        "model=resnet8,mobilenet",
    ]  # fmt: skip
    from qexp.jobs import compose_jobs

    for job in compose_jobs(words[1:], multirun=True):
        run = folder / "outputs" / "runs" / job.run_id
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.json").write_text(json.dumps({"status": "finished", "acc/fp32": 1.0, "time/total_s": 3.0}))
    count = len(list((folder / "outputs" / "runs").iterdir()))
    seconds, told = call(folder, *words)
    if count != 1000 or "1000 of 1000 runs were finished before" not in told:
        sys.exit(f"{count} runs, and: {told}")
    return seconds


def kills(folder: Path, count: int, seed: int) -> dict[str, object]:
    """Twelve runs, killed whole at random moments; what came of them against a sweep that nobody disturbed."""
    call(folder / "calm", *TWELVE, "logger.mode=offline")
    draw, made, killed = random.Random(seed), {}, folder / "killed"
    remade = 0
    for _ in range(count):
        process = subprocess.Popen(
            [*QEXP, *TWELVE, "logger.mode=offline"], cwd=killed, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(1, 12))
        os.killpg(process.pid, 9)
        process.wait()
        now = _made(killed)
        remade += sum(now[run] != changed for run, changed in made.items())
        made = now
    call(killed, *TWELVE, "logger.mode=offline")
    final = _made(killed)
    remade += sum(final[run] != changed for run, changed in made.items())
    results = [next((folder / name).glob("outputs/sweeps/*/results.json")).read_bytes() for name in ("calm", "killed")]
    records = [path.name.rpartition("-")[2] for path in killed.glob("outputs/wandb/offline-run-*")]
    return {
        "kills": count,
        "runs lost": 12 - len(final),
        "runs made twice": remade,
        "runs with more or fewer than one W&B record": sum(records.count(run) != 1 for run in final),
        "results equal to the byte": results[0] == results[1],
    }


def _made(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("outputs/runs/*/metrics.json")}


def main() -> None:
    """Print one table, and write its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="overhead,grid,skipped,kills", help="which of them, separated by commas")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--repeats", type=int, default=6, help="runs of which the overhead is measured")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    found: dict[str, object] = {}
    for part in given.parts.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for inside in "calm", "killed":
                (folder / inside).mkdir()
            if part == "overhead":
                whole, beside = overhead(folder, given.repeats)
                found["a run in process, median s"] = sorted(whole)[len(whole) // 2]
                found["of it outside of its stages, median s"] = sorted(beside)[len(beside) // 2]
            elif part == "grid":
                found |= grid(folder)
            elif part == "skipped":
                found["1,000 finished runs skipped"] = skipped(folder)
            elif part == "kills":
                found |= kills(folder, given.kills, given.seed)
            else:
                parser.error(f"--parts={part}: allowed are overhead, grid, skipped, kills")
    table = Table("what", "figure")
    for what, figure in found.items():
        table.add_row(what, f"{figure:.2f} s" if isinstance(figure, float) else str(figure))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
