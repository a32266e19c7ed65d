"""Shared set-up: two test processes share two cores, so each keeps to one thread."""

import torch

torch.set_num_threads(1)
