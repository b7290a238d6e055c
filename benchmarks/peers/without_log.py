"""`python -m benchmarks.peers.without_log`: our server, but it neither makes nor writes a log.

The workers are spawned, and import this module (as `__mp_main__`) before the application: what is
replaced at its import is replaced in each of them.
"""

import sys

from forecasting.predictions import Answered, Spool
from forecasting.settings import load_settings
from serving import batcher, web, worker


class NoSpool(Spool):
    """Takes everything and keeps nothing."""

    def write(self, line: bytes, forecasts: int) -> None:
        """Forget a line."""

    def count(self, answered: Answered) -> None:
        """Forget an answer."""


def _no_line(*_: object) -> bytes:
    return b""


for _room, _name, _other in ((worker, "Spool", NoSpool), (batcher, "computed_line", _no_line)):
    if not hasattr(_room, _name):
        raise RuntimeError(f"{_room.__name__} has no {_name} any more; adapt {__file__}.")
    setattr(_room, _name, _other)

if __name__ == "__main__":
    sys.exit(web.main(load_settings()))
