"""Records as runs leave them, made in a moment, and a browser that opens pages without a window."""

import contextlib
import csv
import html
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

MINMAX, MSE = "qexp.quant.calibration.MinMax", "qexp.quant.search.MSE"
SITES = ("stem.conv.input", "activation"), ("stem.conv.weight", "weight"), ("head.fc.weight", "weight")


def config(seed=0, bits=8, calibration=MINMAX, **more) -> dict:
    section = {"_target_": calibration, **({"candidates": 100} if calibration == MSE else {})}
    grid = {"_target_": "qexp.quant.grid.IntegerGrid", "bits": bits}
    return {
        "seed": seed, "data": {"_target_": "qexp.data.Digits", "seed": seed}, "paths": {"outputs": "outputs"},
        "calibration": {"weight": section, "activation": section, "logits": None},
        "quantizer": {"weight": grid, "activation": grid, "exclude": []},
        "model": {"_target_": "qexp.models.resnet8", "width": 16}, "logger": {"_target_": "qexp.tracking.NoLogger"},
        **more,
    }  # fmt: skip


def metrics(acc=0.9, **more) -> dict:
    return {
        "acc/fp32": 0.95, "acc/sim": acc - 0.1, "acc/engine": acc, "acc/drop": 0.95 - acc, "sqnr/output_db": 30.0,
        "latency/int8_ms": 0.05, "latency/speedup": 1.5, "size/packed_bytes": 40960, "engine/winner": "openvino",
        "openvino/latency/int8_ms": 0.05, "status": "finished", **more,
    }  # fmt: skip


def environment(**more) -> dict:
    return {"commit": "a" * 40, "cpu": "A CPU", "isa": "avx2", "versions": {"torch": "2.13.0"}, **more}


class Maker:
    """Writes records below an outputs folder."""

    config, metrics, environment = staticmethod(config), staticmethod(metrics), staticmethod(environment)
    MINMAX, MSE, SITES = MINMAX, MSE, SITES

    def __init__(self, outputs: Path) -> None:
        self.outputs, self._made = outputs, 0

    def run(self, of_config=None, of_metrics=None, of_environment=None, name=None, sites=SITES, curve=()) -> Path:
        self._made += 1
        folder = self.outputs / "runs" / (name or f"{self._made:012x}")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(of_config or config()))
        (folder / "metrics.json").write_text(json.dumps(of_metrics or metrics()))
        (folder / "environment.json").write_text(json.dumps(of_environment or environment()))
        rows = [{"site": site, "kind": kind, "sqnr_db": 20.0 + i} for i, (site, kind) in enumerate(sites)]
        for name_of_file, content in ("layers.csv", rows), ("finetune.csv", list(curve)):
            if content:
                with (folder / name_of_file).open("w", newline="") as file:
                    writer = csv.DictWriter(file, content[0])
                    writer.writeheader()
                    writer.writerows(content)
        return folder

    def grid(self, seeds=3) -> None:
        """Two calibrations by two widths; more bits cost time and bring accuracy, mse brings a little."""
        for calibration in MINMAX, MSE:
            for bits in 4, 8:
                for seed in range(seeds):
                    acc = 0.7 + 0.02 * bits + 0.01 * (calibration == MSE) + 0.001 * seed
                    time = {"latency/int8_ms": 0.01 * bits + 0.0001 * seed, "size/packed_bytes": 10_000 * bits}
                    self.run(config(seed, bits, calibration), metrics(acc, **time))

    def sweep(self, entries: list[dict], experiment=None, name="sweep") -> Path:
        """entries: {"run_id", "label", "choice"}."""
        folder = self.outputs / "sweeps" / name
        folder.mkdir(parents=True)
        varied = list(dict.fromkeys(key for entry in entries for key in entry["choice"]))
        content = {"sweep_id": name, "experiment": experiment, "varied": varied, "runs": entries}
        (folder / "sweep.json").write_text(json.dumps(content))
        return folder


@pytest.fixture
def make(tmp_path) -> Maker:
    return Maker(tmp_path / "outputs")


WATCH = """
window.seen = [];
addEventListener("error", event => seen.push(`error: ${event.message ?? event.target?.outerHTML}`), true);
addEventListener("unhandledrejection", event => seen.push(`rejected: ${event.reason}`));
addEventListener("securitypolicyviolation", event => seen.push(`policy: ${event.violatedDirective}`));
const said = console.error;
console.error = (...what) => { seen.push(`console: ${what.join(" ")}`); said(...what); };
"""
ASK = """
const pause = (ms = 200) => new Promise(done => setTimeout(done, ms));
const all = query => [...document.querySelectorAll(query)];
const texts = query => all(query).map(one => one.textContent);
(async () => {
  while (!document.documentElement.dataset.ready) await pause(20);
  let answer;
  try { answer = await (async () => { %s })(); } catch (error) { seen.push(`asked: ${error}`); }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({answer: answer ?? null, seen, ready: document.documentElement.dataset.ready,
    resources: performance.getEntriesByType("resource").map(entry => entry.name)});
  document.body.append(result);
})();
"""


class Browser:
    """A Chromium without a window, whose every connection would go through a proxy that only counts."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command, self.folder, self._opened = command, folder, 0

    def ask(self, page: str, script: str, *flags: str, before: str = "") -> dict:
        """Open a page, run a script in it when it is ready, and return its answer with what went wrong."""
        self._opened += 1
        path = self.folder / f"page{self._opened}.html"
        nonce = re.search(r"'nonce-(\w+)'", page)[1]
        head, rest = page.split("<title>", 1)
        head += f'<script nonce="{nonce}">{WATCH}{before}</script>'
        asked = f'<script nonce="{nonce}">{ASK % script}</script></body>'
        path.write_text("<title>".join([head, rest[::-1].replace("</body>"[::-1], asked[::-1], 1)[::-1]]))
        with counting() as (port, requests):
            done = self._run(path, "--dump-dom", f"--proxy-server=http://127.0.0.1:{port}", *flags)
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        # The browser's own errands, which it runs for an empty page too.
        asked = [line for line in requests if not re.search(r"\b(?<!fonts\.)(google|googleapis|gvt1)\.com\b", line)]
        return json.loads(html.unescape(found[1])) | {"requests": asked}

    def _run(self, path: Path, *flags: str) -> subprocess.CompletedProcess:
        profile = self.folder / f"profile{self._opened}"
        command = [
            self.command, "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-default-apps", "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter",
            "--no-pings", "--proxy-bypass-list=<-loopback>", "--window-size=1280,900", "--virtual-time-budget=60000",
            f"--user-data-dir={profile}", *flags, path.as_uri(),
        ]  # fmt: skip
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        finally:
            shutil.rmtree(profile, ignore_errors=True)


@contextlib.contextmanager
def counting():
    """A proxy that answers nothing and writes down what was asked of it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.requestline)
            self.send_error(502)

        do_CONNECT = do_POST = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def browser(tmp_path) -> Browser:
    names = filter(None, (os.environ.get("QEXP_BROWSER"), "chromium", "chromium-browser", "google-chrome", "chrome"))
    command = next((found for name in names if (found := shutil.which(name))), None)
    if command is None:
        pytest.skip("no Chromium or Chrome on PATH, nor in QEXP_BROWSER")
    folder = tmp_path / "browser"
    folder.mkdir()
    return Browser(command, folder)
