"""Sums of products that do not fit 16 bits: found where an engine saturates, and not where it does not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from qexp.engines.saturation import _probe, saturates


class Exact:
    """The probe's graph in integers; pairs of products cut to 16 bits where asked for, as vpmaddubsw cuts them."""

    name = "exact"

    def __init__(self, cut: bool) -> None:
        self.cut = cut

    def session(self, model, shape, threads, traced=False):
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        return self

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        codes = np.rint(batch).clip(0, 255).astype(np.int64)[0].reshape(batch.shape[1], -1)
        weights = self.constants["weights"].astype(np.int64)[:, :, 0, 0]
        products = weights[:, :, None] * codes[None]
        pairs = products[:, 0::2] + products[:, 1::2]
        sums = (pairs.clip(-(2**15), 2**15 - 1) if self.cut else pairs).sum(1)
        step = float(self.constants["step"])
        return [(np.rint(sums.clip(0) / step).clip(0, 255) * step).astype(np.float32).reshape(batch.shape)]


def test_the_probe_tells_exact_sums_from_saturated_ones():
    assert saturates(Exact(cut=True)) is True
    assert saturates(Exact(cut=False)) is False


def test_a_pair_of_the_probes_products_exceeds_16_bits_and_its_sum_fits_32():
    (weights,) = [numpy_helper.to_array(t) for t in _probe().graph.initializer if t.name == "weights"]
    products = 255 * weights.astype(np.int64)
    assert products[:, :2].sum(1).min() > 2**15 - 1
    assert products.sum(1).max() < 2**31


def test_an_engine_says_yes_or_no(engine):
    assert saturates(engine) in (True, False)


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="the processor's flags are not known")
def test_openvino_kept_to_instructions_without_vnni_saturates():
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no AVX2")
    code = (
        "from qexp.engines.openvino import OpenVino; from qexp.engines.saturation import saturates\n"
        "print(saturates(OpenVino()))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
