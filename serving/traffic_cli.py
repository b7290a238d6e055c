"""`python -m serving traffic`: what the challenger gets to see, changed while the server runs."""

import argparse
import sys

import msgspec

from forecasting.settings import Settings
from serving.traffic import read_traffic, write_traffic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shares; without any, they are shown."""
    parser.add_argument(
        "--shadow", type=float, help="share of requests that the challenger computes as well"
    )
    parser.add_argument("--canary", type=float, help="share of clients that the challenger answers")
    parser.add_argument(
        "--reset", action="store_true", help="back to PERENNIAL_SHADOW_SHARE and _CANARY_SHARE"
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Change the shares if asked to, and show them.

    Raises:
        ConfigError: a share is not between 0 and 1, or the file cannot be read.
    """
    if arguments.reset:
        settings.traffic_file.unlink(missing_ok=True)
    given = {"shadow_share": arguments.shadow, "canary_share": arguments.canary}
    changes = {name: share for name, share in given.items() if share is not None}
    if changes:
        before = read_traffic(settings)
        write_traffic(settings.traffic_file, msgspec.structs.replace(before, **changes))
    shares = read_traffic(settings)
    sys.stdout.write(f"shadow {shares.shadow_share:g}, canary {shares.canary_share:g}\n")
    return 0
