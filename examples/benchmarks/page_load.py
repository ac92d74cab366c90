"""Twenty visitors at once on the page of this computer: errors, waiting times and memory.

Starts ``app.py`` of this repository on a free port of 127.0.0.1, lets every visitor drop a
photograph and a disparity map of its own, focus here and there, and stops it again.

    python examples/benchmarks/page_load.py --visitors 20 --requests 200
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
LENS = (1.8, 85, 2, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of all visitors together")
    parser.add_argument("--side", type=int, default=512, help="of their photographs, in pixels")
    parser.add_argument("--seconds", type=float, default=900, help="at most, once it answers")
    arguments = parser.parse_args()
    if not (1 <= arguments.visitors <= 100 and arguments.requests <= 5000):
        parser.error("at most 100 visitors and 5000 requests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        surroundings = {
            **os.environ,
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "TMPDIR": folder,
        }
        with open(Path(folder) / "log.txt", "w") as log:
            server = subprocess.Popen(
                [sys.executable, "app.py"],
                cwd=REPOSITORY, env=surroundings, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                measure(f"http://127.0.0.1:{port}/", server.pid, Path(folder), arguments)
            finally:
                server.terminate()
                server.wait(30)


def measure(address: str, pid: int, folder: Path, arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    end = time.monotonic() + arguments.seconds
    waits: list[float] = []
    errors: list[str] = []
    memory = [memory_mb(pid)]
    processor = processor_s(pid)
    lock = threading.Lock()
    each = max(arguments.requests // arguments.visitors, 2)

    def visit(number: int) -> None:
        generator = np.random.default_rng(number)
        photo, map_file = scene_of(number, arguments.side, folder)
        try:
            client = Client(address, verbose=False)
            lens = (*LENS, "BokehFlow: small and fast, embedded")
            for turn in range(each):
                if time.monotonic() > end:
                    raise TimeoutError(f"after {arguments.seconds:g} s")
                start = time.perf_counter()
                if turn == 0:  # without a map the page says so
                    answer = client.predict(handle_file(photo), *lens, api_name="/photo")
                elif turn == 1:
                    unit = "0 (far) to 1 (near)"
                    answer = client.predict(
                        handle_file(map_file), unit, *lens, api_name="/disparity"
                    )
                else:
                    x, y = generator.integers(0, arguments.side * 3 // 4, 2).tolist()
                    answer = client.predict(x, y, *lens, api_name="/focus")
                with lock:
                    waits.append(time.perf_counter() - start)
                    memory.append(memory_mb(pid))
                if turn:
                    check(answer, number)
        except Exception as error:
            with lock:
                errors.append(f"visitor {number}: {type(error).__name__}: {error}")

    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.visitors) as visitors:
        list(visitors.map(visit, range(arguments.visitors)))
    took = time.perf_counter() - start
    used = processor_s(pid) - processor
    print(f"{arguments.visitors} visitors, {len(waits)} requests, {len(errors)} errors")
    print(f"{took:.0f} s, {used / max(len(waits), 1):.2f} s of processor time per request")
    if waits:
        print(
            f"a request waited {statistics.median(waits):.1f} s (median), {max(waits):.1f} s most"
        )
    half = memory[len(memory) // 2]
    print(
        f"memory of the server: {memory[0]:.0f} MB at the start, {half:.0f} halfway, "
        f"{memory[-1]:.0f} at the end, {max(memory):.0f} most"
    )
    for error in errors:
        print(error)
    if errors:
        sys.exit(1)


def scene_of(number: int, side: int, folder: Path) -> tuple[Path, Path]:
    """A photograph whose mean brightness tells whose it is, and a disparity map."""
    generator = np.random.default_rng(number)
    photo, map_file = folder / f"{number}.png", folder / f"{number}.npy"
    noise = generator.integers(-20, 20, (side * 3 // 4, side, 3))
    Image.fromarray((brightness(number) + noise).astype(np.uint8)).save(photo)
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    np.save(map_file, np.broadcast_to(ramp, (side * 3 // 4, side)))
    return photo, map_file


def brightness(number: int) -> int:
    return 40 + number * 9 % 170


def check(answer: tuple[object, ...], number: int) -> None:
    """Raises ValueError unless the visitor got a picture, and it is of its own photograph."""
    shown = answer[0]
    file = shown["value"] if isinstance(shown, dict) and "value" in shown else shown
    if file is None:
        raise ValueError(f"no picture: {answer}")
    mean = float(np.asarray(Image.open(str(file)).convert("L")).mean())
    if abs(mean - brightness(number)) > 4:
        raise ValueError(f"a picture of brightness {mean:.0f}, not {brightness(number)}")


def memory_mb(pid: int) -> float:
    """Resident memory of a process, by Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
