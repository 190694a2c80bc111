"""What TRL's trainers compute from given log-probabilities, scores and rewards.

python -m tests.goldens.preference_losses --write     # rewrites preference_losses.json
python -m tests.goldens.preference_losses             # compares with it

TRL's own methods run on stand-ins for the trainer and the model, which hand them the arrays of
`inputs()`; so the file holds numbers of TRL 1.16.0 and none of its code. In float64, but where TRL
itself casts to float32. Not in this version of TRL: PPO (see ppo_losses.py, from an older one), and
label smoothing of the sigmoid loss, for which its `aot` on one pair at a time is the same formula.
"""

import argparse
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("preference_losses.json")
LIBRARIES = ("trl", "torch", "numpy")
PAIRS, TOKENS, VOCAB = 5, 6, 7

# name → the settings of DPOTrainer
DPO = {
    "sigmoid": {"beta": 0.3},
    "sigmoid_norm": {"beta": 2.0},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "hinge": {"beta": 0.5},
    "ipo": {"beta": 0.4},
    "sigmoid+sft": {"beta": 0.3},
    "aot": {"beta": 0.3, "label_smoothing": 0.2},
}
CPO = {
    "cpo": {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7, "label_smoothing": 0.1},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
}
KTO = {
    "kto": {"loss_type": "kto", "desirable_weight": 1.2, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
REWARD = {
    "plain": {},
    "margin": {"margin": True},
    "centred": {"center": 0.1},
}
PLAIN = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "delta": None, "level": "token"}
GRPO = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dual": {"loss_type": "bnpo", "delta": 1.5},
    "k3": {"loss_type": "grpo", "beta": 0.2, "corrected": False},
    "k3_corrected": {"loss_type": "dapo", "beta": 0.2, "corrected": True},
    "gspo": {"loss_type": "grpo", "level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
}
MAX_LENGTH = 9  # of Dr. GRPO
GKD = {"forward": (0.0, 1.0), "reverse": (1.0, 1.7), "half": (0.5, 1.0), "tenth": (0.1, 0.6)}
OVERLONG = {"limit": 20, "cache": 6, "lengths": list(range(10, 25))}


def inputs() -> dict[str, Any]:
    """Returns the arrays, lists of floats that float32 holds exactly; rows are ragged."""
    rng = np.random.RandomState(0)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * rng.random_sample(shape)).astype(np.float32)

    rows = 2 * PAIRS
    lengths = np.array([6, 3, 5, 2, 4, 4, 6, 1, 5, 2])
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.float32)
    policy = uniform(-2.5, -0.1, rows, TOKENS)
    old = policy + uniform(-0.5, 0.5, rows, TOKENS)
    rewards = uniform(-1, 1, 3, 4)
    rewards[1] = 0.25
    rewards[2, 3] = np.nan
    found = {
        "mask": mask,
        "policy": policy,
        "reference": policy + uniform(-0.8, 0.8, rows, TOKENS),
        "kl_policy": uniform(-2.0, -0.2, 4, TOKENS),
        "kl_reference": uniform(-2.4, -0.4, 4, TOKENS),
        "desirable": np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1], np.float32),
        "scores": uniform(-2, 2, rows),
        "margins": uniform(0, 1, PAIRS),
        "old": old,
        "advantages": uniform(-1.5, 1.5, rows),
        "logits": uniform(-2, 2, rows, TOKENS + 1, VOCAB),
        "teacher_logits": uniform(-2, 2, rows, TOKENS + 1, VOCAB),
        "ids": rng.randint(0, VOCAB, (rows, TOKENS + 1)),
        "rewards": rewards,
    }
    return {name: array.tolist() for name, array in found.items()}


def trainer(**attributes: Any) -> SimpleNamespace:
    """Returns a stand-in for a trainer on one device with no gradient accumulation."""
    import torch

    same = lambda x, **_: x  # noqa: E731
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def fused(logprobs: Any, **others: Any) -> Any:
    """Returns a model whose answer has the given log-probabilities and nothing else of interest."""
    import torch

    zeros = torch.zeros_like(logprobs)
    answer = {
        "log_probs": logprobs,
        "entropy": zeros,
        "mean_logits": zeros,
        "is_top1": zeros.bool(),
        "log_sum_sq_probs": zeros,
    }
    return lambda **_: SimpleNamespace(**answer | others)


def lasts(metrics: dict[str, list[float]]) -> dict[str, float]:
    """Returns the one value that each metric got, those of preference and of clipping."""
    wanted = ("rewards/", "logps/", "clip_ratio/", "kl", "accuracy")
    return {k: float(v[-1]) for k, v in metrics.items() if k.startswith(wanted)}


def outcome(loss: Any, leaf: Any, metrics: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns {loss, grad of leaf, metrics} as numbers."""
    loss.backward()
    return {"loss": loss.item(), "grad": leaf.grad.tolist(), "metrics": metrics or {}}


def preference(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcomes of DPOTrainer and KTOTrainer; `grad` is of `policy`."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    mask, reference = given["mask"], (given["reference"] * given["mask"]).sum(1)
    # TRL's masks are of the tokens with the one before them, which is a prompt's.
    whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    found = {}

    def dpo(kinds: list[str], rows: list[int], leaf: Any, **settings: Any) -> Any:
        me = trainer(
            loss_types=kinds,
            loss_weights=[1.0, 0.6][: len(kinds)],
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            beta=settings["beta"],
            label_smoothing=settings.get("label_smoothing", 0.0),
        )
        batch = {"completion_mask": whole[rows], "input_ids": whole[rows]}
        batch |= {"attention_mask": whole[rows]}
        half = len(rows) // 2
        batch |= {"ref_chosen_logps": reference[rows[:half]]}
        batch |= {"ref_rejected_logps": reference[rows[half:]]}
        loss = DPOTrainer._compute_loss(me, fused(leaf[rows] * mask[rows]), batch, False)
        return loss, lasts(me._metrics["train"])

    for name, settings in DPO.items():
        leaf = given["policy"].clone().requires_grad_()
        if name == "aot":
            parts = [dpo([name], [i, i + PAIRS], leaf, **settings)[0] for i in range(PAIRS)]
            found["dpo/conservative"] = outcome(sum(parts) / PAIRS, leaf)
            continue
        loss, metrics = dpo(name.split("+"), list(range(2 * PAIRS)), leaf, **settings)
        found[f"dpo/{name}"] = outcome(loss, leaf, metrics)

    kl = (given["kl_policy"].sum(1), given["kl_reference"].sum(1))
    for name, settings in KTO.items():
        leaf = given["policy"].clone().requires_grad_()
        scale = {"desirable_weight": 1.0, "undesirable_weight": 1.0} | settings
        calculated = settings["loss_type"] == "kto"
        me = trainer(beta=0.3, calculate_KL=calculated, _compute_kl_logps=lambda *_: kl[0], **scale)
        batch = {"completion_mask": whole, "input_ids": whole, "attention_mask": whole}
        batch |= {"label": given["desirable"], "ref_logps": reference, "ref_KL_logps": kl[1]}
        loss = KTOTrainer._compute_loss(me, fused(leaf * mask), batch, False)
        found[f"kto/{name}"] = outcome(loss, leaf, lasts(me._metrics["train"]))
    return found


def reference_free(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcomes of CPOTrainer (CPO, SimPO) and ORPOTrainer; `grad` is of `logits`."""
    import torch
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    # The first token of each row is the prompt.
    attention = torch.cat([torch.ones_like(given["mask"][:, :1]), given["mask"]], 1).long()
    labels = torch.where(attention == 1, given["ids"], -100)
    labels[:, 0] = -100
    batch = {}
    for side, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch[f"{side}_input_ids"] = given["ids"][rows]
        batch[f"{side}_attention_mask"] = attention[rows]
        batch[f"{side}_labels"] = labels[rows]
    found = {}

    def run(kind: Any, **settings: Any) -> dict[str, Any]:
        leaf = given["logits"].clone().requires_grad_()
        me = trainer(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings)
        for method in ("concatenated_forward", "concatenated_inputs", "get_batch_logps"):
            member = kind.__dict__[method]
            static = isinstance(member, staticmethod)
            setattr(me, method, member.__func__ if static else member.__get__(me))
        for method in ("cpo_loss", "odds_ratio_loss"):
            if method in kind.__dict__:
                setattr(me, method, kind.__dict__[method].__get__(me))
        model = lambda *_, **__: SimpleNamespace(logits=leaf)  # noqa: E731
        loss, metrics = kind.get_batch_loss_metrics(me, model, batch)
        return outcome(loss, leaf, lasts({name: [value] for name, value in metrics.items()}))

    for name, settings in CPO.items():
        settings = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0} | settings
        found[name] = run(CPOTrainer, **settings)
    found["orpo"] = run(ORPOTrainer, beta=0.4)
    return found


def rewards(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcomes of RewardTrainer; `grad` is of `scores`."""
    import torch
    from trl.trainer.reward_trainer import RewardTrainer

    found = {}
    for name, settings in REWARD.items():
        leaf = given["scores"].clone().requires_grad_()
        me = trainer(args=SimpleNamespace(center_rewards_coefficient=settings.get("center")))
        batch = {"attention_mask": torch.ones(2, 2)}
        if settings.get("margin"):
            batch["margin"] = given["margins"]
        model = lambda **_: SimpleNamespace(logits=leaf[:, None])  # noqa: B023, E731
        loss = RewardTrainer.compute_loss(me, model, batch)
        found[f"reward/{name}"] = outcome(loss, leaf, lasts(me._metrics["train"]))
    return found


def policies(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcomes of GRPOTrainer and RLOOTrainer; `grad` is of `policy`."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    mask, found = given["mask"], {}
    batch = {
        "prompt_ids": mask[:, :1].long(),
        "prompt_mask": mask[:, :1].long(),
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": given["advantages"],
        "old_per_token_logps": given["old"],
        "old_logps": (given["old"] * mask).sum(1),
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(),
    }

    def run(kind: Any, **settings: Any) -> dict[str, Any]:
        leaf = given["policy"].clone().requires_grad_()
        me = trainer(
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=MAX_LENGTH,
            _entropy_bonus_enabled=False,
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                leaf,
                torch.zeros_like(leaf),
                None,
            ),
            **settings,
        )
        loss = kind._compute_loss(me, None, batch)
        return outcome(loss, leaf, lasts(me._metrics["train"]))

    for name, settings in GRPO.items():
        settings = PLAIN | settings
        args = SimpleNamespace(
            delta=settings.pop("delta"),
            use_bias_correction_kl=settings.pop("corrected", False),
            steps_per_generation=1,
        )
        level = settings.pop("level")
        settings |= {"args": args, "importance_sampling_level": level}
        found[f"grpo/{name}"] = run(GRPOTrainer, **settings)
    found["rloo"] = run(RLOOTrainer, epsilon_low=0.2, epsilon_high=0.2)
    return found


class Answering(SimpleNamespace):
    """Answers None to what was not set: the switches that are off."""

    def __getattr__(self, name: str) -> None:
        return None


def group_advantages(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the advantages of GRPOTrainer and RLOOTrainer, by their settings."""
    import torch
    from trl.trainer import grpo_trainer, rloo_trainer

    table = given["rewards"]
    count, n = table.numel(), table.shape[1]
    ids = [[1, 2]] * count

    def run(module: Any, kind: Any, generated: tuple, **settings: Any) -> list[list[float]]:
        same = lambda x, *_, **__: x  # noqa: E731
        before = module.gather, module.gather_object
        module.gather, module.gather_object = same, same
        me = Answering(
            **vars(trainer()),
            _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
            _pending_extra_logs={},
            _pending_metrics={},
            _tokenizer=SimpleNamespace(pad_token_id=0),
            _generate=lambda *_: generated,
            _get_per_token_logps_and_entropies=lambda *_, **__: (torch.zeros(count, 2), None, None),
            _calculate_rewards=lambda *_: table.reshape(-1, 1).clone(),
            args=SimpleNamespace(
                steps_per_generation=1,
                per_device_train_batch_size=count,
                gradient_checkpointing_kwargs=None,
                gradient_checkpointing=False,
            ),
            num_generations=n,
            num_iterations=1,
            current_gradient_accumulation_steps=1,
            beta=0.0,
            eos_token_ids=[0],
            reward_weights=torch.ones(1),
            reward_funcs=[None],
            reward_func_names=["given"],
            multi_objective_aggregation="sum_then_normalize",
            **settings,
        )
        me.args.gradient_accumulation_steps = 1
        me.model.is_gradient_checkpointing = False
        try:
            out = kind._generate_and_score_completions(me, [{"prompt": "p"}] * count)
        finally:
            module.gather, module.gather_object = before
        return out["advantages"].reshape(table.shape).tolist()

    grpo = (ids, ids, None, ids, None, {}, None, [[]] * count)
    found = {}
    for scale in ("group", "none", "batch"):
        kind = grpo_trainer.GRPOTrainer
        found[f"advantages/{scale}"] = run(grpo_trainer, kind, grpo, scale_rewards=scale)
    for normalised in (False, True):
        name = "advantages/rloo" + "_normalised" * normalised
        kind, settings = rloo_trainer.RLOOTrainer, {"normalize_advantages": normalised}
        found[name] = run(rloo_trainer, kind, (ids, ids, ids), **settings)
    return found


def divergences(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the outcomes of GKDTrainer's loss; `grad` is of `logits`."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    labels = given["mask"].long() - 1
    labels = labels.masked_fill(labels < 0, -100)
    found = {}
    for name, (beta, temperature) in GKD.items():
        leaf = given["logits"].clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(
            leaf[:, 1:], given["teacher_logits"][:, 1:], labels, beta, temperature
        )
        found[f"gkd/{name}"] = outcome(loss, leaf)
    return found


def outcomes() -> dict[str, Any]:
    """Returns what TRL makes of `inputs()`: name → {loss, grad, metrics}, or advantages."""
    import torch
    from trl.rewards import get_soft_overlong_punishment

    torch.set_num_threads(1)
    given = {
        name: torch.tensor(rows, dtype=torch.long if name == "ids" else torch.float64)
        for name, rows in inputs().items()
    }
    punish = get_soft_overlong_punishment(OVERLONG["limit"], OVERLONG["cache"])
    return {
        **preference(given),
        **reference_free(given),
        **rewards(given),
        **policies(given),
        **group_advantages(given),
        **divergences(given),
        "overlong": punish([[0] * n for n in OVERLONG["lengths"]]),
    }


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference of two nests of numbers; infinite where their keys differ."""
    if isinstance(a, dict):
        if set(a) != set(b):
            return float("inf")
        return max((distance(a[k], b[k]) for k in a), default=0.0)
    return float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)), initial=0.0))


def main() -> int:
    """Writes the goldens, or compares them with a new run; 1 if a number is off by over 1e-9."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    found = outcomes()
    if parser.parse_args().write:
        report = {"versions": {name: version(name) for name in LIBRARIES}}
        report |= {"inputs": inputs(), "outcomes": found}
        FILE.write_text(json.dumps(report, indent=None, separators=(",", ":")) + "\n")
        return 0
    golden = json.loads(FILE.read_text())["outcomes"]
    for name in golden:
        print(f"{name:24} {distance(golden[name], found[name]):.1e}")
    return int(distance(golden, found) > 1e-9)


if __name__ == "__main__":
    raise SystemExit(main())
