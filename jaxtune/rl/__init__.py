"""Online reinforcement learning: rollouts, rewards, and the loops around the step."""
