"""A model and blocks on one store: one limit for both, and the same bits as plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .swappers import MIB, Opener, content, fill, group_of, read, swap_all
from .torch_models import assert_right, budget, folder, omnimem, weight_bytes

PRESET = "tiny-qwen3"


def test_a_model_beside_blocks(open_swapper: Opener) -> None:
    nbytes = budget(PRESET, 50)
    limit = nbytes + 4 * MIB
    swapper = open_swapper(host_limit=limit)
    names = fill(swapper, 12)
    model = swapper.load_model(folder(PRESET), nbytes)
    assert_right(model, PRESET)
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    assert_right(model, PRESET)
    stats = swapper.store.stats()
    assert stats.host.peak_bytes <= limit
    assert stats.host.mapped_bytes <= limit
    assert group_of(swapper).swapped >= 8
    swap_all(swapper)
    assert group_of(swapper).host_bytes == 0
    assert_right(model, PRESET)
    assert swapper.get_status()["total_registered_blocks"] == len(swapper.blocks) == 12
    assert list(swapper.blocks) == names
    model.omnimem.close()
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_swapping_leaves_the_model_alone(open_swapper: Opener) -> None:
    swapper = open_swapper(host_limit=weight_bytes(PRESET) * 2 + 16 * MIB)
    fill(swapper, 4)
    model = swapper.load_model(folder(PRESET), budget(PRESET, 100))
    assert swap_all(swapper) == 4
    assert_right(model, PRESET)
    assert swapper.stats.total_swapped_out == 4
    model.omnimem.detach()
    swapper.cleanup()
    assert_right(model, PRESET)


def test_on_a_store_that_is_given(open_store: Callable[..., Any]) -> None:
    nbytes = budget(PRESET, 50)
    store = open_store(host_limit=nbytes + 4 * MIB)
    model = omnimem.torch.load(folder(PRESET), nbytes, store=store)
    with omnimem.AdvancedMemorySwapper(store=store) as swapper:
        names = fill(swapper, 6)
        assert_right(model, PRESET)
        assert swap_all(swapper) >= 1
        assert [read(swapper, name) for name in names] == [content(name) for name in names]
    assert_right(model, PRESET)
    model.omnimem.close()


def test_a_budget_that_does_not_fit(open_swapper: Opener) -> None:
    swapper = open_swapper(host_limit="1MiB")
    with pytest.raises(omnimem.LimitError):
        swapper.load_model(folder(PRESET), "64MiB")
    fill(swapper, 1, 1000)
    assert read(swapper, "b0") == content("b0", 1000)
