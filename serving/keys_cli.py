"""`python -m serving key`: make, revoke and list API keys."""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from forecasting.errors import ConfigError
from forecasting.settings import Settings
from serving import keys

EXAMPLES = """\
python -m serving key new --name anna --expires 2027-01-01 --rate 50
python -m serving key --name anna           the same as `key new`; prints the key
python -m serving key revoke --name anna
python -m serving key list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `python -m serving key`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "action", nargs="?", choices=tuple(_ACTIONS), default="new", help="new, if left out"
    )
    parser.add_argument("--name", help="whom the key is for")
    parser.add_argument(
        "--expires",
        type=_time,
        metavar="TIME",
        help="new: when it stops being valid, 2027-01-01 or 2027-01-01T08:00+01:00 (else UTC)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="new: requests a second (else PERENNIAL_RATE_LIMIT)",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Do what the arguments say.

    Returns:
        Exit status 0. The last line of stdout of `new` is the key and nothing else.

    Raises:
        ConfigError: arguments that cannot be, or a file that cannot be used.
    """
    given = {name for name in ("name", "expires", "rate") if getattr(arguments, name) is not None}
    expected, allowed, action = _ACTIONS[arguments.action]
    if not expected <= given <= allowed:
        names = " ".join(f"--{name}" for name in sorted(given)) or "none"
        raise ConfigError(
            f"`key {arguments.action}` expects "
            + (" ".join(f"--{name}" for name in sorted(expected)) or "no arguments")
            + f"; got {names}. Examples:\n{EXAMPLES}"
        )
    action(settings.keys_file, arguments)
    return 0


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=time.tzinfo or UTC)


def _new(path: Path, arguments: argparse.Namespace) -> None:
    key = keys.new_key(path, arguments.name, arguments.expires, arguments.rate)
    sys.stderr.write(
        f"Key {arguments.name!r} was added to {path}, which keeps only its hash: this is the only "
        "time that it is shown. Send it as `Authorization: Bearer <key>` or `X-API-Key: <key>`. A "
        "server on this file takes it up by itself, and from its first key on answers no request "
        "without one.\n"
    )
    sys.stdout.write(f"{key}\n")


def _revoke(path: Path, arguments: argparse.Namespace) -> None:
    keys.revoke(path, arguments.name)
    sys.stderr.write(f"Key {arguments.name!r} was taken out of {path}.\n")


def _list(path: Path, _: argparse.Namespace) -> None:
    lines = [("NAME", "CREATED", "EXPIRES", "RATE")]
    for key in keys.list_keys(path):
        expires = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "never"
        lines.append(
            (
                key.name,
                f"{key.created:%Y-%m-%d %H:%M}",
                f"{expires} (expired)" if key.is_expired() else expires,
                "default" if key.rate_per_second is None else f"{key.rate_per_second:g}/s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


_Action = tuple[set[str], set[str], Callable[[Path, argparse.Namespace], None]]
_ACTIONS: dict[str, _Action] = {
    "new": ({"name"}, {"name", "expires", "rate"}, _new),
    "revoke": ({"name"}, {"name"}, _revoke),
    "list": (set(), set(), _list),
}
"""What each action needs, what it takes, what it does."""
