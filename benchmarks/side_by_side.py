"""Runs the commands of a file, one a line, several side by side, in order, until the time is up.

    python benchmarks/side_by_side.py commands.txt --processes 8 --minutes 60 --logs logs

A GPU is kept busy by several small trainings at once. What each says goes to a log of its own (its number in the file);
a line is printed whenever one ends. If the first commands that end all fail, the rest is stopped.
"""

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path

HOPELESS = 4
"""So many failures without a success, and the rest is stopped."""


def main() -> None:
    """Starts, waits, and stops what is left when the time is up."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commands", type=Path)
    options.add_argument("--processes", type=int, default=8)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--logs", type=Path, required=True)
    args = options.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    waiting = [line for line in args.commands.read_text(encoding="utf-8").splitlines() if line.strip()]
    began, number, ended = time.monotonic(), 0, {True: 0, False: 0}
    running: dict[subprocess.Popen[bytes], tuple[int, str, float]] = {}
    while running or waiting:
        for process, (place, command, start) in list(running.items()):
            if process.poll() is None:
                continue
            del running[process]
            ended[process.returncode == 0] += 1
            now = time.monotonic()
            print(
                f"{now - began:.0f} s: {place} exit {process.returncode} after {now - start:.0f} s: {command[-100:]}",
                flush=True,
            )
        if time.monotonic() - began > 60 * args.minutes or (ended[False] >= HOPELESS and not ended[True]):
            break
        while waiting and len(running) < args.processes:
            command, number = waiting.pop(0), number + 1
            with (args.logs / f"{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["bash", "-c", command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            running[process] = number, command, time.monotonic()
        time.sleep(0.2)
    for process, (place, command, start) in running.items():
        os.killpg(process.pid, signal.SIGKILL)
        print(f"stopped: {place} after {time.monotonic() - start:.0f} s: {command[-100:]}")
    print(f"{ended[True]} done, {ended[False]} failed, {len(running)} stopped, {len(waiting)} not started")


if __name__ == "__main__":
    main()
