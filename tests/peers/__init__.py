"""The PyTorch stack at the same work, timed beside ours; see README.md."""
