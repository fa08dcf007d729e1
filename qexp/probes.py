"""What qexp doctor asks of libraries, in processes of their own: python -P -m qexp.probes NAME ...

A library that is broken may raise anything, hang, or take its process along. Nothing but the standard library is
imported before the library that is asked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from urllib.parse import urlsplit

MARK = "qexp-probe: "  # before an answer, among whatever libraries print

# name -> the modules that are imported
PLAIN = {
    "onnx": ("onnx", "onnxscript"),
    "training": ("pytorch_lightning", "torchmetrics"),
    "data": ("sklearn.datasets", "PIL.Image"),
    "matplotlib": ("matplotlib.ft2font",),
    "page": ("plotly", "jinja2"),
    "optuna": ("optuna",),
    "slurm": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher"),
}


def main(names: list[str]) -> None:
    """Answer one after the other, each as soon as it is known."""
    for name in names:
        try:
            told = PROBES[name]() if name in PROBES else _imported(*PLAIN[name])
        except Exception as error:
            what = " ".join(str(error).split())
            told = {"error": f"{type(error).__name__}: {what[:300]}" if what else type(error).__name__}
        print(f"\n{MARK}{json.dumps([name, told])}", flush=True)


def _imported(*modules: str) -> dict[str, str]:
    for module in modules:
        import_module(module)
    return {}


def _torch() -> dict[str, object]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    for i in range(len(gpus)):
        torch.ones(8, device=f"cuda:{i}").sum().item()
    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    return {"version": torch.__version__, "build": build or "", "gpus": gpus, "threads": torch.get_num_threads()}


def _engine(module: str, kind: str) -> dict[str, object]:
    """Run an int8 convolution of the largest codes, and see whether its sums are exact."""
    engine = getattr(import_module(f"qexp.engines.{module}"), kind)()
    return {"version": engine.version(), "saturates": import_module("qexp.engines.saturation").saturates(engine)}


def _wandb() -> dict[str, object]:
    """Whether a key is configured, for which host; no error of W&B's is told, which might hold a part of the key."""
    import wandb

    from qexp.tracking.weights_and_biases import Wandb, _has_key

    told: dict[str, object] = {"version": version("wandb"), "mode": os.environ.get("WANDB_MODE", "")}
    try:
        told["host"] = urlsplit(wandb.Settings().base_url).hostname or ""  # without a password in the address
        told["key"] = _has_key(wandb)
        told["online"] = Wandb()._online(wandb)
    except Exception as error:
        told["unreadable"] = type(error).__name__
    return told


PROBES: dict[str, Callable[[], dict[str, object]]] = {
    "torch": _torch,
    "onnxruntime": lambda: _engine("onnxruntime", "OnnxRuntime"),
    "openvino": lambda: _engine("openvino", "OpenVino"),
    "wandb": _wandb,
}

if __name__ == "__main__":
    main(sys.argv[1:])
