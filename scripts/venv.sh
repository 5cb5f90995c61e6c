#!/bin/sh
# Makes .venv in the checkout, or leaves it alone when it is complete and up to date. Needs nothing but Python.
#
# The stamp is written last and says for which folder, Python and pyproject.toml the environment was made. So an environment that was
# moved, half made, or whose Python is gone is made anew, and one that is only out of date is brought up to date.
#
#   PYTHON=...   the Python to use; by default the first of python3, python3.13, python3.12, python3.11 that will do
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/made-for
log=.venv/pip.log

wanted() {
    echo "folder $(pwd -P)"
    echo "python $(.venv/bin/python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo none)"
    echo "pyproject.toml $(cksum <pyproject.toml)"
}

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    too_old="" no_venv=""
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11
    fi
    for candidate; do
        version=$("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || continue
        if ! fits "$candidate"; then
            too_old="$too_old $candidate ($version)"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            no_venv="$no_venv $candidate ($version)"
        else
            return 0
        fi
    done
    echo "Conveyor needs Python 3.11 or later with the modules venv and ensurepip." >&2
    [ -z "$no_venv" ] || echo "Without venv or ensurepip:$no_venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
    [ -z "$too_old" ] || echo "Too old:$too_old." >&2
    [ -n "$no_venv$too_old" ] || echo "No Python was found under: $*." >&2
    echo "Name another one with: make PYTHON=/path/to/python3 ..." >&2
    return 1
}

# One line that tells what pip is at, on a terminal, for as long as this script runs.
show_progress() {
    began=$(date +%s)
    while kill -0 $$ 2>/dev/null; do
        doing=$(grep -E '^ *(Collecting|Downloading|Building|Installing) ' "$log" | tail -n 1 | tr -s ' ' | cut -c 1-60)
        printf '\r  %4d s  %-62s' "$(($(date +%s) - began))" "$doing"
        sleep 1
    done
}

have=$(cat "$stamp" 2>/dev/null || true)
want=$(wanted)
[ "$have" != "$want" ] || exit 0

# All but the last line, the checksum: if these agree the environment is sound, only older than pyproject.toml.
if [ "$(echo "$have" | head -n 2)" = "$(echo "$want" | head -n 2)" ]; then
    echo "pyproject.toml has changed: bringing .venv up to date"
else
    find_python
    echo "Setting up .venv with Python $version. Once, and some minutes: PyTorch alone is hundreds of megabytes."
    "$candidate" -m venv --clear .venv
fi
rm -f "$stamp"
: >"$log"
progress=""
if [ -t 1 ]; then
    show_progress &
    progress=$!
fi
status=0
.venv/bin/python -m pip install --disable-pip-version-check --editable '.[dev]' >"$log" 2>&1 || status=$?
if [ -n "$progress" ]; then
    kill "$progress" 2>/dev/null || true
    printf '\r%72s\r' ''
fi
if [ "$status" -ne 0 ]; then
    echo "Setting up .venv failed. The last that pip said, of $log:" >&2
    tail -n 20 "$log" | sed 's/^/  /' >&2
    echo "Run the same command again to go on." >&2
    exit 1
fi
wanted >"$stamp"
echo "The environment in .venv is ready."
