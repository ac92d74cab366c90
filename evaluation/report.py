"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["hardware", "hardware_sentence", "printed", "table", "write_json"]

Column = tuple[str, str, str]
"""(heading, group of images, figure)"""


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What the seconds were measured on: processor, cores, threads, device, library versions."""
    import torch

    description = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
        "dtype": "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


def hardware_sentence(machine: dict[str, Any]) -> str:
    """What :func:`hardware` found, for under a table."""
    return (
        f"{machine.get('gpu', machine['processor'])}, {machine['torch_threads']} thread(s), "
        f"{machine['dtype']}, torch {machine['torch']}."
    )


def _processor_name() -> str:
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.is_file():
        for line in cpu_information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(results: dict[str, dict[str, Any]], columns: Sequence[Column]) -> str:
    """One line for each method: the given columns, the interval and the seconds per image."""
    width = max([len("method"), *map(len, results)])
    lines = [
        "  ".join(
            ["method".ljust(width), *(f"{c[0]:>8s}" for c in columns), "95 % of nohl", "   s/image"]
        )
    ]
    for name, result in results.items():
        cells = []
        for _, group, figure in columns:
            value = result.get(group, {}).get(figure)
            digits = 4 if figure.startswith("ssim") else 2
            cells.append(f"{'-':>8s}" if value is None else f"{value:8.{digits}f}")
        interval = result["psnr_nohl_interval"]
        cells.append(
            f"{'-':>12s}" if interval is None else f"{interval[0]:5.2f}..{interval[1]:5.2f}"
        )
        seconds = result["seconds_per_image"]
        cells.append(f"{'-':>10s}" if seconds is None else f"{seconds:10.3f}")
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def printed(results: dict[str, Any]) -> str:
    """Results of any kind for a person at a terminal: tables, protocol, hardware, command."""
    from evaluation.reports.tables import descriptions, tables_of

    parts = [results["title"]]
    for one in tables_of(results):
        cells = [[f"**{c.text}**" if c.best else c.text for c in row] for row in one.rows]
        parts += [one.caption, _in_columns([one.headings, *cells])]
    parts.append("\n".join(f"{name}: {text}." for name, text in descriptions(results)))
    parts.append(results["protocol"])
    parts.append(hardware_sentence(results["hardware"]))
    parts.append(results["command"])
    return "\n\n".join(parts)


def _in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table whose columns have one width each; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_json(file: str | Path, report: dict[str, Any]) -> None:
    """Writes the report, replacing an older one; the folder has to exist."""
    Path(file).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
