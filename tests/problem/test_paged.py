"""Caches as arguments: which shapes state a page, and that a padded block is never read as a larger page."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.problem import caches
from dsa_codegen.problem.paged import check_cache

LAYOUTS = [caches.IndexKLayout(page=32, head_dim=64), caches.KvV32Layout(64), caches.KvV4Layout(64), caches.KvV4Layout(256)]
BY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{type(layout).__name__}{layout.page}")


def flat(layout: caches.Layout, padding: int = 0) -> torch.Tensor:
    """An empty cache [3, bytes of a page]; so many bytes lie behind every page."""
    return torch.zeros(3, layout.page_bytes + padding, dtype=torch.uint8)


@BY_LAYOUT
def test_both_shapes_state_the_page(layout):
    assert check_cache("cache", flat(layout), layout.bytes_per_token) == layout.page
    exact = flat(layout)[:, : layout.page * layout.bytes_per_token]
    assert check_cache("cache", exact, layout.bytes_per_token) == layout.page
    assert check_cache("cache", exact.unflatten(1, (layout.page, 1, -1)), layout.bytes_per_token) == layout.page


def test_a_cache_without_blocks_has_a_page_too():
    """That of a rank which holds none of a short sequence: torch gives what it picks from nothing strides of 0."""
    none = torch.zeros(3, 64, 1, 656, dtype=torch.uint8)[torch.zeros(0, dtype=torch.int64)]
    assert none.stride(1) == 0 and check_cache("cache", none, 656) == 64


@BY_LAYOUT
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_block_with_room_for_further_tokens_is_not_a_larger_page(layout, tokens):
    # For v4 also the very lengths that pages of 65, 66 and 67 tokens would have.
    for padding in (tokens * layout.bytes_per_token, tokens * 576, tokens * 16):
        with pytest.raises(InputError, match=r"^cache: got blocks of \d+ bytes.*unflatten"):
            check_cache("cache", flat(layout, padding), layout.bytes_per_token)


def test_the_remedy_of_the_error_works():
    """A padded cache passed as the message says holds and gives back what was stored."""
    page, padded = 48, torch.zeros(3, 48 * 584 + 2 * 584 + 16, dtype=torch.uint8)
    latent, slots = torch.randn(100, 512, dtype=torch.bfloat16), torch.arange(100, dtype=torch.int32)
    with pytest.raises(InputError, match=r"unflatten\(1, \(page, 1, 584\)\)"):
        dsa.gather_kv(padded, slots, layout="v4")
    cache = padded[:, : page * 584].unflatten(1, (page, 1, 584))
    dsa.store_kv(latent[:, :448], latent[:, 448:], slots, cache, layout="v4")
    assert torch.equal(dsa.gather_kv(cache, slots, layout="v4")[:, 448:], latent[:, 448:])
    assert not padded[:, page * 584 :].any()


def test_pages_too_close_together_are_refused():
    pages = torch.zeros(4, 64 * 656, dtype=torch.uint8)
    overlapping = pages.as_strided((3, 64 * 656), (32 * 656, 1))
    with pytest.raises(InputError, match="bytes between blocks"):
        check_cache("cache", overlapping, 656)


@pytest.mark.parametrize(("page", "head_dim", "apart"), [(1, 224, 240), (3, 48, 160), (4, 128, 528)])
def test_an_empty_cache_is_one_that_kernels_take(page, head_dim, apart):
    """Of pages whose bytes 16 does not divide, too: blocks lie apart."""
    layout = caches.IndexKLayout(page, head_dim)
    cache = layout.empty(5)
    assert cache.shape == (5, page, 1, head_dim + 4) and cache.stride(0) == apart
    assert check_cache("cache", cache, layout.bytes_per_token) == page
    keys = torch.randn(5 * page, head_dim).bfloat16()
    dsa.store_index_k(keys, torch.arange(5 * page), cache)
    values, scales = dsa.gather_index_k(cache, torch.arange(5 * page))
    assert torch.allclose(values.float() * scales[:, None], keys.float(), atol=0.2)
