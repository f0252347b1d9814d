"""Training: objective, optimizer, train step, sharding, checkpoints, metrics and the loop."""
