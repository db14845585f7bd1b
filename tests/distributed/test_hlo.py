"""Collectives, loops and traffic, read from texts of compiled programs with known answers."""

# ruff: noqa: E501 (lines of compiled programs are long)

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from duet_jax.distributed import hlo

# A loop of 16 passes over a collective that is started and worked beside in two fusions, as libtpu writes it.
LOOP = """HloModule jit_f, is_scheduled=true

%start (p.0: bf16[1,256,1024]) -> (bf16[1,256,1024], bf16[1,1024,1024], u32[]) {
  %p.0 = bf16[1,256,1024]{2,1,0} parameter(0)
  %all-gather.1 = bf16[1,1024,1024]{2,1,0} all-gather(%p.0), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={1}
  ROOT %custom-call.5 = (bf16[1,256,1024], bf16[1,1024,1024], u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[1,256,1024], p.2: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[1,256,1024]{2,1,0} parameter(0)
  %all-gather.2 = bf16[1,1024,1024]{2,1,0:S(1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={1}
  %p.2 = bf16[8,128]{1,0} parameter(1)
  ROOT %tanh.1 = bf16[8,128]{1,0} tanh(%p.2)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], bf16[1,256,1024], bf16[8,128], f32[64])) -> (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) {
  %state = (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %weight = bf16[1,256,1024]{2,1,0} get-tuple-element(%state), index=1
  %x.1 = bf16[8,128]{1,0} get-tuple-element(%state), index=2
  %loss = f32[64]{0} get-tuple-element(%state), index=3
  %fusion.1 = (bf16[1,256,1024], bf16[1,1024,1024], u32[]{:S(2)}) fusion(%weight), kind=kCustom, calls=%start
  %fusion.2 = bf16[8,128]{1,0} fusion(%weight, %x.1), kind=kLoop, calls=%beside
  %all-reduce.1 = f32[64]{0} all-reduce(%loss), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%counter, %one)
  ROOT %out = (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) tuple(%next, %weight, %fusion.2, %all-reduce.1)
}

%test (state.1: (s32[], bf16[1,256,1024], bf16[8,128], f32[64])) -> pred[] {
  %state.1 = (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) parameter(0)
  %bound = s32[]{:T(128)} constant(16)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%counter.1, %bound), direction=LT
}

ENTRY %main (a: bf16[1,256,1024], b: bf16[8,128], c: f32[64]) -> f32[64] {
  %a = bf16[1,256,1024]{2,1,0} parameter(0)
  %b = bf16[8,128]{1,0} parameter(1)
  %c = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) tuple(%zero, %a, %b, %c)
  %while.1 = (s32[], bf16[1,256,1024], bf16[8,128], f32[64]) while(%init), condition=%test, body=%body
  %result = f32[64]{0} get-tuple-element(%while.1), index=3
  %gathered-start = (f32[64]{0}, f32[512]{0}) all-gather-start(%result), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %gathered = f32[512]{0} all-gather-done(%gathered-start)
  %moved = f32[64]{0} collective-permute(%result), channel_id=10, source_target_pairs={{0,1},{1,0}}
  ROOT %scattered = f32[8]{0} reduce-scatter(%result), channel_id=11, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
"""


def test_collectives_count_each_pass_of_a_loop_once() -> None:
    found = hlo.read(LOOP).collectives()
    gathered, reduced = 16 * 2 * 1024 * 1024, 16 * 4 * 64
    assert found == {
        "all-gather": hlo.Collective(17, gathered + 4 * 512, gathered * 3 / 4 + 4 * 512 * 7 / 8),
        "all-reduce": hlo.Collective(16, reduced, reduced * 2 * 3 / 4),
        "reduce-scatter": hlo.Collective(1, 32, 32 * 7),
        "collective-permute": hlo.Collective(1, 256, 256),
    }


def test_a_loop_without_a_bound_counts_once_and_is_told() -> None:
    assert hlo.read(LOOP).open_loops == 0
    module = hlo.read(LOOP.replace("direction=LT", "direction=NE"))
    assert module.open_loops == 1
    assert module.collectives()["all-reduce"].count == 1


def test_groups_over_part_of_an_axis() -> None:
    text = LOOP.replace("{'x'}, dimensions", "{'x':(1)2,'y'}, dimensions")
    assert hlo.read(text).collectives()["all-gather"].sent == 16 * 2 * 1024 * 1024 * 3 / 4 + 4 * 512 * 7 / 8
    order = "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x':(1)2}"
    text = LOOP.replace("mesh['x'=4,'y'=2] {'x'}", order)
    assert hlo.read(text).collectives()["all-gather"].sent == 16 * 2 * 1024 * 1024 / 2 + 4 * 512 * 7 / 8


SLICES = """HloModule jit_g

%read (q.0: f32[32,128,128], q.1: s32[]) -> f32[128,128] {
  %q.0 = f32[32,128,128]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %nought = s32[] constant(0)
  %layer = f32[1,128,128]{2,1,0} dynamic-slice(%q.0, %q.1, %nought, %nought), dynamic_slice_sizes={1,128,128}
  ROOT %flat = f32[128,128]{1,0} bitcast(%layer)
}

%put (r.0: f32[32,128,128], r.1: f32[1,128,128], r.2: s32[]) -> f32[32,128,128] {
  %r.0 = f32[32,128,128]{2,1,0} parameter(0)
  %r.1 = f32[1,128,128]{2,1,0} parameter(1)
  %r.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %kept = f32[32,128,128]{2,1,0} dynamic-update-slice(%r.0, %r.1, %r.2, %none, %none)
}

ENTRY %main (w: f32[32,128,128], n: s32[], v: f32[1,128,128]) -> f32[32,128,128] {
  %w = f32[32,128,128]{2,1,0} parameter(0)
  %n = s32[]{:S(2)} parameter(1)
  %v = f32[1,128,128]{2,1,0} parameter(2)
  %one = f32[128,128]{1,0} fusion(%w, %n), kind=kLoop, calls=%read
  %near = f32[128,128]{1,0:S(1)} copy(%one)
  %product = f32[128,128]{1,0:S(1)} convolution(%near, %near), dim_labels=bf_io->bf
  ROOT %all = f32[32,128,128]{2,1,0} fusion(%w, %v, %n), kind=kLoop, calls=%put
}
"""


def test_traffic_counts_slices_and_leaves_out_what_stays_in_the_core() -> None:
    layer = 4 * 128 * 128
    # Reading a layer: in and out. Its copy into the core: in. The product in the core: nothing. Replacing: in and out.
    assert hlo.read(SLICES).traffic() == 2 * layer + layer + 2 * layer


def test_a_text_that_is_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule empty\n")


def test_reads_what_this_machine_compiles() -> None:
    def f(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x @ x) + i, x)

    text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
    module = hlo.read(text)
    assert module.collectives() == {} and module.traffic() >= 5 * 2 * 4 * 64 * 64
