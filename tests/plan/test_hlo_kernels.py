"""Bytes and FLOPs of kernels, against numbers by hand: written HLO, and programs that compilers wrote."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.plan.hlo import arrays
from gptjax.plan.hlo_kernels import buffers, read_kernels


def program(*lines, computations=""):
    """Returns the text of a module whose entry has these instructions."""
    return f"{computations}\nENTRY %main (x: f32[4]) -> f32[4] {{\n" + "".join(f"  {one}\n" for one in lines) + "}\n"


def only(text):
    [kernel] = read_kernels(text)
    return kernel


X, BF = "%x = f32[64,32]{1,0} parameter(0)", "%w = bf16[32,16]{1,0} parameter(1)"


@pytest.mark.parametrize(
    ("lines", "moved", "flops"),
    [
        (["%y = f32[64,32]{1,0} add(%x, %x)"], 2 * 64 * 32 * 4, 0),
        (["%y = f32[64,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"],
         64 * 32 * 4 + 32 * 16 * 2 + 64 * 16 * 4, 2 * 64 * 16 * 32),
        (["%y = f32[2,32]{1,0} slice(%x), slice={[0:2], [0:32]}"], 2 * 2 * 32 * 4, 0),
        (["%i = s32[5]{0} parameter(2)", "%y = f32[5,32]{1,0} gather(%x, %i), offset_dims={1}"],
         2 * 5 * 32 * 4 + 5 * 4, 0),
        (["%u = f32[1,32]{1,0} parameter(2)", "%i = s32[] parameter(3)",
          "%y = f32[64,32]{1,0} dynamic-update-slice(%x, %u, %i, %i)"], 2 * 32 * 4 + 4 + 4, 0),
        (["%u = bf16[3,32]{1,0} parameter(2)", "%i = s32[3]{0} parameter(3)",
          "%y = f32[64,32]{1,0} scatter(%x, %i, %u), to_apply=%sum"], 3 * 4 + 3 * 32 * 2 + 2 * 3 * 32 * 4, 0),
    ],
    ids=["add", "dot", "slice", "gather", "dynamic-update-slice", "scatter"],
)  # fmt: skip
def test_each_instruction_has_its_bytes_and_flops(lines, moved, flops):
    kernel = only(program(X, BF, *lines))
    assert (kernel.bytes, kernel.flops, kernel.count) == (moved, flops, 1)


def test_instructions_that_only_name_memory_are_not_kernels():
    text = program(
        X,
        "%c = f32[] constant(0)",
        "%b = f32[2048]{0} bitcast(%x)",
        "%t = (f32[2048]{0}, f32[]) tuple(%b, %c)",
        "%g = f32[2048]{0} get-tuple-element(%t), index=0",
        '%a = f32[2048]{0} custom-call(%g), custom_call_target="ConcatBitcast"',
    )
    assert read_kernels(text) == []


SLICED = """
%fused (p0: f32[12,64,32], p1: s32[], p2: f32[64,32]) -> f32[64,32] {
  %p0 = f32[12,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %half = bf16[12,64,32]{2,1,0} convert(%p0)
  %s = bf16[1,64,32]{2,1,0} dynamic-slice(%half, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %b = bf16[64,32]{1,0} bitcast(%s)
  %p2 = f32[64,32]{1,0} parameter(2)
  %wide = f32[64,32]{1,0} convert(%b)
  ROOT %y = f32[64,32]{1,0} add(%wide, %p2)
}
"""
UPDATED = """
%fused (p0: bf16[12,64,32], p1: s32[], p2: f32[64,32]) -> bf16[12,64,32] {
  %p0 = bf16[12,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64,32]{1,0} parameter(2)
  %half = bf16[64,32]{1,0} convert(%p2)
  %b = bf16[1,64,32]{2,1,0} bitcast(%half)
  %d = bf16[12,64,32]{2,1,0} dynamic-update-slice(%p0, %b, %p1, %p1, %p1)
  ROOT %y = bf16[12,64,32]{2,1,0} bitcast(%d)
}
"""
STACK = ["%x = f32[12,64,32]{2,1,0} parameter(0)", "%i = s32[] parameter(1)", "%u = f32[64,32]{1,0} parameter(2)"]


def test_fusion_counts_only_the_slice_of_a_sliced_operand():
    """Unless the whole operand is used as well."""
    call = "%y = f32[64,32]{1,0} fusion(%x, %i, %u), kind=kLoop, calls=%fused"
    assert only(program(*STACK, call, computations=SLICED)).bytes == 3 * 64 * 32 * 4 + 4
    whole = SLICED.replace("%wide = f32[64,32]{1,0} convert(%b)", "%wide = f32[64,32]{1,0} reduce(%p0, %zero)")
    assert only(program(*STACK, call, computations=whole)).bytes == (12 + 2) * 64 * 32 * 4 + 4


def test_fusion_with_an_in_place_update_counts_only_the_update():
    stack = [STACK[0].replace("f32", "bf16"), *STACK[1:]]
    call = "%y = bf16[12,64,32]{2,1,0} fusion(%x, %i, %u), kind=kLoop, calls=%fused"
    assert only(program(*stack, call, computations=UPDATED)).bytes == 64 * 32 * (4 + 2) + 4
    pair = "(bf16[12,64,32]{2,1,0}, s32[])"
    two = UPDATED.replace("ROOT %y", "%y").replace("bitcast(%d)\n", f"bitcast(%d)\n  ROOT %t = {pair} tuple(%y, %p1)\n")
    call = f"%y = {pair} fusion(%x, %i, %u), kind=kLoop, calls=%fused"
    assert only(program(*stack, call, computations=two)).bytes == 64 * 32 * (4 + 2) + 4 + 4


def test_nested_fusions_count_only_the_slice_that_is_read():
    outer = """
%outer (q0: f32[12,64,32], q1: s32[], q2: f32[64,32]) -> (f32[64,32], f32[]) {
  %q0 = f32[12,64,32]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[64,32]{1,0} parameter(2)
  %inner = f32[64,32]{1,0} fusion(%q0, %q1, %q2), kind=kLoop, calls=%fused
  %one = f32[] constant(1)
  ROOT %t = (f32[64,32]{1,0}, f32[]) tuple(%inner, %one)
}
"""
    call = "%y = (f32[64,32]{1,0}, f32[]) fusion(%x, %i, %u), kind=kLoop, calls=%outer"
    assert only(program(*STACK, call, computations=SLICED + outer)).bytes == 3 * 64 * 32 * 4 + 4 + 4


LOOP = """
%fused_dot (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %d = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %p = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = bf16[64,32]{1,0} get-tuple-element(%p), index=1
  %b = bf16[32,16]{1,0} get-tuple-element(%p), index=2
  %d = bf16[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot, metadata={op_name="h/mlp"}
  ROOT %t = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%i, %a, %b)
}

%cond (p: (s32[], bf16[64,32], bf16[32,16])) -> pred[] {
  %p = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  ROOT %c = pred[] constant(1)
}

%command_buffer (t: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %t = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_kernels_in_loops_and_calls_count_every_run():
    kernel = only(program("%x = (s32[]) parameter(0)", "%y = (s32[]) call(%x), to_apply=%command_buffer",
                          "%z = (s32[]) call(%y), to_apply=%command_buffer", computations=LOOP))  # fmt: skip
    assert (kernel.count, kernel.where) == (10, "h/mlp")
    assert kernel.flops == 2 * 64 * 16 * 32
    assert kernel.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    # Twice as many FLOPs a second as the product needs in the time that its bytes take
    assert kernel.seconds(bandwidth=1.0, peak_flops=2 * kernel.flops / kernel.bytes) == 10 * kernel.bytes
    assert kernel.seconds(bandwidth=1e9, peak_flops=1.0) == 10 * kernel.flops


def test_cublas_product_excludes_its_workspace_bytes():
    call = (
        '%y = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}'
    )
    kernel = only(program(X, BF, call))
    assert (kernel.kind, kernel.flops) == ("__cublas$lt$matmul", 2 * 64 * 16 * 32)
    assert kernel.bytes == 64 * 32 * 4 + 32 * 16 * 2 + 64 * 16 * 2


@pytest.mark.parametrize(
    ("name", "target", "shape", "products"),
    [
        ("fwd", "__cudnn$fmhaSoftmax", "bf16[2,128,3,64]{3,2,1,0}", 2),
        ("bwd", "__cudnn$fmhaSoftmaxBackward", "bf16[2,128,3,64]{3,2,1,0}", 5),
        ("splash_mha_fwd_segmented_residuals.2", "tpu_custom_call", "bf16[2,3,128,64]{3,2,1,0}", 2),
        ("splash_mha_dq_no_residuals", "tpu_custom_call", "bf16[2,3,128,64]{3,2,1,0}", 3),
        ("splash_mha_dkv_no_residuals.7", "tpu_custom_call", "bf16[2,3,128,64]{3,2,1,0}", 4),
    ],
)
def test_fused_attention_multiplies_half_of_all_pairs(name, target, shape, products):
    lines = [f"%{letter} = {shape} parameter({at})" for at, letter in enumerate("qkv")]
    call = f'%{name} = {shape} custom-call(%q, %k, %v), custom_call_target="{target}"'
    kernel = only(program(*lines, call))
    assert kernel.flops == products * 2 * (2 * 3 * 128 * 128 * 64) / 2
    assert kernel.bytes == 4 * 2 * 128 * 3 * 64 * 2


def test_backward_kernel_that_returns_three_gradients_has_five_products():
    shape = "bf16[2,3,128,64]{3,2,1,0}"
    lines = [f"%{letter} = {shape} parameter({at})" for at, letter in enumerate("qkv")]
    results = f"(f32[2,128,64]{{2,1,0}}, bf16[2,1,3,128,64]{{4,3,2,1,0}}, {shape}, {shape})"
    call = f'%splash_mha_dkv_no_residuals = {results} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"'
    assert only(program(*lines, call)).flops == 5 * 2 * (2 * 3 * 128 * 128 * 64) / 2


@pytest.mark.parametrize(
    ("lhs", "rhs", "result", "how", "flops"),
    [
        # a product [8 x 1024, 768] x [768, 3072], and one of three slices by a window that lies in the padding
        ("bf16[8,1024,768]", "bf16[1,768,3072]", "bf16[8,1024,3072]", "window={size=1}, dim_labels=0bf_0io->0bf",
         2 * 8 * 1024 * 768 * 3072),
        ("bf16[8,1024,1,768]", "bf16[1,768,3,768]", "bf16[8,1024,3,768]",
         "window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, dim_labels=0b1f_0i1o->0b1f", 2 * 8 * 1024 * 768 * 3 * 768),
        # a weight's gradient: the batch is the window
        ("bf16[8,1024,768]", "bf16[8,1024,3072]", "bf16[768,3072,1]", "window={size=8}, dim_labels=0fb_0io->bf0",
         2 * 8 * 1024 * 768 * 3072),
        # a real one: 5 inputs, 3 taps, one of padding at each end: 13 pairs; and every second, 7
        ("f32[2,5,7]", "f32[3,7,11]", "f32[2,5,11]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
         2 * 2 * 7 * 11 * 13),
        ("f32[2,5,7]", "f32[3,7,11]", "f32[2,3,11]", "window={size=3 pad=1_1 stride=2}, dim_labels=b0f_0io->b0f",
         2 * 2 * 7 * 11 * 7),
    ],
    ids=["product", "slices", "gradient", "window", "stride"],
)  # fmt: skip
def test_tpu_convolution_has_the_flops_of_its_product(lhs, rhs, result, how, flops):
    lines = [f"%a = {lhs} parameter(0)", f"%b = {rhs} parameter(1)"]
    assert only(program(*lines, f"%y = {result} convolution(%a, %b), {how}")).flops == flops


WIDENED = """
%fused (p: f32[1024,768]) -> bf16[1024,768] {
  %p = f32[1024,768]{1,0} parameter(0)
  ROOT %y = bf16[1024,768]{1,0} convert(%p)
}
"""


def test_tpu_on_chip_memory_counts_no_bytes():
    text = program(
        "%x = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[1024,768]{1,0:T(8,128)(2,1)}, bf16[1024,768]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%x)",
        "%d = bf16[1024,768]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)",
        "%p = ((f32[8,128]{1,0:T(8,128)S(1)}), f32[2,128]{1,0:T(2,128)}, s32[]{:S(2)}) slice-start(%d), slice={[0:2]}",
        "%q = ((bf16[1024,768]{1,0:T(8,128)(2,1)}), bf16[8,768]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x)",
        "%y = f32[1024,768]{1,0:T(8,128)} convert(%d)",
        "%z = bf16[1024,768]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kLoop, calls=%fused",
        computations=WIDENED,
    )
    copy, back, part, convert, fusion = read_kernels(text)
    assert (copy.is_copy, copy.bytes) == (True, 1024 * 768 * 2)
    assert (back.is_copy, back.bytes) == (True, 2 * 128 * 4)
    assert (part.is_copy, part.bytes) == (True, 8 * 768 * 2), "the slice, of what is larger"
    assert (convert.is_copy, convert.bytes) == (False, 1024 * 768 * 4)
    assert (fusion.is_copy, fusion.bytes) == (False, 1024 * 768 * 4)


def test_tpu_arrays_are_counted_with_tile_padding():
    narrow, vector, plain = arrays("(bf16[12,1024,64]{2,1,0:T(8,128)(2,1)}, f32[768]{0:T(1024)}, f32[3,5]{1,0})")
    assert narrow.bytes == 12 * 1024 * 128 * 2
    assert vector.bytes == 1024 * 4
    assert plain.bytes == 3 * 5 * 4
    [turned] = arrays("bf16[12,64,1024]{1,2,0:T(8,128)(2,1)}")
    assert turned.bytes == 12 * 1024 * 128 * 2, "the second dim is the innermost"


def test_buffers_exclude_values_inside_fusions():
    text = program(*STACK, "%y = f32[64,32]{1,0} fusion(%x, %i, %u), kind=kLoop, calls=%fused", computations=SLICED)
    assert {(a.dtype, a.dims) for a in buffers(text)} == {("f32", (12, 64, 32)), ("s32", ()), ("f32", (64, 32))}


# Programs that a compiler wrote


def compiled(function, *shapes):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*given).compile().as_text()


def test_compiled_product_has_exact_bytes_and_flops():
    text = compiled(lambda x, w: x @ w, (512, 256), (256, 384))
    assert sum(k.count * k.flops for k in read_kernels(text)) == 2 * 512 * 256 * 384
    assert sum(k.bytes for k in read_kernels(text)) == 4 * (512 * 256 + 256 * 384 + 512 * 384)


def test_compiled_layer_loop_reads_one_layer_at_a_time():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    kernels = read_kernels(compiled(layers, (512, 256), (6, 256, 256)))
    assert sum(k.count * k.flops for k in kernels) == 6 * 2 * 512 * 256 * 256
    least = 6 * 4 * (2 * 512 * 256 + 256 * 256)
    assert least <= sum(k.count * k.bytes for k in kernels) < 4 * least


def test_a_real_gradient_has_three_products():
    loss = lambda x, w: jnp.sum(jnp.tanh(x @ w))  # noqa: E731
    kernels = read_kernels(compiled(jax.grad(loss, argnums=(0, 1)), (512, 256), (256, 384)))
    assert sum(k.count * k.flops for k in kernels) == 3 * 2 * 512 * 256 * 384
