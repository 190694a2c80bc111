"""Checks against vLLM itself, of what `tests/rl/serving.py` pretends.

They are skipped unless `JAXTUNE_VLLM` names a Python that has vLLM, in an environment of its own
(`docs/rollouts.md` says how to make one). Continuous integration never runs them.
"""
