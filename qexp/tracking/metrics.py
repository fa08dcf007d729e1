"""The names of all that a run records, and from where on two of them tell that an engine computes something else."""

from __future__ import annotations

DIFFERS_DB = 20  # below it, and so much below that of the other batches, logits are not those of the simulation

# Every metric a run writes, in metrics.json and in W&B alike; accuracy is a share, latency milliseconds, sizes bytes.
METRICS = {
    "acc/fp32": "accuracy of the float network",
    "acc/sim": "accuracy of the simulation",
    "acc/engine": "accuracy of the engine that runs in int8",
    "acc/drop": "acc/fp32 minus acc/engine, or minus acc/sim where no engine ran",
    "data/test_samples": "samples of the test split",
    "data/truncated": "texts, of training and test, that were longer than data.length and cut",
    "agree/argmax": "share of samples that the engine, or where none ran the simulation, decides as the float network",
    "sqnr/output_db": "SQNR of the simulated logits against the float ones",
    "sqnr/embedding_db": "the same of the embeddings that an encoder's head reads",
    "dynamic/batch_sqnr_db": "ranges of each call: SQNR of simulated logits of a sample alone against those in a batch",
    "dynamic/batch_samples": "samples that were compared so, the first of the test set",
    "dynamic/batch_flips": "of them, those that are decided differently alone",
    "dynamic/within_sample": "whether each of these ranges lies within one sample, so that others cannot change it",
    "parity/identical": "share of activation codes equal in simulation and engine",
    "parity/off_by_one": "share of codes one step apart",
    "parity/larger": "share of codes further apart",
    "parity/max_step": "largest distance of two codes",
    "parity/codes": "number of codes compared; 0 of an engine that shows none, which has no figures of codes then",
    "parity/local_identical": "the same where every layer is given the engine's own codes, over the first batch",
    "parity/local_max_step": "largest distance then",
    "parity/output_sqnr_db": "SQNR of the engine's logits against those of the simulation",
    "parity/timed_sqnr_db": "the same on the batch that is timed, of engine.batch_size samples",
    "parity/argmax_flips": "samples that engine and simulation decide differently",
    "parity/faithful": "whether the graph that shows its codes gives the logits of the timed one to the bit",
    "parity/faithful_sqnr_db": "SQNR of the logits of the graph that shows its codes against those of the timed one",
    "int8/formats": "formats of activations that this engine was given",
    "int8/mac_coverage": "share of multiply-accumulates that the engine runs in int8",
    "int8/islands": "layers with products or residual sums that the engine runs in float, sums before norms aside",
    "int8/island_names": "those layers",
    "int8/saturates": "whether the engine's int8 sums saturate in 16 bits on this CPU",
    "latency/fp32_ms": "median time of one call of the same engine in fp32",
    "latency/int8_ms": "median time of one call in int8",
    "latency/speedup": "fp32 over int8",
    "latency/speedup_lo": "lower end of its 95 % bootstrap interval",
    "latency/speedup_hi": "upper end",
    "latency/aa_lo": "the same interval for fp32 against itself: what noise alone does",
    "latency/aa_hi": "upper end",
    "latency/best_fp32_ms": "the fastest fp32 of all engines and torch",
    "latency/best_fp32_engine": "whose it is",
    "latency/speedup_over_best_fp32": "that over int8",
    "latency/speedup_over_best_fp32_lo": "lower end of its 95 % bootstrap interval",
    "latency/speedup_over_best_fp32_hi": "upper end",
    "acc/ptq": "accuracy of the simulation before fine-tuning, which is that of method=ptq",
    "acc/control": "accuracy of the float network after as many steps of fine-tuning (finetune=float)",
    "sqnr/ptq_db": "sqnr/output_db before fine-tuning",
    "finetune/epochs": "epochs of fine-tuning",
    "finetune/loss": "mean training loss of the last one",
    "finetune/weight_change": "distance of the weights to those before, over the norm of those before",
    "finetune/changed_codes": "share of weights whose code changed in a step, where weights are stored on their grid",
    "time/finetune_s": "fine-tuning",
    "flat/loss": "training loss at the weights that are evaluated, activations in float (docs/flatness.md)",
    "flat/top_eigenvalue": "largest eigenvalue of its Hessian",
    "flat/trace": "trace of its Hessian, estimated",
    "flat/trace_error": "standard error of that",
    "flat/sam_sharpness": "how far it rises in a ball of radius 0.05, by a step along the gradient",
    "flat/worst_in_cell": "how far it rises with no weight moved by more than half a step, found by ascent",
    "size/fp32_bytes": "size of model_fp32.onnx",
    "size/int8_bytes": "size of model_int8.onnx",
    "size/packed_bytes": "the formats' own: packed codes, scales and zero points, biases, what stays in float",
    "size/qparams_bytes": "the part of it that scales, zero points and codebooks take",
    "smoothing/groups": "groups of linear layers with one input that were smoothed",
    "smoothing/skipped": "groups and linear layers that were not, each with its reason in smoothing.csv",
    "smoothing/alpha": "mean migration strength of the groups",
    "bias_correction/layers": "layers whose bias was corrected",
    "bias_correction/skipped": "layers whose bias was not, because they are used more than once",
    "time/calibrate_s": "from the float network to a calibrated one: folding, smoothing, ranges, biases",
    "time/total_s": "the whole run",
    "engine/winner": "the fastest in int8 of those that compute what the simulation says; plain names are its",
    "engine/refused": "engines that could not run this model, and why",
    "status": "finished, or there is no file",
}

# What a run records in W&B while it goes on, or of which it has many: name -> what stands in its summary ("": the last
# value), and the x-axis ("": the order of logging). The history of fine-tuning is logged at the end, so that a run
# that was killed and went on has all of it.
CURVES = {
    "train/loss": ("min,last", ""),
    "finetune/changed_codes": ("", ""),
    "finetune/history/loss": ("min,last", "epoch"),
    "finetune/history/changed_codes": ("last", "epoch"),
    "finetune/history/weight_change": ("last", "epoch"),
    "weights/*": ("none", ""),
    "activations/*": ("none", ""),
}


def timed_differs(timed_db: float | None, output_db: float | None) -> bool:
    """Whether an engine computes the batch that is timed otherwise than all batches; None is not measured.

    A single sample may be some decibels below the others, in an encoder where roundings grow.

    >>> timed_differs(-6.0, 70.0), timed_differs(18.0, 27.0), timed_differs(None, 70.0)
    (True, False, False)
    """
    return timed_db is not None and timed_db < DIFFERS_DB and (output_db is None or timed_db < output_db - DIFFERS_DB)
