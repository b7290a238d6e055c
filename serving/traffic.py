"""Which share of the traffic a challenger sees: settings that change while the server runs."""

import hashlib
import logging
from pathlib import Path

import msgspec

from forecasting.errors import ConfigError
from forecasting.settings import Settings
from serving.model_store import write_atomically
from serving.schemas import Traffic

log = logging.getLogger(__name__)


def write_traffic(path: Path, traffic: Traffic) -> None:
    """Change the shares of every worker that reads this file, within a poll.

    Raises:
        ConfigError: a share is not between 0 and 1.
    """
    for name, share in msgspec.structs.asdict(traffic).items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} should lie between 0 and 1; got {share}.")
    write_atomically(path, msgspec.json.encode(traffic))


def read_traffic(settings: Settings) -> Traffic:
    """The shares that hold now: those of the file, else of the settings.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return msgspec.json.decode(settings.traffic_file.read_bytes(), type=Traffic)
    except FileNotFoundError:
        return Traffic(settings.shadow_share, settings.canary_share)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f'{settings.traffic_file} should hold {{"shadow_share": 0.1, "canary_share": 0.0}}: '
            f"{error}. Write it with `python -m serving traffic`, or remove it."
        ) from error


class TrafficSwitch:
    """The shares as one worker knows them.

    Attributes:
        traffic: what holds now; the last good one while the file is damaged.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mark: tuple[int, int] | None = None
        self.traffic = Traffic(settings.shadow_share, settings.canary_share)
        self.refresh()

    def refresh(self) -> None:
        """Look at the file again, if it changed."""
        mark = _mark(self._settings.traffic_file)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            found = read_traffic(self._settings)
        except ConfigError as error:
            log.error("%s The shares stay as they are.", error)
            return
        if found != self.traffic:
            log.info("challenger: shadow %g, canary %g", found.shadow_share, found.canary_share)
            self.traffic = found

    def is_canary(self, client: str) -> bool:
        """Whether the challenger answers this client; the same client gets the same answer."""
        share = self.traffic.canary_share
        if not share:
            return False
        digest = hashlib.blake2b(client.encode(), digest_size=8).digest()
        return int.from_bytes(digest) < share * 2**64


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
