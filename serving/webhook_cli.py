"""`python -m serving webhook`: have the registry tell this server of every alias that moves."""

import argparse
import sys

from forecasting.registry import register_webhook
from forecasting.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the registry finds the server."""
    parser.add_argument(
        "--url",
        help="the server as the registry's machine reaches it; PERENNIAL_SERVER_URL if left out",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Create the webhook, or bring it up to date.

    Raises:
        ConfigError: no secret is set, or the registry is a database.
        RegistryError: the registry is away, or does not take the address.
    """
    server = (arguments.url or settings.server_url).rstrip("/")
    sys.stdout.write(f"{register_webhook(settings, f'{server}/hooks/registry')}\n")
    return 0
