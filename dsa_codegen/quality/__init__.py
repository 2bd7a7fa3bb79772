"""What a choice costs: recall, captured attention mass and the error of the output, so that a user can choose topk.

>>> from dsa_codegen import quality
>>> rows = quality.measure(quality.drawn(dsa.preset("tiny"), context=1024), [64, 128, 256])

``activations`` holds what is measured on (drawn at random, read from a file, caught in a model), ``rankings`` the order in
which each way of choosing takes tokens, ``measures`` what comes of it.
"""

from .activations import Activations, drawn, load, save
from .measures import Row, measure
from .rankings import CHOICES

__all__ = ["CHOICES", "Activations", "Row", "drawn", "load", "measure", "save"]
