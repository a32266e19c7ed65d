"""The network of a run: created by its name, filled with weights, given a head to probe it, and tried on one image."""
