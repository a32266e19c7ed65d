"""FSDP2: weights, gradients and optimizer state in shards, block by block, and between shards and full tensors.

Sharding is torch's (``fully_shard``), and so are sharded checkpoints (``torch.distributed.checkpoint``). What
``torch.distributed.checkpoint.state_dict`` offers besides was held against what stands here, and is not taken:

- ``get_optimizer_state_dict`` names states by parameter, where a ``trainer.pt`` holds ``optimizer.state_dict()`` as
  every run has it, so that runs with and without shards go on from each other's. Before the first update it also
  makes one, of zero gradients, which counts as a step that nobody made.
- ``set_model_state_dict(broadcast_from_rank0=True)`` fills what a state dict holds: buffers that are not persistent,
  such as index tables, would keep what ``to_empty`` left in them. :func:`broadcast_from_first` fills all.
- A full state dict of weights on the CPU is what :func:`full_tensors` makes, which the optimizer needs anyway.

The reader of shards is torch's with its unpickling restricted to the types of metadata.
"""

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from .world import World


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, such as transformer layers; none contains another.

    A block's type is that of the members of a list two of which have parameters of the same shapes; stages, which
    differ in width, are passed by. Where no list has such members, two of the same type will do.
    """
    for has_twins in (_has_equal_shapes, _has_equal_types):
        lists = _outermost(model, has_twins)
        if lists:
            types = {type(member) for each in lists for member in _members(each)}
            return _outermost(model, lambda module, types=types: type(module) in types)
    return []


def _outermost(module: nn.Module, fits: Callable[[nn.Module], bool]) -> list[nn.Module]:
    if fits(module):
        return [module]
    return [found for child in module.children() for found in _outermost(child, fits)]


def _members(module: nn.Module) -> list[nn.Module]:
    """What a list holds, besides single layers and further lists."""
    lists = (nn.ModuleList, nn.Sequential)
    if not isinstance(module, lists):
        return []
    return [child for child in module.children() if type(child) not in lists and any(True for _ in child.children())]


def _has_equal_shapes(module: nn.Module) -> bool:
    shapes = [tuple(parameter.shape for parameter in member.parameters()) for member in _members(module)]
    return len(shapes) != len(set(shapes))


def _has_equal_types(module: nn.Module) -> bool:
    types = [type(member) for member in _members(module)]
    return len(types) != len(set(types))


def shard(model: nn.Module, world: World) -> None:
    """Turn a model's parameters into shards in place: one group of each block, and one of the rest."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class ShardedTask(ClassificationTask):
    """Classification whose model, and moving average, are sharded with FSDP2.

    Args:
        model: on the meta device, or a complete model, the same in each process.
        source: in the first process, the model whose weights and buffers a model on the meta device takes over.
        world: the processes.
        options: see :class:`timm.task.ClassificationTask`.
    """

    def __init__(self, model: nn.Module, source: nn.Module | None, world: World, **options: Any):
        super().__init__(model, device=world.device, verbose=False, **options)
        self.source, self.world = source, world

    def setup_ema(self, **options: Any) -> nn.Module:
        """A moving average that is sharded like the model."""
        # Around a stand-in: ModelEmaV3 copies the model to its device, and this one may have none yet.
        average = ModelEmaV3(nn.Linear(1, 1, device=self.world.device), **options)
        average.module = deepcopy(self.trainable_module).eval()
        self.trainable_module_ema = average
        return average

    def compile(self, **options: Any) -> nn.Module:
        """Compile each block: the gathering of weights between them stays outside."""
        for block in find_blocks(self.trainable_module):
            block.compile(**options)
        return self.trainable_module

    def prepare_distributed(self, device_ids: list | None = None, **_: Any) -> "ShardedTask":
        """Shard, and fill what was on the meta device."""
        average = self.get_trainable_module(ema=True)
        models = [self.trainable_module, *([average.module] if average is not None else [])]
        is_meta = next(self.trainable_module.parameters()).is_meta
        for model in models:
            shard(model, self.world)
            if is_meta:
                model.to_empty(device=self.world.device)
                broadcast_from_first(model, self.source, self.world)
        self.source = None
        return self

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients to this process, for accumulation."""
        self.trainable_module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.trainable_module.set_requires_gradient_sync(True)


def is_whole_on_meta(model: nn.Module) -> bool:
    """Whether everything that a model holds was built on the meta device and can be filled by name.

    A tensor kept as a plain attribute could not.
    """
    plain = (value for module in model.modules() for value in vars(module).values())
    return not any(isinstance(value, Tensor) and value.is_meta for value in plain)


@torch.no_grad()
def broadcast_from_first(model: nn.Module, source: nn.Module | None, world: World) -> None:
    """Fill parameters and buffers, one by one, with those of the first process's ``source``."""
    values = {} if source is None else dict([*source.named_parameters(), *source.named_buffers()])
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        full = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        if world.is_primary:
            full.copy_(values[name])
        if dist.get_world_size() > 1:
            dist.broadcast(full, 0)
        target.copy_(shard_like(target, full))


def shard_like(target: Tensor, full: Tensor) -> Tensor:
    """A full tensor, the same in each process, laid out like ``target``."""
    if not isinstance(target, DTensor):
        return full
    full = full.to(target.device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def full_tensors(tree: Any, keep: bool) -> Any:
    """The same nested structure with full tensors on the CPU for shards; all processes call this together.

    Args:
        keep: False leaves the tensors out, in processes that only help to put them together.
    """
    if isinstance(tree, dict):
        return {key: full_tensors(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_tensors(value, keep) for value in tree)
    if isinstance(tree, DTensor):
        full = tree.detach().full_tensor()
        return full.cpu() if keep else None
    return tree


@torch.no_grad()
def load_full_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict of full tensors into a model that may be sharded."""
    targets = model.state_dict()
    model.load_state_dict(
        {name: shard_like(targets[name], full) if name in targets else full for name, full in tensors.items()}
    )


def shard_optimizer_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state dict of full tensors, laid out like its parameters.

    Args:
        state: with parameters by number, as ``optimizer.state_dict()`` has them.
        parameters: of the optimizer, in that order.
    """
    entries = {
        number: {key: _shard_of_state(parameters[number], value) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _shard_of_state(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape == parameter.shape:
        return shard_like(parameter, value)
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, src_data_rank=None)


def take_out_shards(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """Split an optimizer's state dict into small values and shards by name; markers stand in the places of the latter.

    Returns:
        The state dict with ``{"shard": name, "shape": [...], "dtype": "float32"}`` for shards, and the shards.
    """
    shards: dict[str, DTensor] = {}
    entries = {}
    for number, entry in state["state"].items():
        entries[number] = dict(entry)
        for key, value in entry.items():
            if isinstance(value, DTensor):
                name = f"optimizer.{number}.{key}"
                shards[name] = value
                dtype = str(value.dtype).removeprefix("torch.")
                entries[number][key] = {"shard": name, "shape": list(value.shape), "dtype": dtype}
    return {**state, "state": entries}, shards


def empty_shards(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """The state dict of :func:`take_out_shards` with empty shards for the markers, to be read into."""

    def fill(number: int, value: Any) -> Any:
        if not isinstance(value, dict) or "shard" not in value:
            return value
        full = torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]))
        return _shard_of_state(parameters[number], full)

    entries = {
        number: {key: fill(number, value) for key, value in entry.items()} for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write each process's shards with torch.distributed.checkpoint; all processes call this together.

    Raises:
        OSError: in all processes, where one could not write.
    """
    try:
        dcp.save(tensors, checkpoint_id=str(folder))
    except CheckpointException as error:
        raise OSError(_first_failure(error)) from error


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into tensors of any number of processes what :func:`save_shards` wrote; all call this together.

    Raises:
        ValueError: in all processes, where one could not read, or the folder holds anything but tensors.
    """
    try:
        dcp.load(tensors, storage_reader=_TensorReader(folder))
    except CheckpointException as error:
        raise ValueError(_first_failure(error)) from error


def _first_failure(error: CheckpointException) -> str:
    (cause, _), *_ = error.failures.values()
    return str(cause)


class _TensorReader(dcp.FileSystemReader):
    """Reads tensors only, and runs no code that a file names: torch's own reader unpickles whatever it finds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        # Entries of other kinds would be unpickled without limits when they are read.
        if not isinstance(metadata, Metadata) or not all(
            isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()
        ):
            raise ValueError(f"{self.path}: holds entries that are not tensors")
        paths = [Path(str(place.relative_path)) for place in (metadata.storage_data or {}).values()]
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ValueError(f"{self.path}: names files that lie elsewhere")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle._Unpickler):
    """Knows the types of which checkpoint metadata of tensors consists, and no others.

    In Python, because the C version cannot be told to leave attributes alone: a pickle may set those of whatever it
    can name, classes and functions of torch among them.
    """

    ALLOWED = {  # noqa: RUF012
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "dtype", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise ValueError(f"checkpoint metadata names {module}.{name}, which is none of its types")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Fill an object: only one of the metadata's own, with its own fields."""
        instance, state = self.stack[-2:]
        fields = {field.name for field in dataclasses.fields(instance)} if _is_entry(instance) else set()
        # A mapping of fields, or what TensorProperties makes of itself.
        is_own = isinstance(state, dict) and state.keys() <= fields
        if not fields or not (is_own or (isinstance(state, tuple) and hasattr(instance, "__setstate__"))):
            raise ValueError(f"checkpoint metadata sets attributes of {instance!r:.80}, which it may not")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012


def _is_entry(instance: Any) -> bool:
    return not isinstance(instance, type) and dataclasses.is_dataclass(instance)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether this process's shards, or full tensors, hold only finite numbers."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return all(bool(torch.isfinite(tensor).all()) for tensor in local if tensor.is_floating_point())


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which a model is sharded, or None."""
    shards = (parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    return next((shard.device_mesh for shard in shards), None)
