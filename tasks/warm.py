"""What a worker of Ray imports as it starts, so that its first trial need not.

The one module whose import does something: without the garbage collector, which would look through
a million new objects again and again, torch and Lightning are there in two thirds of the time.
"""

import gc
from importlib import import_module

gc.disable()
for _name in ("forecasting.model", "tasks.trials"):
    import_module(_name)
gc.collect()
gc.freeze()
gc.enable()
