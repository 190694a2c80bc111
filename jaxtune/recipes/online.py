"""What GRPO and PPO share: rollouts of the policy, scored, as the batches of a run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.core.tree import Tree, combine
from jaxtune.data.batches import Batch, empty_batch
from jaxtune.generate.stops import cut
from jaxtune.objectives import advantages, kl, value
from jaxtune.parallel import processes
from jaxtune.parallel.batches import global_batch, held_rows
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.rules import batch_sharding, replicated
from jaxtune.recipes.engines import open_engine, sampling_of
from jaxtune.recipes.online_told import KL_COEF, sample_metrics, shown
from jaxtune.recipes.policy import observer
from jaxtune.rl.engine import Sample
from jaxtune.rl.groups import Group, Prompt, Rounds, draw_varied, prompts_at, rows_of
from jaxtune.rl.rewards.scores import score
from jaxtune.rl.rollouts import Iteration, Rollouts, Schedule, sampler_gap
from jaxtune.training.feed import Source
from jaxtune.training.state import TrainState


class Credit(NamedTuple):
    """What an iteration's rewards become.

    Attributes:
        arrays: further keys of the batch [N, T]; `advantages` among them.
        metrics: what is told of them.
    """

    arrays: dict[str, np.ndarray]
    metrics: dict[str, float]


# (objective section, rewards [P, n] with NaN for what is left out, rows, what the trainer saw of
# them at the tokens [N, T], KL coefficient) → Credit
GiveCredit = Callable[[Any, np.ndarray, Batch, Mapping[str, np.ndarray], float], Credit]


def keys_of(objective: Any) -> tuple[str, ...]:
    """Returns the float32 keys that a batch of the objective has besides those of every batch."""
    keys = ["old_logprobs", "advantages"]
    if objective.kl_coef:
        keys.append("ref_logprobs")
        if objective.kl_in == "loss":
            keys.append(KL_COEF)
    if objective.name == "ppo":
        keys += ["old_values", "returns"]
    return tuple(keys)


def padding(config: Any, data: Any, rows: int, num_virtual: int) -> Batch:
    """Returns a batch of padding with all its keys; see `objective.Objective`."""
    shape = (rows, config.data.seq_len)
    batch = empty_batch(rows, config.data.seq_len, num_virtual)
    batch["completions"] = np.zeros(shape, np.int32)
    return batch | {name: np.zeros(shape, np.float32) for name in keys_of(config.objective)}


def keeps_start(config: Any) -> bool:
    """Tells whether the policy at the start is the reference of a KL divergence."""
    return config.objective.kl_coef > 0


def head_tokens(config: Any, _: Any) -> int:
    """Returns how many tokens of a row have logits: those that a completion may have."""
    return config.objective.max_new_tokens


def charged(o: Any, seen: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the KL that is charged to each token in the reward, float32 [N, T]."""
    if o.kl_estimator == "exact":
        return seen["kl"]
    return np.asarray(kl.ESTIMATES[o.kl_estimator](seen["logprobs"], seen["ref_logprobs"]))


def judged(
    plan: Any, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Sample]], shaped: bool = True
) -> list[Group]:
    """Returns the groups of prompts and their samples, scored once, by the first process.

    Args:
        plan: of the run.
        prompts, drawn: of each prompt its samples.
        shaped: whether the penalty of overlong completions is part of the reward.
    """
    o, tokenizer = plan.config.objective, plan.base.tokenizer
    flat = [
        (prompt, sample) for prompt, some in zip(prompts, drawn, strict=True) for sample in some
    ]
    texts = [cut(tokenizer.decode(s.ids, skip_special=True), o.stop) for _, s in flat]
    told = None
    if processes.is_writer():
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        found = score(
            plan.data.rewards,
            [prompt.text for prompt, _ in flat],
            texts,
            {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names},
            completion_ids=[list(sample.ids) for _, sample in flat],
            finished=[sample.finished for _, sample in flat],
            places=[prompt.place for prompt, _ in flat],
        )
        total = np.where(found.dropped, np.nan, found.total)
        by_function = {name: values.tolist() for name, values in found.by_function.items()}
        told = [total.tolist(), by_function]
        for fault in found.faults:
            logging.getLogger("jaxtune").warning("%s", fault)
    # Callables need not be deterministic, so one process's scores are everybody's.
    total, by_function = processes.gather("rewards", told)[0]
    total = np.array(total, np.float64)
    if shaped and o.overlong:
        lengths = np.array([len(sample.ids) for _, sample in flat])
        total += advantages.soft_overlong(lengths, o.max_new_tokens, o.overlong)
    groups, at = [], 0
    for prompt, some in zip(prompts, drawn, strict=True):
        mine = slice(at, at + len(some))
        scores = {name: np.array(values[mine], np.float64) for name, values in by_function.items()}
        groups.append(Group(prompt, some, texts[mine], total[mine], scores))
        at += len(some)
    return groups


def look_at(plan: Any) -> Callable[[Tree, Tree | None, Tree, Batch], dict[str, np.ndarray]]:
    """Returns the trainer's pass over rollouts: one compiled program.

    (trainable, start or None, frozen, rows [N, T]) → what `policy.observer` gives, float32 [N, T]
    at the tokens, on the host. `start` are the trained parameters of the reference.
    """
    parts, o = plan.parts, plan.config.objective
    exact = o.kl_estimator == "exact" and o.kl_in == "reward"
    look = observer(
        parts.config,
        parts.method,
        o.temperature,
        batch_shards(plan.mesh),
        exact,
        head_tokens(plan.config, None),
    )

    def observe(trainable: Tree, start: Tree | None, frozen: Tree, batch: dict[str, jax.Array]):
        reference = None if start is None else combine(start, frozen)
        return look(combine(trainable, frozen), reference, batch)

    @functools.cache
    def compiled(reference: bool) -> Callable:
        where = plan.layout.state.trainable
        return jax.jit(
            observe,
            in_shardings=(
                where,
                where if reference else None,
                plan.layout.frozen,
                batch_sharding(plan.mesh),
            ),
            out_shardings=replicated(plan.mesh),
        )

    # As many rows at a time as a micro-batch has, which training has memory for.
    size = plan.config.batch_size // plan.config.grad_accum

    def run(trainable: Tree, start: Tree | None, frozen: Tree, rows: Batch):
        pieces = []
        for first in range(0, len(rows["input_ids"]), size):
            some = {name: array[first : first + size] for name, array in rows.items()}
            batch = global_batch(some, plan.mesh)
            pieces.append(compiled(start is not None)(trainable, start, frozen, batch))
        pieces = jax.device_get(pieces)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    return run


def make_roll(plan: Any, begun: Any, credit: GiveCredit) -> Callable[..., Iteration]:
    """Returns the function that makes an iteration; see `rl.rollouts.Roll`."""
    config, o = plan.config, plan.config.objective
    engine, look, order = open_engine(plan), look_at(plan), Rounds(plan.data.stream)
    sampling, virtual = sampling_of(plan, o.temperature), plan.parts.method.num_virtual

    def draw(prompts: Sequence[Prompt], seed: int) -> list[Group]:
        drawn = engine.sample([prompt.ids for prompt in prompts], o.samples, sampling, seed)
        return judged(plan, prompts, drawn)

    def roll(state: TrainState, iteration: int, carried: Mapping[str, float]) -> Iteration:
        engine.update(combine(state.trainable, begun.frozen))
        rounds = o.get("dynamic_sampling", 0)
        groups, told = draw_varied(draw, order, iteration, o.prompts, rounds, config.seed)
        rows = rows_of(groups, config.data.seq_len, virtual)
        sampled = rows.pop("sampled_logprobs")
        seen = look(state.trainable, begun.start, begun.frozen, rows)
        inside = rows["completions"] > 0
        told |= sampler_gap(sampled, seen["logprobs"], inside, o.max_logprob_gap)
        told |= sample_metrics(groups)
        coefficient = carried[KL_COEF]
        following = dict(carried)
        if o.kl_coef:
            gone = np.where(inside, kl.k1(seen["logprobs"], seen["ref_logprobs"]), 0.0)
            whole = float(gone.sum() / max(inside.any(axis=1).sum(), 1))
            told |= {"rollout_kl": float(gone.sum() / max(inside.sum(), 1)), KL_COEF: coefficient}
            told["rollout_kl/completion"] = whole
            if o.kl_target is not None:
                following[KL_COEF] = value.adapted_kl(coefficient, whole, o.kl_target, o.kl_gain)
        rewards = np.stack([group.rewards for group in groups])
        given = credit(o, rewards, rows, seen, coefficient)
        if o.mask_truncated:
            cut_off = np.array([not s.finished for group in groups for s in group.samples])
            rows["completions"] = advantages.without_truncated(rows["completions"], cut_off)
            rows["loss_mask"] = np.where(cut_off[:, None], 0, rows["loss_mask"])
        rows |= {"old_logprobs": seen["logprobs"], **given.arrays}
        if o.kl_coef:
            rows["ref_logprobs"] = seen["ref_logprobs"]
            if o.kl_in == "loss":
                rows[KL_COEF] = np.full(inside.shape, coefficient)
        rows |= {name: rows[name].astype(np.float32) for name in keys_of(o)}
        rows["loss_mask"] = rows["loss_mask"].astype(np.float32)
        return Iteration(rows, told | given.metrics, following, groups)

    return roll


def open_feed(
    plan: Any, begun: Any, note: Callable[[dict[str, Any]], None], credit: GiveCredit
) -> Source:
    """Returns the Source of a run that samples; see `objective.Objective`."""
    config, o = plan.config, plan.config.objective
    rows = held_rows(config.batch_size, config.data.seq_len, plan.mesh)

    def told(step: int, number: int, new: Iteration) -> None:
        for row in shown(new.groups):
            note({"step": step + 1, "iteration": number, **row})

    rollouts = Rollouts(
        Schedule(o.prompts * o.samples, config.batch_size, o.epochs, config.seed),
        make_roll(plan, begun, credit),
        step=int(begun.state.step),
        carried={KL_COEF: float(np.float32(o.kl_coef))},
        saved=begun.feed,
        held=slice(None) if rows is None else list(rows.held),
        note=told,
    )
    return Source(rollouts.feed, rollouts.arrays)


def evaluate(plan: Any, trainable: Tree, frozen: Tree) -> dict[str, float]:
    """Returns the `eval/…` metrics of held-out prompts: rewards, lengths, truncated share.

    `eval/NAME/…` of each source where there are several, `eval/…` of all their samples.
    """
    o, engine = plan.config.objective, open_engine(plan)
    engine.update(combine(trainable, frozen))
    sampling, found = sampling_of(plan, o.eval_temperature), {}
    for name, held in plan.data.evals.items():
        prompts = prompts_at(held, range(len(held)))
        drawn = engine.sample(
            [prompt.ids for prompt in prompts], o.eval_samples, sampling, plan.config.seed
        )
        found[name] = judged(plan, prompts, drawn, shaped=False)
    named: dict[str, float] = {}
    if len(found) > 1:
        for name, groups in found.items():
            named |= sample_metrics(groups, f"eval/{name}/")
    return named | sample_metrics([g for groups in found.values() for g in groups], "eval/")
