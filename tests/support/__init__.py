"""What several tests share: checkpoints to make, servers to ask, programs to run."""
