"""What a worker of Ray imports as it starts, so that its first trial need not.

The one module whose import does something. The garbage collector would look through a million new
objects again and again: without it, and with them left out of what it looks through later, torch
and Lightning are there in two thirds of the time.
"""

import gc
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType


def _import_torchmetrics() -> None:
    """Lightning needs it; it needs of `scipy.signal` only to see that one name is there.

    All of that takes a fifth of a worker's start. Who imports it later gets the real one.
    """
    name = "scipy.signal"
    stand_in = ModuleType(name)
    stand_in.__dict__["hamming"] = None
    if sys.modules.setdefault(name, stand_in) is not stand_in:
        return
    with suppress(Exception):  # a version that needs more is imported with the real one
        import_module("torchmetrics")
    del sys.modules[name]


gc.disable()
try:
    _import_torchmetrics()
    for _name in ("forecasting.model", "tasks.trials"):
        import_module(_name)
    gc.freeze()
finally:
    gc.enable()
