"""Export, placement, certificate and latency of the real int8; one file an engine."""

import os
import sys

# Both engines count their users, in files below the home directory and over the network, from the import on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # OpenVINO then does as where that package is not installed
