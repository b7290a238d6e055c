"""What the figures of a benchmark are held against."""

from collections.abc import Mapping
from typing import TextIO

Bars = Mapping[str, tuple[str, float]]
"""By figure: `<=` or `>=`, and the bar."""


def is_met(value: float, sense: str, bar: float) -> bool:
    """Whether one figure keeps to its bar."""
    return value <= bar if sense == "<=" else value >= bar


def judge(figures: Mapping[str, float], bars: Bars, file: TextIO | None = None) -> bool:
    """Print every bar with its figure, to stdout if to no file; whether all are met."""
    met = {name: is_met(figures[name], *bar) for name, bar in bars.items()}
    for name, (sense, bar) in bars.items():
        told = "ok" if met[name] else "MISSED"
        print(f"{name:26} {figures[name]:.3f}, {sense} {bar:g} {told}", file=file)
    return all(met.values())
