"""Checkpoints of a run, by Orbax: the trained partition with all that continuing needs."""

from __future__ import annotations

import errno
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtune.checkpoints import loops, s3
from jaxtune.checkpoints.pareto import Aims, KeepFront, Point, larger_is_better, points_of
from jaxtune.core.errors import RequestError, RunFailure
from jaxtune.core.places import is_remote
from jaxtune.core.tree import flatten, unflatten


class DamagedCheckpoint(RequestError):
    """A checkpoint is partial or damaged; an older one may be whole."""


class UnwrittenCheckpoint(RunFailure):
    """A save failed, for want of space or for another reason; the older checkpoints are whole."""


class RunCheckpoints:
    """`checkpoints/STEP/` with `model` and `state` (trees of arrays) and `meta` (JSON).

    `model` is what using the run needs (the method's parameters, trained base weights), `state`
    what continuing it needs besides. Where the batches do not follow from the step alone, `feed`
    holds what they are made of.

    Saving is asynchronous; a checkpoint appears under its step only when it is whole.

    Args:
        directory: where the steps lie.
        keep: newest checkpoints to keep.
        best: name of the metric by which one more is kept, or None; see `larger_is_better`.
        aims: names of two metrics; what no other checkpoint beats in both is kept. None: off.
        async_save: write in the background.
        reading: only look: nothing is made or cleaned up, so that a run which is being trained
            can be used, and a refused request leaves everything as it was.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        best: str | None = None,
        async_save: bool = True,
        *,
        aims: Aims | None = None,
        reading: bool = False,
    ):
        remote = is_remote(directory)
        if str(directory).startswith(s3.S3):
            s3.teach_orbax()
        self.directory, self.best = directory if remote else Path(directory).absolute(), best
        self.aims = aims
        self.saving: int | None = None
        self.under_way = ExitStack()  # what lasts from the start of a save to its end
        alone = {}
        if reading and jax.process_count() > 1:
            # Where one process finds damage, the others must not wait for it inside of Orbax.
            here = jax.process_index()
            alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"read{here}"
            )
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=async_save and not alone,
            preservation_policy=preservation(keep, best, aims),
            # A store cannot rename a directory; a file in it says that it is whole.
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath if remote else None,
            create=not reading,
            cleanup_tmp_directories=not reading,
            **alone,
        )
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "state": ocp.StandardCheckpointHandler(),
                "feed": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(
        self,
        step: int,
        model: Any,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float],
        feed: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Starts a save; a step that is there already is left alone.

        Args:
            step: steps done.
            model, state: trees of arrays.
            meta: JSON values.
            metrics: of the last evaluation, for `best` and `aims`; empty if there was none.
            feed: {path: array}, whole on every device; empty or None where there is nothing.

        Raises:
            UnwrittenCheckpoint: this save, or the one before, failed.
        """
        if step in self.manager.all_steps():
            return
        self.check()
        with self.complained():
            self.wait()
            self.saving = step
            self.under_way.enter_context(loops.finishing())
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    **({"feed": ocp.args.StandardSave(unflatten(feed))} if feed else {}),
                    model=ocp.args.StandardSave(named(model)),
                    state=ocp.args.StandardSave(named(state)),
                    meta=ocp.args.JsonSave({**meta, "metrics": dict(metrics)}),
                ),
                metrics=dict(metrics) if self.best in metrics or self.aims else None,
                force=True,
            )

    def latest(self) -> int | None:
        """Returns the newest whole step, or None."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the best metric, or the newest where none has it."""
        scores = {step: self.meta(step)["metrics"].get(self.best) for step in self.steps()}
        known = {step: score for step, score in scores.items() if score is not None}
        if not known:
            return self.latest()
        return (max if larger_is_better(self.best) else min)(known, key=known.get)

    def points(self) -> dict[int, Point]:
        """Returns {step: point} of the checkpoints that were measured by both aims."""
        return points_of({step: self.meta(step)["metrics"] for step in self.steps()}, self.aims)

    def steps(self) -> list[int]:
        """Returns the whole steps, in order."""
        return sorted(self.manager.all_steps())

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON part of a checkpoint; DamagedCheckpoint if it cannot be read."""
        with self.blamed(step):
            return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]

    @contextmanager
    def complained(self) -> Iterator[None]:
        """Turns what a failed save raises into an UnwrittenCheckpoint that says what is left."""
        try:
            yield
        except UnwrittenCheckpoint:
            raise
        except Exception as error:
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
            # TensorStore says it at the end of a long line, in words alone.
            full = os.strerror(errno.ENOSPC)
            if full in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
                reason = f"{full}: {self.directory}"
            whole = [step for step in steps_in(self.directory) if step != self.saving]
            left = f"that of step {whole[-1]} is kept" if whole else "there is no older one"
            raise UnwrittenCheckpoint(
                f"the checkpoint of step {self.saving} could not be written ({reason}); {left}"
            ) from error

    @contextmanager
    def blamed(self, step: int) -> Iterator[None]:
        """Turns what reading a damaged checkpoint raises into a DamagedCheckpoint."""
        try:
            with loops.finishing():
                yield
        except (RequestError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax raises many kinds, Exception itself among them
            cause = error.__cause__ or error
            reason = textwrap.shorten(f"{type(cause).__name__}: {cause}", 200, placeholder=" …")
        else:
            return
        raise DamagedCheckpoint(
            f"the checkpoint is damaged ({reason})", where=self.directory / str(step)
        )

    def restore(self, step: int, item: str, shapes: Any) -> Any:
        """Returns the arrays of a step in the shardings of `shapes`, on any mesh.

        Args:
            step: which checkpoint.
            item: "model" or "state".
            shapes: tree of ShapeDtypeStructs with shardings, structured as what was saved.

        Raises:
            DamagedCheckpoint: an array cannot be read.
            RequestError: the checkpoint holds other arrays than `shapes` asks for.
        """
        wanted = named(shapes)
        where = self.directory / str(step) / item
        with self.blamed(step):
            saved = self.manager.item_metadata(step)[item]
            have = flatten(dict(saved.tree if hasattr(saved, "tree") else saved))
        need = flatten(wanted)
        for path in sorted(have.keys() ^ need.keys()):
            side = "lacks" if path in need else "has an extra"
            raise RequestError(f"the checkpoint {side} array {path!r}", where=where)
        for path, shape in need.items():
            if tuple(have[path].shape) != tuple(shape.shape):
                raise RequestError(
                    f"array {path!r} has shape {tuple(have[path].shape)}, not {shape.shape}",
                    where=where,
                )
        with self.blamed(step):
            arrays = self.manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
            )[item]
        return unnamed(arrays, shapes)

    def restore_feed(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, np.ndarray]:
        """Returns {path: array} that `save` was given as `feed`; empty if there was none.

        Args:
            step: which checkpoint.
            sharding: that leaves an array whole on every device.

        Raises:
            DamagedCheckpoint: an array cannot be read.
        """
        with self.blamed(step):
            if not (self.directory / str(step) / "feed").is_dir():
                return {}
            saved = self.manager.item_metadata(step)["feed"]
            have = flatten(dict(saved.tree if hasattr(saved, "tree") else saved))
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for path, leaf in have.items()
            }
            arrays = self.manager.restore(
                step, args=ocp.args.Composite(feed=ocp.args.StandardRestore(unflatten(wanted)))
            )["feed"]
        return {path: np.asarray(leaf) for path, leaf in flatten(arrays).items()}

    def check(self) -> None:
        """Raises UnwrittenCheckpoint if a save has failed in the background.

        Orbax's own `check_for_errors` gives an error away once: its thread that removes the older
        checkpoints would not see it, and would remove the last whole one.
        """
        if not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the saves under way are on disk; raises UnwrittenCheckpoint if not."""
        with self.under_way, self.complained():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            self.manager.close()


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, in order, as their names say."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def preservation(keep: int, best: str | None, aims: Aims | None) -> Any:
    """Returns the Orbax policy: the newest `keep`, the best one by the metric, the aims' front."""
    policies = ocp.checkpoint_managers.preservation_policy
    kept: list[Any] = [policies.LatestN(n=keep)]
    if best is not None:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                n=1,
                reverse=not larger_is_better(best),
                keep_checkpoints_without_metrics=False,
            )
        )
    if aims is not None:
        kept.append(KeepFront(aims))
    return policies.AnyPreservationPolicy(kept) if len(kept) > 1 else kept[0]


def named(tree: Any) -> dict[str, Any]:
    """Returns a tree as nested dicts by its path names, without holes: what Orbax stores."""
    return unflatten({name(path): leaf for path, leaf in paths(tree)})


def unnamed(stored: Mapping[str, Any], like: Any) -> Any:
    """Returns the tree structured as `like` from its nested dicts; the inverse of `named`."""
    flat = flatten(stored)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[name(path)], like)


def paths(tree: Any) -> list[tuple[Any, Any]]:
    """Returns (key path, leaf) pairs."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def name(path: tuple) -> str:
    """Returns the key path joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
