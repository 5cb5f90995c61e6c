"""Run the server, ``python -m service --repository DIR``, or measure its models, ``python -m service tune``.

Parses settings and runs, nothing else.
"""

from __future__ import annotations

import os
import sys

from service.settings import load, load_tune


def main() -> int:
    """Run until a signal comes; return the exit status."""
    if sys.argv[1:2] == ["tune"]:
        return measure()
    settings = load(sys.argv[1:], os.environ)
    # gRPC's core writes to standard error in a form of its own; what matters comes back as an exception and is logged.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # After the settings, so that --help and a wrong flag answer before the libraries are loaded.
    import uvloop

    from service.logs import configure_logs
    from service.server import serve

    configure_logs(settings.log_level, settings.log_format)
    # How long a thread that computes in Python may keep the others waiting: the event loop behind a model's thread, and
    # the other way round. By default it is as long as a few ticks take.
    sys.setswitchinterval(0.001)
    return uvloop.run(serve(settings))


def measure() -> int:
    """Measure the models; return the exit status."""
    settings, model = load_tune(sys.argv[2:], os.environ)
    from service.logs import configure_logs
    from service.tune import tune

    configure_logs(settings.log_level, settings.log_format)
    return tune(settings, model)


if __name__ == "__main__":
    status = main()
    # A run of a model that never ends would hold an ordinary exit for ever. Nothing is left to be written here.
    sys.stdout.flush()
    os._exit(status)
