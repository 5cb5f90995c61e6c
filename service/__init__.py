"""The Conveyor server."""

import os

# onnxruntime's published builds report what they load to their maker, unless this is set before they are imported.
# Export imports this package too, by way of the manifest.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
