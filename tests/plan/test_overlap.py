"""How much of its communication a compiled program's schedule hides."""

import pytest

from gptjax.plan.overlap import Speeds, hidden_share, read_overlaps

# A kernel of 100 bytes/s reads and writes 800 bytes in 8 s. An all-reduce over two devices sends its result's 400
# bytes, which take 4 s.
SPEEDS = Speeds(memory=100.0, flops=1.0, seconds_to_send=lambda collective: collective.bytes / 100.0)
MESH = {"data": 2}
KERNEL = "%{0} = f32[100]{{0}} fusion(%x), kind=kLoop, calls=%body"
GROUPS = "channel_id=1, replica_groups={{0,1}}, to_apply=%sum"
BODIES = """
%body (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %n = f32[100]{0} negate(%p)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def program(lines, others=""):
    """Returns the text of a compiled program whose entry is `lines`."""
    entry = "\n".join(f"  {line}" for line in ("%x = f32[100]{0} parameter(0)", *lines))
    return f"{BODIES}\n{others}\nENTRY %main (x: f32[100]) -> f32[100] {{\n{entry}\n}}\n"


def overlaps(*lines, others=""):
    """Returns (seconds, hidden seconds) of each collective of a program whose entry is `lines`."""
    found = read_overlaps(program(lines, others), MESH, speeds=SPEEDS)
    return [(overlap.seconds, overlap.hidden) for overlap in found]


def kernel(name):
    return KERNEL.format(name)


def start(name, size=100):
    return f"%{name} = f32[{size}]{{0}} all-reduce-start(%x), {GROUPS}"


def done(name, of, size=100):
    return f"%{name} = f32[{size}]{{0}} all-reduce-done(%{of})"


def test_collective_without_a_start_is_waited_for():
    assert overlaps(kernel("k"), f"%r = f32[100]{{0}} all-reduce(%x), {GROUPS}", kernel("l")) == [(4.0, 0.0)]


def test_kernels_between_start_and_end_hide_it():
    assert overlaps(kernel("k"), start("s"), kernel("l"), done("d", "s")) == [(4.0, 4.0)]
    assert overlaps(kernel("k"), start("s"), done("d", "s"), kernel("l")) == [(4.0, 0.0)]


def test_kernel_hides_no_longer_than_it_runs():
    assert overlaps(start("s", 1000), kernel("k"), kernel("l"), done("d", "s", 1000)) == [(40.0, 16.0)]


def test_kernel_hides_one_collective_at_a_time():
    lines = [start("s"), start("t"), start("u"), kernel("k"), done("d", "s"), done("e", "t"), done("f", "u")]
    assert overlaps(*lines) == [(4.0, 4.0), (4.0, 4.0), (4.0, 0.0)]


def loop(name, trips, *lines):
    """Returns the computations of a loop whose body is `lines`."""
    carry = "(s32[], f32[100]{0})"
    body = "\n".join(f"  {line}" for line in lines)
    return f"""
%{name} (c: (s32[], f32[100])) -> (s32[], f32[100]) {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[100]{{0}} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
{body}
  ROOT %t = {carry} tuple(%next, %x)
}}

%{name}_more (c: (s32[], f32[100])) -> pred[] {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant({trips})
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}
"""


def test_loop_hides_as_much_as_its_kernels_take():
    waited_for = f"%r = f32[100]{{0}} all-reduce(%x), {GROUPS}"
    inner = loop("step", 3, kernel("k"), start("s"), kernel("l"), done("d", "s"), waited_for)
    run = "%w = (s32[], f32[100]{0}) while(%c), condition=%step_more, body=%step"
    outer = loop("twice", 2, start("o", 2000), run, done("e", "o", 2000))
    entry = "%l = (s32[], f32[100]{0}) while(%start), condition=%twice_more, body=%twice"
    found = overlaps(start("a", 4000), entry, done("z", "a", 4000), others=inner + outer)
    assert found[:2] == [(24.0, 24.0), (24.0, 0.0)]  # six runs of 4 s each
    # Two runs in the outer loop, each next to three steps; then one run next to all six. The counters take 1 to 2 s.
    assert found[2:] == [(160.0, pytest.approx(96.0, abs=2.0))] * 2


def test_asynchronous_computation_is_the_collective_in_it():
    others = """
%wrapped (p: f32[100]) -> f32[50] {
  %p = f32[100]{0} parameter(0)
  ROOT %r = f32[50]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}, to_apply=%sum
}
"""
    begin = "%s = ((f32[100]{0}), f32[50]{0}) async-start(%x), calls=%wrapped"
    end = "%d = f32[50]{0} async-done(%s)"
    assert overlaps(begin, kernel("k"), end, others=others) == [(2.0, 2.0)]


def test_only_fusions_that_advance_a_collective_of_a_tpu_hide_it():
    """A TPU compiles some fusions together with a collective, which stands still next to all others."""
    others = """
%begin (p: f32[100]) -> (f32[100], f32[200], u32[]) {
  %p = f32[100]{0} parameter(0)
  %g = f32[200]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = (f32[100]{0}, f32[200]{0}, u32[]) custom-call(%p, %g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: f32[100], q: f32[200]) -> (f32[50], f32[200]) {
  %p = f32[100]{0} parameter(0)
  %q = f32[200]{0} parameter(1)
  %g = f32[200]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %h = f32[50]{0} slice(%p), slice={[0:50]}
  ROOT %t = (f32[50]{0}, f32[200]{0}) tuple(%h, %g)
}

%end (q: f32[200]) -> f32[200] {
  %q = f32[200]{0} parameter(0)
  %g = f32[200]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = f32[200]{0} custom-call(%q, %g), custom_call_target="AsyncCollectiveDone"
}
"""
    begin = "%s = (f32[100]{0}, f32[200]{0}, u32[]) fusion(%x), kind=kCustom, calls=%begin"
    view = "%g = f32[200]{0} get-tuple-element(%s), index=1"
    fused = "%f = (f32[50]{0}, f32[200]{0}) fusion(%x, %g), kind=kOutput, calls=%async_collective_fusion.1"
    sent = "%h = f32[200]{0} get-tuple-element(%f), index=1"
    last = "%d = f32[200]{0} fusion(%h), kind=kCustom, calls=%end"
    plain = "%d = f32[200]{0} fusion(%g), kind=kCustom, calls=%end"
    assert overlaps(begin, view, kernel("k"), plain, others=others) == [(4.0, 0.0)]
    [(seconds, hidden)] = overlaps(begin, view, kernel("k"), fused, sent, last, others=others)
    assert (seconds, hidden) == (4.0, 4.0)


def test_transfer_between_slices_ends_where_the_sum_comes_back():
    def transfer(rendezvous):
        name = f'_xla_host_transfer_rendezvous="{rendezvous}"'
        return f'frontend_attributes={{{name},_xla_megascale_transfer_type="ALL_REDUCE"}}'

    def send(name, rendezvous):
        return f"%{name} = (f32[100]{{0}}, u32[], token[]) send(%x, %token), channel_id=1, {transfer(rendezvous)}"

    def receive(name, rendezvous):
        return f"%{name} = (f32[100]{{0}}, u32[], token[]) recv(%token), channel_id=2, {transfer(rendezvous)}"

    sent = "%sd = token[] send-done(%s), channel_id=1"
    back = "%rd = (f32[100]{0}, token[]) recv-done(%r), channel_id=2"
    other = "%qd = (f32[100]{0}, token[]) recv-done(%q), channel_id=2"
    sends = [send("s", "one"), send("t", "two"), receive("q", "two"), receive("r", "one")]
    text = program([*sends, other, sent, kernel("k"), back])
    found = read_overlaps(text, {"data": 2}, 2, speeds=SPEEDS)
    assert [(overlap.collective.where, overlap.hidden) for overlap in found] == [("two", 0.0), ("one", 4.0)]
    assert hidden_share(found) == 0.5


def test_end_of_a_copy_is_no_end_of_a_collective():
    copy = "%c = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%x)"
    copied = "%e = f32[100]{0} copy-done(%c)"
    assert overlaps(start("s"), copy, copied, done("d", "s")) == [(4.0, 0.0)]


def test_program_without_collectives_hides_nothing():
    assert overlaps(kernel("k")) == []
    assert hidden_share([]) == 0.0
