"""Collectives are read from compiled programs: how often, along which axes, how many bytes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.plan.hlo import array_bytes, count_runs, parse
from gptjax.plan.traffic import group_axes, permuted_axes, read_collectives, read_groups, sum_traffic

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
# A loop of six steps of two that gathers asynchronously and permutes in a windowed product, and an all-reduce after it.
PROGRAM = """HloModule jit_step, is_scheduled=true

%windowed_dot_general_body_ag.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %moved = bf16[8,16]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%next, %moved)
}

%windowed_cond (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next.1 = s32[] add(%i, %two)
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %s = (bf16[8,16], bf16[32,16]) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="g"}
  %done = bf16[32,16]{1,0} all-gather-done(%s)
  %inner = (s32[], bf16[8,16]{1,0}) while(%p), condition=%windowed_cond, body=%windowed_dot_general_body_ag.1
  %y = bf16[8,16]{1,0} get-tuple-element(%inner), index=1
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%next.1, %y)
}

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(11)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (arg: (s32[], bf16[8,16]), loss: f32[4]) -> f32[4] {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %loss = f32[4]{0} parameter(1)
  %loop = (s32[], bf16[8,16]{1,0}) while(%arg), condition=%cond, body=%body
  ROOT %total = f32[4]{0} all-reduce(%loss), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
}
"""


def test_loops_and_windowed_products_are_counted():
    gather, permute, reduce = sorted(read_collectives(PROGRAM, MESH), key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.count, gather.bytes) == ("all-gather", ("fsdp",), 6, 32 * 16 * 2 * 3 / 4)
    assert gather.where == "g"
    assert (permute.kind, permute.axes, permute.count) == ("all-gather (windowed)", ("fsdp",), 18)
    assert permute.bytes == 8 * 16 * 2
    assert (reduce.kind, reduce.axes, reduce.count, reduce.bytes) == ("all-reduce", ("data",), 1, 2 * 16 / 2)


@pytest.mark.parametrize(
    ("instruction", "sent"),
    [
        ("(f32[4], f32[16]) all-gather-start(%x)", 64 * 3 / 4),
        ("((f32[4], bf16[2,4]), (f32[16], bf16[8,4]{1,0})) all-gather-start(%x, %y)", (64 + 64) * 3 / 4),
        ("((f32[16], f32[8]), (f32[4], f32[2])) reduce-scatter-start(%x, %y)", (16 + 8) * 3),
        ("(f32[16]{0:T(8,128)}, f32[4]{0:T(8,128)}) reduce-scatter-start(%x)", 16 * 3),
        ("(f32[16], f32[8]) all-reduce-start(%x, %y)", 2 * (64 + 32) * 3 / 4),
        ("f32[16] all-reduce-start(%x)", 2 * 64 * 3 / 4),
        ("(f32[4], f32[8]) all-to-all(%x, %y)", (16 + 32) * 3 / 4),
    ],
)
def test_async_start_bytes_exclude_its_operands(instruction, sent):
    text = f"ENTRY %main (x: f32[4]) -> f32[] {{\n  %s = {instruction}, replica_groups=[2,4]<=[8]\n}}\n"
    [found] = read_collectives(text, MESH)
    assert found.bytes == sent


PIECES = """
%fused_computation.1 (x: f32[4]) -> (f32[16], u32[]) {
  %x = f32[4]{0} parameter(0)
  %a = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %s = (f32[16]{0}, u32[]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (x: f32[4]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  ROOT %a = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%fused_computation.3 (x: f32[4]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  %a = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = f32[16]{0} custom-call(%a), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  %sum = f32[16]{0} all-reduce(%x), channel_id=6, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={4}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %first = (f32[16]{0}, u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %beside = f32[16]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %second = f32[16]{0} fusion(%x), kind=kCustom, calls=%fused_computation.3
  %other = (f32[16]{0}, u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %one = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %two = f32[4]{0} all-reduce(%one), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[4]{0} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_pieces_of_one_async_collective_count_once():
    found = [(c.kind, c.count, c.bytes) for c in read_collectives(PIECES, MESH)]
    assert found == [
        ("all-gather", 2, 16 * 4 * 3 / 4),
        ("reduce-scatter", 1, 16 * 4 * 3 / 4),
        ("all-reduce", 1, 2 * 4 * 4 * 3 / 4),
        ("all-reduce", 1, 2 * 4 * 4 * 3 / 4),
    ]


def test_sends_between_slices_are_dcn_all_reduces():
    send = (
        "(f32[64,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_rendezvous="psum.1",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"ENTRY %main (x: f32[64,8]) -> f32[] {{\n  %s = {send}\n}}\n"
    [found] = read_collectives(text, {"data": 4, "fsdp": 4, "tensor": 1}, slices=4)
    assert (found.kind, found.axes, found.bytes) == ("all-reduce (DCN)", ("data",), 2 * 64 * 8 * 4 * 3 / 4)
    with pytest.raises(ValueError, match="a kind that is not known"):
        read_collectives(text.replace("ALL_REDUCE", "ALL_TO_ALL"), {"data": 4, "fsdp": 4, "tensor": 1}, slices=4)


def test_each_slice_has_its_own_part_of_the_mesh():
    text = PROGRAM.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups={}")
    found = {c.kind: c for c in read_collectives(text, MESH | {"data": 4}, slices=2)}
    assert (found["all-reduce"].axes, found["all-reduce"].bytes) == (("data", "fsdp"), 2 * 16 * 7 / 8)
    assert found["all-gather"].axes == ("fsdp",)


def test_known_trip_count_of_the_compiler_is_preferred():
    known = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}'
    )
    assert count_runs(parse(known))["body"] == 5


def test_a_loop_without_a_known_count_is_an_error():
    with pytest.raises(ValueError, match=r"the loop loop: cannot tell how often it runs"):
        read_collectives(PROGRAM.replace("s32[] constant(11)", "s32[] parameter(1)"), MESH)


def test_called_computation_counts_once_per_call():
    text = """
%leaf (a: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}

ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %once = f32[] call(%x), to_apply=%leaf
  ROOT %again = f32[] conditional(%x, %x), branch_computations={%leaf, %leaf}
}
"""
    assert count_runs(parse(text)) == {"leaf": 3, "main": 1}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups=[4,2]<=[8]", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups={{0,2},{1,3}}, x={}", [(0, 2), (1, 3)]),
        ("replica_groups={}", [tuple(range(8))]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
def test_replica_groups_are_parsed_from_every_syntax(text, groups):
    assert read_groups(text, 8, "all-reduce") == groups
    with pytest.raises(ValueError, match="form that is not known"):
        read_groups("replica_groups=whatever", 8, "all-reduce")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([(0, 4), (1, 5), (2, 6), (3, 7)], ("data",)),
        ([(0, 1, 2, 3), (7, 6, 5, 4)], ("fsdp",)),
        ([tuple(range(8))], ("data", "fsdp")),
        ([(0, 1), (2, 3), (4, 5), (6, 7)], ("fsdp",)),
        ([(0, 5), (1, 4)], ("data", "fsdp")),
    ],
)
def test_replica_groups_map_to_mesh_axes(groups, axes):
    assert group_axes(groups, MESH) == axes


def test_permutation_pairs_map_to_mesh_axes():
    assert permuted_axes([(0, 4), (4, 0)], MESH) == ("data",)
    assert permuted_axes([(0, 1), (1, 2)], MESH) == ("fsdp",)
    assert permuted_axes([(0, 5)], MESH) == ("data", "fsdp")


def test_shape_text_gives_the_bytes_of_each_array():
    assert array_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[])") == [24, 8, 1]


# Programs that a compiler wrote


@functools.cache
def compiled(scatter):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    w = jax.ShapeDtypeStruct((3, 64, 32), jnp.float32, sharding=place(None, "fsdp", None))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place(("data", "fsdp"), None))

    def loss(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, place(None, None))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w) @ w.T, place(("data", "fsdp"), None)), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    function = jax.grad(loss) if scatter else loss
    return jax.jit(function, out_shardings=w.sharding if scatter else None).lower(w, x).compile().as_text()


def test_compiled_layer_loop_gathers_once_per_layer():
    gather, reduce = read_collectives(compiled(False), {"data": 2, "fsdp": 4})
    assert (gather.kind, gather.axes, gather.count, gather.bytes) == ("all-gather", ("fsdp",), 3, 64 * 32 * 4 * 3 / 4)
    assert (reduce.kind, reduce.axes, reduce.count, reduce.bytes) == ("all-reduce", ("data", "fsdp"), 1, 2 * 4 * 7 / 8)


def test_a_real_gradient_sums_over_the_batch():
    traffic = sum_traffic(read_collectives(compiled(True), {"data": 2, "fsdp": 4}))
    sums = {axes for kind, axes in traffic if kind in ("all-reduce", "reduce-scatter")}
    assert set().union(*sums) == {"data", "fsdp"}
    assert traffic["all-gather", ("fsdp",)] == 3 * 64 * 32 * 4 * 3 / 4, (
        "what was gathered is kept for the backward pass"
    )
