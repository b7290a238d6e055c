"""Evidently's workspace under the home: `evidently ui --workspace .perennial/evidently` opens it.

A project a symbol, a snapshot a check. The ids follow from what they are of, so that a check which
is made again replaces its snapshot.
"""

from datetime import date
from pathlib import Path
from uuid import NAMESPACE_OID, UUID, uuid5

from evidently.core.report import Snapshot
from evidently.sdk.models import ProjectModel

# what `evidently.ui.workspace.Workspace` writes with; that one reads every snapshot when it is
# made, 6 s for 200 of them, and fails if one is damaged
from evidently.ui.storage.local.base import LocalState

MOST_SNAPSHOTS = 200
"""Kept of each symbol, a third of a megabyte each: four years of weekly checks."""


def add(folder: Path, symbol: str, day: date, version: int, snapshot: Snapshot) -> UUID:
    """Lay the snapshot of a check into the symbol's project; its id.

    Args:
        folder: of the workspace, made on first use.
        symbol: whose check; names the project.
        day: of the check.
        version: in production then.
        snapshot: as Evidently made it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = LocalState(str(folder))
    project = uuid5(NAMESPACE_OID, f"perennial {symbol}")
    try:
        state.read_project(project)
    except FileNotFoundError:
        told = "Features of the newest sessions against the training span of the version served."
        state.write_project(ProjectModel(id=project, name=symbol, description=told))
    identity = uuid5(project, f"{day} {version}")
    snapshot.set_name(f"{day} version {version}")
    state.write_snapshot(project, identity, snapshot.to_snapshot_model())
    _prune(folder / str(project) / "snapshots")
    return identity


def _prune(folder: Path) -> None:
    """Remove the snapshots that were written first, as far as there are too many."""
    written = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in written[:-MOST_SNAPSHOTS]:
        path.unlink(missing_ok=True)
