"""What the command's process inherits: streams, and variables that mean something to a package it imports."""

from __future__ import annotations

import os
import sys

__all__ = ["settle", "settle_streams"]

_LAUNCHERS = ("JSM_", "KUBERNETES_", "LSB_", "PL_", "SLURM_", "TORCHELASTIC_")
_RANKS = (
    "GROUP_RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "RANK",
    "WORLD_SIZE",
)


def settle_streams() -> None:
    """Let output hold any name: what the terminal's encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def settle(parallel: bool) -> None:
    """Drop the variables by which a notebook or a scheduler would change what Matplotlib and Lightning do.

    parallel: keep those by which processes find each other.
    """
    os.environ["MPLBACKEND"] = "agg"
    if not os.environ.get("COLUMNS", "0").strip("0"):
        # Rich would print nothing in no columns.
        os.environ.pop("COLUMNS", None)
    if not parallel:
        for name in list(os.environ):
            if name in _RANKS or name.startswith(_LAUNCHERS):
                del os.environ[name]
