"""Training on one device or several: a call of `fit` in one process; the others, the ranks, exist only within it.

Each rank gets its part of every batch, BatchNorm the moments of the whole batch, gradients are averaged: two ranks
train as one process does, up to the order in which floats are summed. Ranks are forked from a server that has imported
everything and done nothing: a fork of this process, which may have used threads or a GPU, may hang, and one that is
spawned spends seconds on imports. Dropout draws the same mask on every rank.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.layer_sync import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from torch import multiprocessing, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from qexp.data.base import shared_loader
from qexp.quant.distributed import share_batchnorm_


class RankFailed(Exception):
    """A rank ended with an error that is none of the user's; the message is that error."""


class Trainer(pl.Trainer):
    """pl.Trainer that trains on several devices in one call of `fit`, and resumes in the order of the data.

    After `fit`, weights, buffers, metrics and the states of callbacks are here, and what was logged is in the logger;
    what else a callback or the network keeps stays with the ranks, which are gone. Progress is not told meanwhile.
    Errors: ValueError of a rank as one here, RankFailed for any other.
    """

    def __init__(self, *, devices: int = 1, threads: int = 1, logger: Any = False, **options: Any) -> None:
        if devices > 1:
            strategy = _Ranks(
                threads, start_method="forkserver", find_unused_parameters=True, broadcast_buffers=False
            )  # a parameter is unused while its quantizer is off; buffers are equal already
            options |= {"strategy": strategy, "plugins": [_SharedBatchNorm()], "use_distributed_sampler": False}
            logger = _Kept(logger) if logger else False
        super().__init__(devices=devices, logger=logger, **options)

    def fit(self, model: pl.LightningModule, loader: DataLoader, ckpt_path: Path | None = None, **options: Any) -> None:
        """Train; from the epoch on that a checkpoint names."""
        if self.num_devices > 1:
            loader = shared_loader(loader, self.num_devices)
        if ckpt_path is not None:  # worker processes of a loader fetch before Lightning names the epoch
            set_epoch = getattr(loader.batch_sampler.sampler, "set_epoch", lambda epoch: None)
            saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            set_epoch(saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
        super().fit(model, loader, ckpt_path=ckpt_path, **options)


def require_shareable(net: nn.Module, loader: DataLoader, devices: int) -> None:
    """Refuse what ranks cannot be given. Errors: ValueError."""
    shared = shared_loader(loader, devices)
    for name, thing in ("model", net), ("data", shared):
        try:
            pickle.Pickler(_Nowhere()).dump(thing)
        except Exception as error:  # whatever a user's class raises
            why = " ".join(str(error).split())
            raise ValueError(f"trainer.devices={devices}: {name} cannot be sent to other processes ({why})") from None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _SharedBatchNorm(LayerSync):
    def apply(self, model: nn.Module) -> nn.Module:
        share_batchnorm_(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        share_batchnorm_(model, False)
        return model


class _Ranks(DDPStrategy):
    """DDP in spawned processes, which are as silent as the process that started them."""

    def __init__(self, threads: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.threads = threads

    def _configure_launcher(self) -> None:
        self._launcher = _Launcher(self, self._start_method)

    def setup_environment(self) -> None:
        import logging

        for name in "pytorch_lightning", "lightning_fabric":
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        torch.set_num_threads(self.threads)
        super().setup_environment()


class _Launcher(_MultiProcessingLauncher):
    """Starts the ranks, and brings back what they know.

    Lightning's own would share the memory of tensors, which fails for those that exist only while they are pickled, as
    the state of a generator does; and it reads what comes back when the ranks have ended, which fails for much of it.
    """

    def launch(self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **options: Any) -> Any:
        port = str(self._strategy.cluster_environment.main_port)
        sent = pickle.dumps((self, trainer, function, args, options, _GlobalStateSnapshot.capture()))
        method = self._start_method
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(["qexp.prepare"])
        back = context.SimpleQueue()
        try:
            with _quiet():
                ranks = multiprocessing.start_processes(
                    _work, (sent, port, back), self._strategy.num_processes, join=False, start_method=method
                )
            self.procs, output = ranks.processes, None
            while not ranks.join(timeout=0.1):
                if output is None and not back.empty():
                    output = back.get()
            output = output or back.get()
            self._recover_results_in_main_process(output, trainer)
            return output.trainer_results
        except ProcessRaisedException as error:  # its message is a traceback
            last = str(error).strip().splitlines()[-1]
            kind, _, text = last.partition(": ")
            raise ValueError(text) if kind == "ValueError" else RankFailed(last) from error
        finally:
            for process in self.procs:  # after an error or a signal; of a training that ended well none is left
                if process.is_alive():
                    process.kill()

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
        logged = [logger.rows for logger in trainer.loggers]
        return {**super().get_extra_results(trainer), "ranks": pickle.dumps((states, logged))}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        states, logged = pickle.loads(extra["ranks"])
        for callback in trainer.callbacks:
            if states.get(callback.state_key):
                callback.load_state_dict(states[callback.state_key])
        for logger, rows in zip(trainer.loggers, logged, strict=True):
            logger.tell(rows)


@contextmanager
def _quiet() -> Iterator[None]:
    """Processes that start within say nothing of parameters that are used in some epochs alone."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    try:
        yield
    finally:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
        if before is not None:
            os.environ["TORCH_CPP_LOG_LEVEL"] = before


def _work(rank: int, sent: bytes, port: str, back: Any) -> None:
    os.environ["MASTER_PORT"] = port
    launcher, trainer, function, args, options, states = pickle.loads(sent)
    launcher._wrapping_function(rank, trainer, function, args, options, back, states)


class _Kept(Logger):
    """Keeps what a rank logs, for the logger of the process that started it."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger: Logger | None = logger
        self.rows: list[tuple[dict[str, float], int | None]] = []

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def tell(self, rows: list[tuple[dict[str, float], int | None]]) -> None:
        """Log what came back."""
        for metrics, step in rows:
            self.logger.log_metrics(metrics, step)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logger": None}
