"""Evaluation: accuracy of a checkpoint, throughput, and the picture of a run."""
