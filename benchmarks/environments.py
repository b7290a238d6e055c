"""Environments of peers that cannot share ours: pinned in `peers/*.txt`, made in `.venv-peers`."""

import shutil
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent / "peers"
ENVIRONMENTS = PEERS.parent.parent / ".venv-peers"


class PeerError(Exception):
    """A peer cannot be installed or started, or does not answer as it must."""


def python_of(peer: str) -> Path:
    """Python of a peer's own environment, made on first use and again when its pins change.

    Raises:
        PeerError: pip could not install it.
    """
    wanted, folder = PEERS / f"{peer}.txt", ENVIRONMENTS / peer
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if is_installed(peer):
        return python
    print(f"installing {peer} into {folder} ...", file=sys.stderr, flush=True)
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(wanted)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(f"{' '.join(command)} failed: {done.stderr[-800:]}")
    shutil.copyfile(wanted, installed)
    return python


def is_installed(peer: str) -> bool:
    """Whether a peer's environment stands, with the pins of now."""
    installed = ENVIRONMENTS / peer / "installed.txt"
    return installed.is_file() and installed.read_bytes() == (PEERS / f"{peer}.txt").read_bytes()
