"""The processes of a run: one, or those that torchrun or Slurm started."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from ...errors import RunStopped, UserError, first_line


class Arrival:
    """Numbers on their way from the device to the host, that the device need not wait for.

    Args:
        values: float tensor of shape (n,).
    """

    def __init__(self, values: Tensor):
        self._values, self._event = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Wait until the device has computed them: not for what was launched after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


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

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum(int(value)) > 0

    def all_reduce(self, values: Tensor) -> Arrival:
        """The sums of float tensors (n,) over all processes; not a number where it is so in one of them."""
        if self.is_distributed:
            dist.all_reduce(values)
        return Arrival(values)

    def all_gather(self, value: Any) -> list[Any]:
        """The objects of all processes, by rank, in each of them."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's object, in each of them."""
        return self.all_gather(value)[0]

    def wait(self) -> None:
        """Wait until every process is here, so that what the first one wrote is on the disk."""
        if self.is_distributed:
            dist.barrier()


def first_exception(world: World, error: BaseException | None) -> str | None:
    """What went wrong in the first process where something did, or None; all processes must call this."""
    messages: Sequence[str | None] = world.all_gather(None if error is None else str(error) or type(error).__name__)
    return next((message for message in messages if message is not None), None)


def join_world(device: str, needs_group: bool = False) -> World:
    """Choose the device and, under torchrun or Slurm, join the process group (NCCL on CUDA, else Gloo).

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        needs_group: form a group even of a single process, as sharded models need.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    check_environment()
    try:
        joined = init_distributed_device_so(device, dist_url=_meeting_point())
    except (dist.DistError, ValueError) as error:
        raise RunStopped(f"the processes cannot find each other: {first_line(error)}") from error
    if needs_group and not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(torch.device(joined["device"]), joined["global_rank"], joined["local_rank"], joined["world_size"])


_COUNTERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def check_environment() -> None:
    """Refuse variables that torchrun sets and that cannot be its own.

    Raises:
        UserError: one is no number, a rank is not below its number of processes, or one is missing.
    """
    numbers = {name: os.environ[name] for name in _COUNTERS if name in os.environ}
    for name, text in numbers.items():
        if not text.isdecimal():
            raise UserError(f"the environment variable {name} is {text!r}: expected a number, as torchrun sets it")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and int(numbers[rank]) >= int(numbers[size]):
            raise UserError(
                f"the environment variables {rank}={numbers[rank]} and {size}={numbers[size]} contradict each other: "
                f"{rank} counts from 0; start the processes with torchrun"
            )
    if int(numbers.get("WORLD_SIZE", 1)) > 1 and "SLURM_PROCID" not in os.environ:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment variable WORLD_SIZE is {numbers['WORLD_SIZE']}, but {', '.join(missing)} is not set: "
                "start the processes with torchrun, or unset WORLD_SIZE"
            )


def _meeting_point() -> str:
    """The URL through which the processes find each other.

    torchrun's store outlives a restart, with the addresses of the dead processes in it; on one machine a prefix tells
    the attempts apart. The machines of a larger run count their restarts separately: there torchrun must make a new
    store for each attempt (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    if not is_restarted() or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return "env://"
    dist.register_rendezvous_handler("restarted", _rendezvous_after_restart)
    return "restarted://"


def _rendezvous_after_restart(_: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    for store, rank, size in dist.rendezvous("env://", **options):
        yield dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), rank, size


def is_restarted() -> bool:
    """Whether torchrun started this process again after one of the run's processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
