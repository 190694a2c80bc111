"""Compiles steps for two TPU slices and prints what crosses between them, as one JSON object.

A process of its own, for libtpu's signal handlers would stay in the tests' one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re

FACTS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def crossing(text: str) -> list[tuple[str, int]]:
    """(kind, elements) of each transfer between slices in a compiled TPU program."""
    found = []
    for line in text.splitlines():
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
        if kind and " send(" in line:
            elements = 1
            for size in re.search(r"= \(\w+\[([\d,]*)\]", line)[1].split(","):
                elements *= int(size or 1)
            found.append((kind[1], elements))
    return found


def main() -> None:
    os.environ.update(FACTS)
    import jax
    import numpy as np
    from jax.experimental import mesh_utils, topologies

    from jaxtune.core.tree import without_holes
    from jaxtune.optim.schedules import make_schedule
    from jaxtune.optim.transform import OptimSpec, make_transform
    from jaxtune.parallel.mesh import AXES, batch_shards, make_mesh
    from jaxtune.parallel.rules import batch_sharding
    from jaxtune.peft.full import Full
    from jaxtune.peft.lora import Lora
    from jaxtune.recipes.assemble import plan_parts
    from jaxtune.recipes.sft import sft_loss
    from jaxtune.training.compile import abstract_batch, jit_step, make_layout, with_shardings
    from jaxtune.training.step import make_train_step
    from tests.correctness.small import CONFIG

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    ).devices
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, devices)
    theirs = mesh_utils.create_hybrid_device_mesh(
        (1, 2, 2, 1, 1), (2, 1, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    report = {"shape": dict(mesh.shape), "as jax": bool((theirs == mesh.devices).all())}
    config = dataclasses.replace(CONFIG, vocab_size=512, hidden_size=256, intermediate_size=512)
    for method in (Full(), Lora(rank=8)):
        parts = plan_parts(dataclasses.replace(config, dtype="bfloat16"), method, mesh)
        trained, frozen = parts.split(parts.shapes)
        schedule = make_schedule("constant", 1e-3, 10)
        tx = make_transform(OptimSpec(), parts.labels, trained, schedule, ())
        layout = make_layout(trained, frozen, parts.shardings, tx, mesh)
        loss = sft_loss(parts.config, method, batch_shards(mesh))
        step = jit_step(make_train_step(loss, tx, schedule, 1), layout)
        ints = ("input_ids", "segment_ids", "positions")
        kinds = {name: np.dtype(np.int32) for name in ints} | {"loss_mask": np.dtype(np.float32)}
        batch = abstract_batch(16, 64, kinds, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            lowered = step.lower(layout.shapes, with_shardings(frozen, layout.frozen), batch)
            text = lowered.compile().as_text()
        leaves = without_holes(layout.state.trainable)
        shapes = without_holes(trained)
        report[method.name] = {
            "crossing": crossing(text),
            "trained": sum(
                int(np.prod(place.shard_shape(shapes[path].shape)))
                for path, place in leaves.items()
            ),
        }
    assert set(AXES) == set(report["shape"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
