#!/bin/sh
# Puts onnxruntime-gpu, its CUDA libraries and CuPy in the place of onnxruntime in .venv, where there is an NVIDIA device. Where there is
# none it changes nothing and says so: what needs one then says the same for itself.
#
# onnxruntime and onnxruntime-gpu hold the same package. With both, whichever was installed last runs: so the one goes first, and the
# other is installed anew. The tests that need no GPU pass with either.
#
#   sh scripts/gpu.sh [DEVICE...]   files of which one is there where a device is; /dev/dxg is that of WSL [/dev/nvidia0 /dev/dxg]
set -eu
cd "$(dirname "$0")/.."
log=.venv/pip-gpu.log

has() {
    .venv/bin/python -c 'import sys; from importlib.metadata import distribution; distribution(sys.argv[1])' "$1" 2>/dev/null
}

[ "$#" -gt 0 ] || set -- /dev/nvidia0 /dev/dxg
there=""
for device; do
    [ ! -e "$device" ] || there="$device"
done
if [ -z "$there" ]; then
    echo "No NVIDIA device on this machine ($*): .venv stays as it is."
    exit 0
fi
if has onnxruntime-gpu && has cupy-cuda13x && ! has onnxruntime; then
    exit 0
fi
echo "Putting onnxruntime-gpu with its CUDA libraries into .venv. Once, and some minutes: gigabytes."
status=0
{
    .venv/bin/python -m pip uninstall --yes onnxruntime onnxruntime-gpu &&
        .venv/bin/python deploy/requirements.py gpu >.venv/gpu-requirements.txt &&
        .venv/bin/python -m pip install --disable-pip-version-check -r .venv/gpu-requirements.txt
} >"$log" 2>&1 || status=$?
if [ "$status" -ne 0 ]; then
    echo "That failed. The last that pip said, of $log:" >&2
    tail -n 20 "$log" | sed 's/^/  /' >&2
    echo "Run the same command again to go on." >&2
    exit 1
fi
