"""Run the demo: ``python -m demo``. Owns the order of its parts and what is said meanwhile; measures nothing itself."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from conveyor import ConveyorError
from demo.digits import Digits, load
from demo.picture import draw
from demo.results import Results, rows_by_tick
from demo.server import ServerFailed, running
from demo.streaming import SESSIONS, Streamed, stream
from demo.training import EPOCHS, train
from export import ExportError, export_model
from export.model_file import verify_file
from export.show import parity_table
from export.verify import largest_error
from models.fused import SequenceModel
from models.reference import run_model, stack_states

NAME = "digits"
console = Console(highlight=False)


def main() -> int:
    """Runs all of it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where everything is written [.demo]")
    folder: Path = parser.parse_args().folder
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # The model is small: a second thread would wait longer than it works.
    torch.set_num_threads(1)
    began = time.perf_counter()
    picture = folder / "demo.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = _run(folder)
        draw(results, picture)
        (folder / "results.json").write_text(results.to_json())
    except KeyboardInterrupt:
        console.print("\nInterrupted. Nothing is left running.")
        return 130
    except (ExportError, ServerFailed, ConveyorError, OSError) as error:
        Console(stderr=True, highlight=False, markup=False).print(f"The demo failed: {error}")
        return 1
    console.print(_summary(results))
    console.print(f"The server is stopped and its ports are free. {time.perf_counter() - began:.0f} s in all.")
    console.print(f"The picture of it: [bold]{picture}[/]")
    return 0


def _run(folder: Path) -> Results:
    digits, held_out = load()
    console.rule("[bold]1  Train", align="left")
    console.print(
        f"A fused-gate LSTM on {len(digits.labels)} images, a row of 8 values a step; {len(held_out.labels)} held out."
    )
    model = _train(digits)

    console.rule("[bold]2  Export and verify", align="left")
    repository = folder / "repository"
    with console.status("exporting") as status:
        path = export_model(
            model,
            repository,
            NAME,
            version=1,
            overwrite=True,
            data={"x": held_out.images},
            progress=lambda doing: status.update(f"exporting: {doing}"),
        )
        parity = verify_file(path, progress=lambda doing: status.update(f"the file as written: {doing}"))
    console.print(parity_table(parity))

    console.rule("[bold]3  Serve and stream", align="left")
    with running(repository, folder / "server.log") as server:
        console.print(f"The server is a process of its own, ready after {server.ready_s:.2f} s at {server.target}.")
        streamed = _stream(server.target, held_out)
        counted = server.metrics()
    difference, error = _against_reference(model, held_out, streamed)
    return Results(
        digits=held_out,
        outputs=streamed.outputs,
        latencies_s=streamed.latencies_s,
        seconds=streamed.seconds,
        sessions=SESSIONS,
        tick_rows=rows_by_tick(counted),
        rows_per_tick=counted["conveyor_tick_rows_sum", ""] / counted["conveyor_tick_rows_count", ""],
        steps=int(counted["conveyor_steps_total", ""]),
        largest_difference=difference,
        largest_error=error,
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _train(digits: Digits) -> SequenceModel:
    with _progress() as progress:
        task = progress.add_task("epochs", total=EPOCHS)
        return train(digits, lambda loss: progress.update(task, advance=1, description=f"epochs, loss {loss:.3f}"))


def _stream(target: str, digits: Digits) -> Streamed:
    with _progress() as progress:
        task = progress.add_task(f"images, {SESSIONS} sessions at a time", total=len(digits.labels))
        return asyncio.run(stream(target, NAME, digits.images, lambda: progress.advance(task)))


def _against_reference(model: SequenceModel, digits: Digits, streamed: Streamed) -> tuple[float, float]:
    """All outputs and final states against the float64 reference: the largest difference, and that as export has it."""
    weights = {name: array.astype(np.float64) for name, array in model.weights().items()}
    y, states = run_model(model.spec, weights, digits.images.astype(np.float64))
    h, c = (state.swapaxes(0, 1) for state in stack_states(states))
    pairs = [
        (streamed.outputs, y, np.abs(y).max(axis=2, keepdims=True)),
        (streamed.states["h"], h, np.abs(h)),
        (streamed.states["c"], c, np.abs(c)),
    ]
    largest_difference = max(float(np.abs(served - expected).max()) for served, expected, _ in pairs)
    return largest_difference, max(largest_error(*pair) for pair in pairs)


def _summary(results: Results) -> Table:
    table = Table(title="What came out", show_header=False, title_justify="left")
    for row, accuracy in enumerate(results.accuracy, start=1):
        bar = "█" * round(30 * accuracy)
        table.add_row(
            f"accuracy after row {row}" if row == 1 else f"               row {row}", f"{accuracy:6.1%} {bar}"
        )
    table.add_section()
    table.add_row("largest error against NumPy", f"{results.largest_error:.1e}, over all outputs and final states")
    table.add_row("", "by export's measure: relative beyond 1")
    table.add_row("  as a plain difference", f"{results.largest_difference:.1e}, of outputs up to {results.reach:.0f}")
    table.add_row("steps applied", f"{results.steps:,}, for {results.outputs[..., 0].size:,} rows sent")
    table.add_row("steps a second", f"{results.steps_per_second:,.0f}, while {results.sessions} sessions stream")
    table.add_row(
        "from a row to its answer", f"p50 {results.latency_ms(50):.1f} ms, p99 {results.latency_ms(99):.1f} ms"
    )
    table.add_row("rows in one tick, on average", f"{results.rows_per_tick:.1f}")
    return table


def _interrupt(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
