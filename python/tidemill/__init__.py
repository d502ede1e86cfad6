"""Tidemill inside other programs, through its worker. Needs the program `tidemill`: TIDEMILL_BIN, else on PATH."""

from tidemill.client import LineFailed, Worker, WorkerDied

__all__ = ["LineFailed", "Worker", "WorkerDied"]
