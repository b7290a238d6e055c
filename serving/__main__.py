"""`python -m serving web | sync | drain`: the three processes of the inference server."""

import argparse
import importlib
import logging
import os
import sys

from forecasting.errors import PerennialError
from forecasting.settings import load_settings

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COMMANDS = {
    "web": ("serving.app", "answer forecasts over HTTP"),
    "sync": ("serving.sync", "follow the registry's alias and the published prices"),
    "drain": ("serving.drain", "move the prediction log from the spool into SQL"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one of the processes; only its own module is imported.

    Returns:
        Exit status: 0, 1 after a failure, 2 if it could not start as it is configured.
    """
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    command = parser.parse_args(arguments).command
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it writes into the user's home
    try:
        settings = load_settings()
        status: int = importlib.import_module(COMMANDS[command][0]).main(settings)
    except PerennialError as error:
        sys.stderr.write(f"serving {command}: {error}\n")
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
