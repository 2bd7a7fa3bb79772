"""How 256 columns of queries × heads come in two products on Hopper, for a thread to have every head of its queries."""

from __future__ import annotations

COLUMNS = 256
"""Queries × heads that a group of four warps takes."""
REGISTERS = {1: 255, 2: 255, 3: 168}
"""The cap per thread that leaves room for so many groups of four warps in Hopper's register file of 65536."""


def parts_of(heads: int) -> dict[str, int]:
    """Names for the templates: half of the heads of all queries is a part, or all heads of half of the queries."""
    part_heads = min(heads, 32)
    part_queries = 4 * (32 // part_heads)  # four lanes share a row of the accumulator; each holds 32 columns: its queries
    query_parts = COLUMNS // heads // part_queries
    return {
        "block_q": part_queries * query_parts,
        "part_heads": part_heads,
        "part_queries": part_queries,
        "query_parts": query_parts,
        "next_query": part_queries if query_parts == 2 else 0,
        "next_head": 0 if query_parts == 2 else part_heads,
    }
