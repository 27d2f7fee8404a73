"""Hooks of the user beside ours: which of them see a streamed unit's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .torch_models import (
    PAGE,
    SMALL_HEAD,
    assert_idle,
    assert_right,
    bits,
    floor,
    folder,
    is_unset,
    layers,
    omnimem,
    plain,
    same_bits,
    torch,
)

LAYER = 2


def weight(module: Any) -> Any:
    return module.mlp.up_proj.weight


@pytest.mark.parametrize("prepend", [False, True])
def test_a_forward_hook_on_a_unit_sees_its_weights(prepend: bool) -> None:
    model = omnimem.torch.load(folder(SMALL_HEAD), floor(SMALL_HEAD))
    want = weight(layers(plain(SMALL_HEAD))[LAYER])
    seen: list[bool] = []

    def look(module: Any, *_: Any) -> None:
        seen.append(same_bits(weight(module), want))

    for _ in range(2):  # one more after our hook was put last
        layers(model)[LAYER].register_forward_hook(look, prepend=prepend)
        assert_right(model, SMALL_HEAD, 2)
        assert_idle(model)
    assert seen == [True] * 6
    model.omnimem.detach()
    assert_right(model, SMALL_HEAD, 2)
    assert seen == [True] * 10


def test_a_forward_hook_may_change_the_output() -> None:
    model = omnimem.torch.load(folder(SMALL_HEAD), floor(SMALL_HEAD))
    handle = layers(model)[LAYER].register_forward_hook(lambda *call: call[-1] * 0)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        zeros = model(input_ids=ids, use_cache=False).logits
    assert_idle(model)
    handle.remove()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, zeros)
    assert_right(model, SMALL_HEAD, 2)
    model.omnimem.close()


def test_pre_hooks() -> None:
    """Those put before ours come before the weights; all others see them."""
    early: list[bool] = []
    model = omnimem.torch.load(folder(SMALL_HEAD), floor(SMALL_HEAD))
    model.omnimem.detach()
    layer, late = layers(model)[LAYER], []
    layer.register_forward_pre_hook(lambda m, _: early.append(is_unset(weight(m))), prepend=True)
    omnimem.torch.attach(model, folder(SMALL_HEAD), floor(SMALL_HEAD))
    layer.register_forward_pre_hook(lambda m, _: late.append(is_unset(weight(m))))
    before: list[bool] = []
    layer.register_forward_pre_hook(lambda m, _: before.append(is_unset(weight(m))), prepend=True)
    inner: list[bool] = []
    layer.mlp.register_forward_pre_hook(
        lambda m, _: inner.append(is_unset(m.up_proj.weight)), prepend=True
    )
    assert_right(model, SMALL_HEAD, 2)
    assert early == late == inner == [False] * 2
    assert before == [True] * 2
    model.omnimem.close()


class Rooted(torch.nn.Module):
    """Parameters of the root itself, used before and after its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(PAGE))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(6))

    def forward(self, x: Any) -> Any:
        x = x * self.scale[:64]
        for layer in self.layers:
            x = layer(x)
        return x * self.scale[64:128]


def test_parameters_of_the_root_stream(tmp_path: Path) -> None:
    """The unit that is the model itself stays loaded through the pass that loads it."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model, x = Rooted(), torch.randn(2, 64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        want = model(x)
        with pytest.raises(omnimem.LimitError) as caught:
            omnimem.torch.attach(model, tmp_path, 1)
        omnimem.torch.attach(model, tmp_path, caught.value.need)
        plan = model.omnimem.plan()
        assert next(unit.name for unit in plan.units if unit.streamed_bytes) == ""
        for _ in range(3):
            assert torch.equal(bits(model(x)), bits(want))
            assert_idle(model)
    model.omnimem.close()
