"""What tuning found: one record, the files of ``tuned/``, which of them serves a call, and why."""

from .agreement import broadcast

__all__ = ["broadcast"]
