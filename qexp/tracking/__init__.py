"""Where a run's record goes besides its folder: W&B, a CSV file, nowhere."""

from qexp.tracking.loggers import Csv, Logger, NoLogger, RunInfo
from qexp.tracking.metrics import METRICS
from qexp.tracking.sweeps import summarise_sweep
from qexp.tracking.weights_and_biases import Wandb

__all__ = ["METRICS", "Csv", "Logger", "NoLogger", "RunInfo", "Wandb", "summarise_sweep"]
