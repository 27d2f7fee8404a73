"""Plans of streams: properties that hold for every model and budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omnimem import LimitError
from omnimem.plan import PAGE, Plan, Rates, Tensor, UnitPlan, make_plan, uses_of

Units = list[tuple[str, list[Tensor]]]
KIB = 1 << 10


def lay_out(sizes: Iterable[tuple[str, list[int]]], gap: int = 0, shards: int = 1) -> Units:
    """Units whose tensors lie behind one another, in files of about the same size."""
    listed = list(sizes)
    at, units = 8 + 3 * gap, []
    for number, (name, tensors) in enumerate(listed):
        file = f"shard-{number * shards // len(listed)}"
        mine = []
        for index, nbytes in enumerate(tensors):
            mine.append(Tensor(f"{name}.{index}", file, at, nbytes))
            at += nbytes + gap * (index % 2)
        units.append((name, mine))
    return units


@st.composite
def models(draw: st.DrawFn) -> Units:
    """A few layers, perhaps a vision tower, an embedding and a head of any size, norms."""
    size = st.integers(1, 300 * KIB)
    shape = draw(st.lists(size, min_size=1, max_size=6))
    count = draw(st.integers(1, 12))
    sizes: list[tuple[str, list[int]]] = []
    if draw(st.booleans()):
        small = draw(st.lists(st.integers(1, 40 * KIB), min_size=1, max_size=3))
        sizes += [("visual.patch_embed", [draw(size)])]
        sizes += [(f"visual.blocks.{number}", small) for number in range(draw(st.integers(1, 5)))]
        sizes += [("visual.merger", [draw(size), draw(size)])]
    sizes += [("model.embed_tokens", [draw(st.integers(1, 2000 * KIB))])]
    same = draw(st.booleans())
    for number in range(count):
        sizes += [(f"model.layers.{number}", shape if same or number % 2 else [*shape, 4 * KIB])]
    sizes += [("model.norm", [draw(st.integers(1, 4 * KIB))])]
    if draw(st.booleans()):
        sizes += [("lm_head", [draw(st.integers(1, 2000 * KIB))])]
    return lay_out(sizes, draw(st.sampled_from([0, 0, 8, 5000])), draw(st.integers(1, 4)))


def weights(units: Units) -> int:
    return sum(tensor.nbytes for _, tensors in units for tensor in tensors)


def least(units: Units) -> int:
    """The least budget, as the error tells it; 0 for a model that fits anywhere."""
    try:
        make_plan(units, 0)
    except LimitError as error:
        return error.need
    return 0


def cost(plan: Plan) -> float:
    """Bytes read by a request of the length that the plan expects."""
    return sum(unit.streamed_bytes * unit.uses for unit in plan.units)


def check(units: Units, plan: Plan, budget: int) -> None:
    assert plan.budget_bytes == budget
    assert [unit.name for unit in plan.units] == [name for name, _ in units]
    for unit, (_, tensors) in zip(plan.units, units, strict=True):
        placed = [tensor for run in unit.runs for tensor in run.tensors]
        assert len(placed) == len(tensors)
        assert set(placed) == set(tensors)
        for run in unit.runs:
            assert len({tensor.file for tensor in run.tensors}) == 1
            for before, after in zip(run.tensors, run.tensors[1:], strict=False):
                assert before.offset + before.nbytes == after.offset
            assert run.nbytes == sum(tensor.nbytes for tensor in run.tensors)
            assert run.host_bytes % PAGE == 0
            assert run.nbytes <= run.host_bytes < run.nbytes + 2 * PAGE
        assert unit.resident_bytes + unit.streamed_bytes == unit.host_bytes
    partly = [unit for unit in plan.units if unit.resident_bytes and unit.streamed_bytes]
    assert len(partly) <= 1
    assert plan.weight_bytes == weights(units)
    assert plan.resident_bytes == sum(unit.resident_bytes for unit in plan.units)
    assert plan.ring_bytes == 2 * max(unit.streamed_bytes for unit in plan.units)
    assert plan.prefill_bytes == sum(unit.streamed_bytes for unit in plan.units)
    assert plan.stream_bytes == sum(unit.streamed_bytes for unit in plan.units if unit.uses > 1)
    assert plan.streams == (plan.prefill_bytes > 0)


@settings(deadline=None)
@given(models(), st.data())
def test_properties(units: Units, data: st.DataObject) -> None:
    total, need = weights(units), least(units)
    budget = data.draw(st.integers(min(need, total), total + 4 * PAGE))
    plan = make_plan(units, budget)
    check(units, plan, budget)
    if budget >= total:
        assert not plan.streams
        assert plan.resident_bytes < total + 2 * PAGE * sum(len(unit.runs) for unit in plan.units)
    else:
        assert plan.resident_bytes + plan.ring_bytes <= budget


@settings(deadline=None)
@given(models())
def test_the_floor_is_exact(units: Units) -> None:
    total, need = weights(units), least(units)
    assert need > 0
    assert need % PAGE == 0
    if need >= total:
        assert not make_plan(units, total).streams
        with pytest.raises(LimitError):
            make_plan(units, total - 1)
        return
    plan = make_plan(units, need)
    check(units, plan, need)
    assert plan.resident_bytes + plan.ring_bytes <= need
    with pytest.raises(LimitError, match=f"least, {need} bytes") as caught:
        make_plan(units, need - 1)
    assert (caught.value.need, caught.value.limit) == (need, need - 1)
    assert caught.value.which == "budget"


@settings(deadline=None)
@given(models(), st.data())
def test_more_budget_never_streams_more(units: Units, data: st.DataObject) -> None:
    total, need = weights(units), least(units)
    assume(need < total)
    few = data.draw(st.integers(need, total))
    many = data.draw(st.integers(few, total))
    assert cost(make_plan(units, many)) <= cost(make_plan(units, few))


@settings(deadline=None)
@given(models(), st.data())
def test_a_giant_always_stays(units: Units, data: st.DataObject) -> None:
    """More than twice the median layer: the ring would have to hold it twice."""
    total, need = weights(units), least(units)
    assume(need < total)
    plan = make_plan(units, data.draw(st.integers(need, total)))
    layers = sorted(unit.host_bytes for unit in plan.units if "layers." in unit.name)
    tower = sum(unit.host_bytes for unit in plan.units if "blocks." in unit.name)
    assume(sum(layers) > tower + 50 * PAGE)
    top = layers[-1]  # at least the median; run splits change a unit's size by pages
    for unit in plan.units:
        if unit.host_bytes > 2 * top + 40 * PAGE:
            assert unit.streamed_bytes == 0, unit.name


def stack(count: int, pages: int = 100, *, tower: int = 0) -> Units:
    """Equal layers of whole pages, each of ten equal tensors."""
    page = pages * PAGE // 10
    sizes = [(f"visual.blocks.{n}", [page] * 10) for n in range(tower)]
    sizes += [(f"model.layers.{n}", [page] * 10) for n in range(count)]
    units = lay_out(sizes)
    return [
        (name, [Tensor(t.name, t.file, t.offset - 8, t.nbytes) for t in tensors])
        for name, tensors in units
    ]


@pytest.mark.parametrize("count", [4, 7, 28, 36])
@pytest.mark.parametrize("share", [25, 50, 75, 90])
def test_evenly_spread(count: int, share: int) -> None:
    units = stack(count)
    layer = 100 * PAGE
    budget = max(count * layer * share // 100, least(units))
    plan = make_plan(units, budget)
    streamed = [at for at, unit in enumerate(plan.units) if unit.streamed_bytes]
    gaps = [
        (after - before) % count or count
        for before, after in zip(streamed, [*streamed[1:], streamed[0]], strict=True)
    ]
    assert sum(gaps) == count
    assert max(gaps) - min(gaps) <= 1
    # Not one layer more than need be, and not one tensor's bytes of the budget unused.
    fewest = -(-(count * layer - (budget - 2 * layer)) // layer)
    assert len(streamed) <= fewest
    assert plan.stream_bytes <= count * layer - (budget - plan.ring_bytes) + layer // 10


@pytest.mark.parametrize("giant", [3, 12, 40])
@pytest.mark.parametrize("share", range(5, 100, 10))
def test_giants_bunch_nothing(giant: int, share: int) -> None:
    """An embedding and a head of many layers' size: any stretch of layers streams its part."""
    count, layer = 32, 100 * PAGE
    sizes = [("model.embed_tokens", [giant * layer])]
    sizes += [(f"model.layers.{n}", [layer // 10] * 10) for n in range(count)]
    sizes += [("lm_head", [giant * layer])]
    units = lay_out(sizes)
    budget = max((2 * giant + 2) * layer + count * layer * share // 100, least(units))
    plan = make_plan(units, min(budget, weights(units) - 1))
    streamed = [unit.streamed_bytes > 0 for unit in plan.units[1:-1]]
    part = sum(streamed) / count
    for first in range(count):
        for end in range(first + 1, count + 1):
            assert abs(sum(streamed[first:end]) - part * (end - first)) <= 2


def test_the_budget_fills_to_a_tensor() -> None:
    units = stack(10)
    layer = 100 * PAGE
    for extra in range(0, 10 * layer, layer // 7):
        budget = least(units) + extra
        if budget >= weights(units):
            break
        plan = make_plan(units, budget)
        assert budget - plan.resident_bytes - plan.ring_bytes < layer // 10 + PAGE or not any(
            unit.streamed_bytes == layer for unit in plan.units
        )


def test_layers_before_the_vision_tower() -> None:
    """A tower runs once a request, a layer for every token."""
    units = stack(8, tower=8)
    layer = 100 * PAGE
    plan = make_plan(units, 10 * layer)
    by_kind = {
        kind: sum(unit.streamed_bytes for unit in plan.units if kind in unit.name)
        for kind in ("visual", "layers")
    }
    assert by_kind == {"visual": 8 * layer, "layers": 0}
    assert plan.stream_bytes == 0
    assert plan.prefill_bytes == 8 * layer


def test_a_tied_head_stays() -> None:
    """The shape of a 2B: an embedding of six layers' size."""
    sizes = [("model.embed_tokens", [600 * PAGE])]
    sizes += [(f"model.layers.{n}", [100 * PAGE]) for n in range(28)]
    sizes += [("model.norm", [4096])]
    units = lay_out(sizes)
    for share in (35, 50, 75, 99):
        plan = make_plan(units, weights(units) * share // 100)
        kept = {unit.name: unit.streamed_bytes == 0 for unit in plan.units}
        assert kept["model.embed_tokens"]
        assert kept["model.norm"]
    with pytest.raises(LimitError, match="units that always stay"):
        make_plan(units, 700 * PAGE)


def test_one_unit_and_none() -> None:
    only = [("model", [Tensor("model.weight", "f", 0, 10 * PAGE)])]
    assert make_plan(only, 10 * PAGE).streams is False
    with pytest.raises(LimitError):
        make_plan(only, 10 * PAGE - 1)
    empty = make_plan([], 0)
    assert (empty.weight_bytes, empty.ring_bytes, empty.units) == (0, 0, ())


def test_empty_tensors() -> None:
    units = [("model.layers.0", [Tensor("a", "f", 0, 0), Tensor("b", "f", 0, 3 * PAGE)])]
    plan = make_plan(units, 3 * PAGE)
    assert {t.name for run in plan.units[0].runs for t in run.tensors} == {"a", "b"}


@pytest.mark.parametrize(
    ("unit", "once"),
    [
        ("model.visual.blocks.3", True),
        ("visual.patch_embed", True),
        ("vision_tower.layers.0", True),
        ("model.image_newline", True),
        ("model.layers.3", False),
        ("lm_head", False),
        ("model.supervision.layers.1", False),
    ],
)
def test_uses(unit: str, once: bool) -> None:
    assert (uses_of(unit) == 1) == once


def test_a_plan_shows_no_lists() -> None:
    plan = make_plan(stack(4), 400 * PAGE)
    assert "units" not in repr(plan)
    assert isinstance(plan.units[0], UnitPlan)


def test_tied_head_stays_first() -> None:
    """What is used twice for every token is worth twice its bytes."""
    name = "model.embed_tokens"
    units = [(name, [Tensor("e", "other", 0, 60 * PAGE)]), *stack(6)]

    def embedding(budget: int, times: int) -> tuple[Plan, UnitPlan]:
        plan = make_plan(units, budget, {name: times})
        return plan, next(unit for unit in plan.units if unit.name == name)

    assert embedding(390 * PAGE, 1)[1].streamed_bytes == 60 * PAGE
    assert embedding(390 * PAGE, 2)[1].streamed_bytes == 0
    plan, unit = embedding(250 * PAGE, 2)  # the ring and 50 pages: too few for it
    others = sum(u.streamed_bytes for u in plan.units if u is not unit)
    assert unit.streamed_bytes == 60 * PAGE
    assert others == 550 * PAGE  # what it leaves free is not left empty
    assert plan.stream_bytes == plan.prefill_bytes == others + 2 * unit.streamed_bytes


# -- what is kept encoded


RATES = Rates(read=2e9, compute=16e9, decode={"fast": 20e9, "balanced": 8e9},
              share={"fast": 0.7, "balanced": 0.66})  # fmt: skip


def encoded(units: Units, share: float = 0.66) -> Units:
    """The same units as a packed checkpoint has them."""
    made, at = [], 100
    for name, tensors in units:
        mine = []
        for tensor in tensors:
            length = int(tensor.nbytes * share)
            mine.append(Tensor(tensor.name, "packed", at, tensor.nbytes, length))
            at += length
        made.append((name, mine))
    return made


def layers(count: int = 28, nbytes: int = 8 << 20) -> Units:
    half = nbytes // 2
    sizes = [("model.embed_tokens", [6 * nbytes])]
    sizes += [(f"model.layers.{number}", [half, nbytes - half]) for number in range(count)]
    return lay_out(sizes)


def seconds(plan: Plan) -> float:
    assert plan.seconds_per_pass is not None
    return plan.seconds_per_pass


@settings(deadline=None, max_examples=40)
@given(models(), st.sampled_from(["auto", "fast", "balanced"]), st.booleans(), st.data())
def test_plans_with_compression(
    units: Units, compression: str, packed: bool, data: st.DataObject
) -> None:
    total = weights(units)
    units = encoded(units) if packed else units
    rates = replace(RATES, encoded_as="balanced" if packed else None)
    budget = data.draw(st.integers(total // 4, total))
    try:
        plain = make_plan(units, budget, rates=rates)
    except LimitError:
        assume(False)
    plan = make_plan(units, budget, compression=compression, rates=rates)
    for unit, (_, tensors) in zip(plan.units, units, strict=True):
        placed = [tensor for run in unit.runs for tensor in run.tensors]
        assert sorted(t.name for t in placed) == sorted(t.name for t in tensors)
        for run in unit.runs:
            assert run.starts[0] == 0
            assert run.starts[-1] + run.tensors[-1].nbytes == run.nbytes
            assert run.keep in (None, "plain", plan.compression)
            assert run.resident == (run.keep == "plain")
    assert plan.weight_bytes == total
    assert plan.packed_bytes == sum(unit.packed_bytes for unit in plan.units)
    assert (plan.compression is None) == (plan.packed_bytes == 0)
    if budget < total:
        assert plan.memory_bytes <= budget
    if compression == "auto":  # never slower than without, by the rates it was given
        every = sum(unit.streamed_bytes * unit.uses for unit in plan.units)
        assert seconds(plan) <= seconds(plain) * 1.001 or every < cost(plain)
    else:
        assert cost(plan) <= cost(plain)


@pytest.mark.parametrize("coding", ["fast", "balanced"])
def test_what_is_forced_reads_nothing_where_it_fits(coding: str) -> None:
    units = layers()
    fits = 6 * (8 << 20) + 28 * 0.72 * (8 << 20) + 2 * (8 << 20) + (1 << 20)
    plan = make_plan(units, int(fits), compression=coding, rates=RATES)
    assert (plan.stream_bytes, plan.compression) == (0, coding)
    assert plan.decode_bytes > 0
    assert coding in plan.reason


def test_auto_streams_on_a_fast_disk_and_encodes_on_a_slow_one() -> None:
    units = layers()
    budget = weights(units) * 85 // 100
    fast = make_plan(units, budget, compression="auto", rates=replace(RATES, read=50e9))
    assert fast.compression is None
    assert "would hardly be faster" in fast.reason
    slow = make_plan(units, budget, compression="auto", rates=replace(RATES, read=0.2e9))
    assert slow.compression == "fast"
    assert slow.stream_bytes == 0
    between = make_plan(units, budget, compression="auto", rates=replace(RATES, read=2e9))
    assert between.compression == "fast"
    assert 0 < between.stream_bytes < fast.stream_bytes
    assert seconds(between) < min(
        seconds(make_plan(units, budget, rates=RATES)),
        seconds(make_plan(units, budget, compression="fast", rates=RATES)),
    )
    for text in ("disk 2.00 GB/s", "fast 20.0 GB/s to 70 %", "of what it takes"):
        assert text in between.reason


def test_slow_decoding_is_not_chosen() -> None:
    units = layers()
    rates = replace(RATES, decode={"fast": 0.3e9, "balanced": 0.2e9})
    plan = make_plan(units, weights(units) * 2 // 3, compression="auto", rates=rates)
    assert plan.compression is None


def test_a_packed_checkpoint_reads_its_forms() -> None:
    units = encoded(layers())
    rates = replace(RATES, encoded_as="balanced")
    plan = make_plan(units, weights(units) // 3, rates=rates)
    plain = make_plan(layers(), weights(units) // 3, rates=RATES)
    assert plan.stream_bytes < 0.75 * plain.stream_bytes
    assert plan.decode_bytes > 0
    # One unit as it is, and two forms: what is decoded now, and what is read meanwhile.
    passing = max(unit.passing_bytes for unit in plan.units)
    assert plan.ring_bytes == passing + 2 * max(unit.ahead_bytes for unit in plan.units)
