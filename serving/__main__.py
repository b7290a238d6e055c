"""`python -m serving web | sync | drain`: the three processes of the inference server.

And its tools: `key` makes API keys, `traffic` sets the challenger's shares while the server runs,
`webhook` asks the registry to tell this server of every alias that moves.
"""

import argparse
import importlib
import os
import sys

from forecasting.errors import PerennialError
from forecasting.settings import load_settings
from serving.logs import log_as_json

COMMANDS = {
    "web": ("serving.web", "answer forecasts over HTTP"),
    "sync": ("serving.sync", "follow the registry's aliases and the published prices"),
    "drain": ("serving.drain", "move the prediction log from the spool into SQL"),
}
TOOLS = {
    "key": ("serving.keys_cli", "make, list and revoke API keys"),
    "traffic": ("serving.traffic_cli", "show or change what the challenger gets to see"),
    "webhook": ("serving.webhook_cli", "have the registry tell this server of moved aliases"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one of the processes or tools; only its own module is imported.

    Returns:
        Exit status: 0, 1 after a failure, 2 if it could not start as it is configured.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in {**COMMANDS, **TOOLS}.items():
        command = commands.add_parser(name, help=text)
        if name in TOOLS and given[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(given)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it writes into the user's home
    try:
        status: int = _tool(parsed) if parsed.command in TOOLS else _process(parsed.command)
    except PerennialError as error:
        sys.stderr.write(f"serving {parsed.command}: {error}\n")
        return 2
    return status


def _tool(parsed: argparse.Namespace) -> int:
    status: int = importlib.import_module(TOOLS[parsed.command][0]).run(load_settings(), parsed)
    return status


def _process(command: str) -> int:
    log_as_json(command)
    status: int = importlib.import_module(COMMANDS[command][0]).main(load_settings())
    return status


if __name__ == "__main__":
    sys.exit(main())
