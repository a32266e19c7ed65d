"""The processes of a run: one, or those that torchrun or Slurm started."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from .errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def sum(self, value: int) -> int:
        """The sum of an integer over all processes."""
        if not self.is_distributed:
            return value
        total = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if not self.is_distributed:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def wait(self) -> None:
        """Wait until every process is here, so that what the first one wrote is on the disk."""
        if self.is_distributed:
            dist.barrier()


def join_world(device: str) -> World:
    """Choose the device and, under torchrun or Slurm, join the process group (NCCL on CUDA, else Gloo).

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    joined = init_distributed_device_so(device)
    return World(torch.device(joined["device"]), joined["global_rank"], joined["local_rank"], joined["world_size"])


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
