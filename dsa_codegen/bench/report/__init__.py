"""The report: one HTML page with pictures, and the README's tables, from what was measured."""

from . import method
from .page import write
from .readme import update

__all__ = ["method", "update", "write"]
