"""A peer: Triton's own server with its sequence batcher, from the wheel that carries it.

Owns its environment, its repository and its command line. It has no ONNX backend there, so that the graph runs in its
Python backend; it takes one step a message, and its sequence ids from the client.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import onnxruntime

from bench.models import Model
from bench.processes import Failed, Process
from service.manifest import METADATA_KEY, Manifest

_PACKAGES = ("nvidia-pytriton==0.7.0", "numpy", "onnxruntime")
LARGEST_BATCH = 64
"""With 256 sequences it was seen to die with signal 11."""


def install(folder: Path, say: Callable[[str], None]) -> Path:
    """Make the environment that it runs in, unless it is there.

    Returns:
        The environment's folder.

    Raises:
        Failed: if it cannot be had here.
    """
    venv = folder / "triton-venv"
    done = venv / "done"
    if done.exists():
        return venv
    say("installing Triton's server")
    # Without a terminal there is no line that says what is done now, and this takes minutes.
    print(f"Installing Triton's server into {venv}, once.", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True, capture_output=True)
        pip = [str(venv / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", *_PACKAGES]
        subprocess.run(pip, check=True, capture_output=True)
        stubs = _site(venv) / "pytriton/tritonserver/python_backend_stubs" / "{}.{}".format(*sys.version_info)
        shutil.copytree(stubs, _site(venv) / "pytriton/tritonserver/backends/python", dirs_exist_ok=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed(f"Triton cannot be installed here: {error}") from error
    done.touch()
    return venv


def start(model: Model, path: Path, folder: Path, threads: int, say: Callable[[str], None]) -> Process:
    """Start it with one model.

    Raises:
        Failed: if it does not start.
    """
    venv = install(folder, say)
    repository = folder / "triton-repositories" / model.name
    version = repository / model.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("triton_model.py"), version / "model.py")
    shutil.copy(path, version / "graph.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    manifest = Manifest.model_validate_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    names = {
        "x": manifest.inputs[0].name,
        "y": manifest.outputs[0].name,
        "lengths": manifest.lengths,
        "state_inputs": [state.input for state in manifest.states],
        "state_outputs": [state.output for state in manifest.states],
        "state_shapes": [state.tail for state in manifest.states],
        "threads": threads,
    }
    (version / "graph.json").write_text(json.dumps(names))
    (repository / model.name / "config.pbtxt").write_text(_config(model, manifest))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = _site(venv)
    server = site / "pytriton/tritonserver"
    # It says that it is ready in words of its own; the shell around it says so in ours, once the port answers.
    command = [
        str(server / "bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={server / 'backends'}",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        "--backend-config=python,shm-default-byte-size=67108864",
    ]
    libraries = f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environment = {
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": str(site),
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
        "VIRTUAL_ENV": str(venv),
    }
    return Process("triton", command, environment, ready=lambda: _answers(port))


def _answers(port: int) -> dict[str, object]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ready: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
        while True:
            try:
                # One field, the first, a bool: true.
                if ready(b"", timeout=5) == b"\x08\x01":
                    return {"port": port}
            except grpc.RpcError:
                time.sleep(0.2)


def _site(venv: Path) -> Path:
    return next((venv / "lib").glob("python*/site-packages"))


def _config(model: Model, manifest: Manifest) -> str:
    return f"""name: "{model.name}"
backend: "python"
max_batch_size: {LARGEST_BATCH}
input [{{ name: "x" data_type: TYPE_FP32 dims: [ 1, {model.input_size} ] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [ 1, {model.hidden_size} ] }}]
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  oldest {{ max_candidate_sequences: 256 max_queue_delay_microseconds: 0 }}
  control_input [
    {{ name: "START" control [{{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }}] }},
    {{ name: "CORRID" control [{{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}] }}
  ]
}}
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""
