"""The peers of one test: one that ends its process, and two that have to live with it."""

from bench_fakes import Crashing, Fake, Missing

PEERS = (Fake("fast"), Missing("missing"), Crashing("crashing"))
