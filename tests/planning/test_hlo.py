# ruff: noqa: E501 (programs as compilers write them)
"""Programs small enough to know their collectives and operations by hand, compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.planning import collectives, hlo, products

LAYERS, ROWS, WIDTH = 5, 16, 32
WHOLE = P()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *arguments, out=WHOLE):
    """Returns the Module of a function of (shape, spec) arguments."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
        return hlo.parse(jitted.lower(*shapes).compile().as_text())


def layers(x, weights):
    """A scan over layers whose weights are gathered one after the other."""

    def layer(x, w):
        whole = jax.lax.with_sharding_constraint(w, P(None, None))
        return jnp.tanh(x @ whole), None

    return jax.lax.scan(layer, x, weights)[0]


@pytest.fixture(scope="module")
def scanned(mesh):
    return compiled(
        mesh,
        layers,
        ((ROWS, WIDTH), P("x", None)),
        ((LAYERS, WIDTH, WIDTH), P(None, "x", None)),
        out=P("x", None),
    )


def test_a_gather_in_a_scan_counts_once_a_layer_and_names_its_parameter(scanned):
    (gather,) = [c for c in collectives.collectives(scanned) if c.kind == "all-gather"]
    assert gather.runs == LAYERS and gather.group == 4
    assert gather.bytes == WIDTH * WIDTH * 4 and gather.link_bytes == 0.75 * gather.bytes
    assert gather.parameters == ("weights",)
    table = collectives.summary([gather])
    assert table == {"all-gather": {"count": LAYERS, "bytes": LAYERS * WIDTH * WIDTH * 4}}
    assert not collectives.sums(gather)


def test_the_products_of_a_scan_count_once_a_layer(scanned):
    assert products.flops(scanned) == LAYERS * 2 * (ROWS // 4) * WIDTH * WIDTH


def test_loops_in_loops_multiply(mesh):
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, y: layers(y, w), x)

    module = compiled(
        mesh,
        inner,
        ((ROWS, WIDTH), P("x", None)),
        ((LAYERS, WIDTH, WIDTH), P(None, "x", None)),
        out=P("x", None),
    )
    assert products.flops(module) == 3 * LAYERS * 2 * (ROWS // 4) * WIDTH * WIDTH


def test_a_gradient_is_summed_and_a_frozen_weight_has_none(mesh):
    def loss(a, b, x):
        return jnp.sum(jnp.tanh(x @ a) @ b)

    arguments = (
        ((WIDTH, 2 * WIDTH), P()),
        ((2 * WIDTH, 3 * WIDTH), P()),
        ((ROWS, WIDTH), P("x", None)),
    )
    both = compiled(mesh, jax.grad(loss, argnums=(0, 1)), *arguments)
    one = compiled(mesh, jax.grad(loss), *arguments)
    frozen = [(2 * WIDTH, 3 * WIDTH)]
    assert len(collectives.gradient_collectives(collectives.collectives(both), frozen)) == 1
    assert collectives.gradient_collectives(collectives.collectives(one), frozen) == []
    (total,) = [c for c in collectives.collectives(one) if collectives.sums(c)]
    assert total.kind == "all-reduce" and total.parameters == ()
    assert total.bytes == WIDTH * 2 * WIDTH * 4 and total.link_bytes == 1.5 * total.bytes


def test_permutes_and_scattered_sums_of_shard_map(mesh):
    def around(x):
        def local(x):
            y = jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.psum_scatter(y * 2, "y", tiled=True)

        return jax.shard_map(
            local, mesh=mesh, in_specs=P("x", None), out_specs=P(("x", "y"), None)
        )(x)

    module = compiled(mesh, around, ((ROWS, WIDTH), P("x", None)), out=P(("x", "y"), None))
    found = {c.kind: c for c in collectives.collectives(module)}
    permute = found["collective-permute"]
    assert permute.bytes == permute.link_bytes == ROWS // 4 * WIDTH * 4
    assert permute.parameters == ("x",)
    scatter = found["reduce-scatter"]
    assert scatter.group == 2 and scatter.bytes == ROWS // 4 * WIDTH * 4
    assert scatter.link_bytes == scatter.bytes / 2


def test_batches_of_products(mesh):
    module = compiled(
        mesh,
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        ((8, 6, 10), P()),
        ((8, 10, 12), P()),
    )
    assert products.flops(module) == 2 * 8 * 6 * 10 * 12


# As the TPU compiler writes it: a loop without a stated count, stepping by two; one gather that is
# begun in one fusion and ended in another; shards put among zeros and summed.
TPU = r"""
HloModule step, is_scheduled=true

%began (p.0: bf16[4,8]) -> bf16[16,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%ended (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%among (p.2: bf16[3,4,8], p.3: s32[]) -> bf16[16,8] {
  %p.2 = bf16[3,4,8]{2,1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %zero = bf16[] constant(0)
  %zeros = bf16[16,8]{1,0} broadcast(%zero), dimensions={}
  %slice = bf16[1,4,8]{2,1,0} dynamic-slice(%p.2, %p.3, %p.3, %p.3), dynamic_slice_sizes={1,4,8}
  %flat = bf16[4,8]{1,0} bitcast(%slice)
  ROOT %put = bf16[16,8]{1,0} dynamic-update-slice(%zeros, %flat, %p.3, %p.3)
}

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add = bf16[] add(%x, %y)
}

%windowed_body_rs (b.0: (s32[], bf16[3,4,8])) -> (s32[], bf16[3,4,8]) {
  %b.0 = (s32[], bf16[3,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b.0), index=0
  %w = bf16[3,4,8]{2,1,0} get-tuple-element(%b.0), index=1
  %two = s32[] constant(2)
  %made = bf16[16,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%among
  %whole = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%made), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%sum
  %far = bf16[16,8]{1,0} custom-call(%whole), custom_call_target="kernel", frontend_attributes={kernel_metadata={
"block": 512
}},metadata={op_name="splash"}
  %moved = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%far), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %there = bf16[16,8]{1,0} collective-permute-done(%moved)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], bf16[3,4,8]{2,1,0}) tuple(%next, %w)
}

%condition (c.0: (s32[], bf16[3,4,8])) -> pred[] {
  %limit = s32[] constant(7)
  %c.0 = (s32[], bf16[3,4,8]{2,1,0}) parameter(0)
  %at = s32[] get-tuple-element(%c.0), index=0
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (e.0: bf16[4,8], e.1: bf16[3,4,8]) -> bf16[16,8] {
  %e.0 = bf16[4,8]{1,0} parameter(0), metadata={op_name="frozen[\'head\']"}
  %e.1 = bf16[3,4,8]{2,1,0} parameter(1), metadata={op_name="frozen[\'blocks\']"}
  %start = s32[] constant(1)
  %a = bf16[16,8]{1,0} fusion(%e.0), kind=kOutput, calls=%began
  %b = bf16[16,8]{1,0} fusion(%e.0), kind=kOutput, calls=%ended
  %tuple = (s32[], bf16[3,4,8]{2,1,0}) tuple(%start, %e.1)
  %loop = (s32[], bf16[3,4,8]{2,1,0}) while(%tuple), condition=%condition, body=%windowed_body_rs
  ROOT %end = bf16[16,8]{1,0} add(%a, %b)
}
"""


def test_a_tpus_program_by_hand():
    found = {c.kind: c for c in collectives.collectives(hlo.parse(TPU))}
    assert set(found) == {"all-gather", "all-reduce", "collective-permute"}
    gather, total, permute = (found[kind] for kind in sorted(found))
    assert (gather.runs, gather.group, gather.parameters) == (1, 4, ("frozen['head']",))
    assert (total.runs, total.group, total.parameters) == (3, 4, ("frozen['blocks']",))
    assert (permute.runs, permute.bytes, permute.parameters) == (3, 16 * 8 * 2, ())
    # The permute sums, for it is woven into a scattered sum; the gathers do not.
    assert [collectives.sums(c) for c in (gather, total, permute)] == [False, False, True]
    assert collectives.gradient_collectives([gather, total, permute], [(8, 16)]) == [permute]
    assert collectives.largest([gather, total]).bytes == 256


def test_a_products_windows_do_not_count_twice():
    """A batch of 8 products [6, 10] · [10, 12], as the TPU compiler writes it."""
    text = """
ENTRY %main (a: f32[6,8,10], b: f32[8,10,12]) -> f32[8,6,12] {
  %a = f32[6,8,10]{2,1,0} parameter(0)
  %b = f32[8,10,12]{2,1,0} parameter(1)
  ROOT %c = f32[8,6,12]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=b0f_0io->0bf
}
"""
    assert products.flops(hlo.parse(text)) == 2 * 8 * 6 * 10 * 12


def test_a_loop_that_the_data_end_counts_once_and_is_named():
    """`while i < n`, where n is an argument."""
    text = TPU.replace(
        "%limit = s32[] constant(7)", "%limit = s32[] get-tuple-element(%c.0), index=0"
    )
    module = hlo.parse(text)
    assert module.uncounted == ["loop"] and hlo.parse(TPU).uncounted == []
    assert [c.runs for c in collectives.collectives(module)] == [1, 1, 1]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule nothing\n")
