"""What a result depends on besides its config: versions, processor, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    "torch", "pytorch-lightning", "torchmetrics", "onnx", "onnxscript", "onnxruntime", "openvino", "scikit-learn",
    "numpy", "hydra-core", "wandb",
)  # fmt: skip
INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")


def versions() -> dict[str, str]:
    """Library -> version, qexp and Python included."""
    from qexp import __version__

    found = {"qexp": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def processor() -> dict[str, str]:
    """Name of the CPU and those of its instruction sets that matter for int8; empty where the system hides them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "isa": " ".join(flag for flag in INT8_FLAGS if flag in flags) or platform.machine(),
    }


def commit() -> str | None:
    """The git commit of the checkout that qexp runs from, with "+" where files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=5
    )
    return result.stdout.strip()
