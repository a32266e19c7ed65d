"""The golden figures: official outputs and gradients for deterministic weights, and the rule that makes those weights.

Each `tests/golden/<family>/<variant>.json` lists an official network's keys, shapes and figures; the logits lie beside
it as safetensors. They were made once from the official code in float32.
"""

import json
import math
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

import vicinal.zoo  # noqa: F401

FOLDER = Path(__file__).parent.parent / "golden"
# What a network is built with where a recorded input needs one of other parameters.
OPTIONS = {"distill": {"distilled": True}, "img256": {"img_size": 256}, "img256x320": {"img_size": (256, 320)}}
# The same for inputs that were recorded in another mode of the network, with the parameters that it has anyway.
MODES = {"det_interpolation_256x320": {"position_bias": "interpolated"}}


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that an official key of this shape has in every golden run."""
    generator = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    values = generator.standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        values = 1 + np.float32(0.1) * np.abs(values)
    elif key.endswith("running_mean"):
        values = np.float32(0.1) * values
    elif len(shape) >= 2:
        values = values / np.float32(math.sqrt(math.prod(shape[1:])))
    elif len(shape) == 1 and key.endswith("weight"):
        values = 1 + np.float32(0.1) * values
    else:
        values = np.float32(0.1) * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


class Golden:
    """One variant's golden file.

    Attributes:
        name: registered name of our model.
        model_args: what our model of that name is built with, where the variant is none of its own.
        shapes: official keys and shapes, in official order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.variant = path.stem.removesuffix("_timm_shapes").removesuffix("_tf_224")
        self.data = json.loads(path.read_text())
        name, _, alpha = self.variant.partition("_alpha")
        # timm owns the names of some variants; ours have the suffix
        ours = model_entrypoint(name.lower()).__module__.startswith("vicinal.") if is_model(name.lower()) else False
        self.name = name.lower() if ours else f"{name.lower()}_vicinal"
        self.model_args = {"alpha": float(alpha)} if alpha else {}
        self.shapes = {key: tuple(shape) for key, shape, *_ in self.data["keys"]}
        self.dtypes = {key: dtype for key, _, dtype, *_ in self.data["keys"]}

    def __repr__(self) -> str:
        return self.path.stem

    def state_dict(self, tag: str = "default") -> dict[str, Tensor]:
        """Official state dict with the golden weights, of the network for one input; integer buffers are zeros."""
        shapes = {**self.shapes, **self._differences(tag)}
        return {
            key: fill(key, shape) * self.gain(key)
            if self.dtypes.get(key, _dtype(key)) == "float32"
            else torch.zeros(shape, dtype=torch.int64)
            for key, shape in shapes.items()
        }

    def gain(self, key: str) -> float:
        """Factor on the filled weight: without it the plain fill decays over the SiLU networks of HaloNet's kind."""
        return 1.3 if "x1.3" in self.data.get("fill", "") and key.endswith(".conv.weight") else 1.0

    def options(self, tag: str) -> dict[str, object]:
        """What our network for one input is built with."""
        options = OPTIONS[tag] if self._differences(tag) else MODES.get(tag, {})
        return {**self.model_args, **options}

    def _differences(self, tag: str) -> dict[str, tuple[int, ...]]:
        return {key: tuple(shape) for key, shape in self.data.get("input_key_diffs", {}).get(tag, [])}

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """Official logits by the tag of their input."""
        tensors = load_file(self.path.with_suffix(".safetensors"))
        return {key.removeprefix("logits_"): value for key, value in tensors.items()}

    def image(self, tag: str) -> Tensor:
        """The input of a golden run."""
        values = np.random.RandomState(0).standard_normal(self.data["inputs"][tag])
        return torch.from_numpy(values.astype(np.float32))


def _dtype(key: str) -> str:
    return "int64" if key.endswith("num_batches_tracked") else "float32"


def probe(x: Tensor) -> Tensor:
    """The 64 elements of a feature map that the golden files record."""
    flat = x.contiguous().flatten()
    return flat[torch.from_numpy(np.random.RandomState(1).randint(0, flat.numel(), size=64))]


def gradient_norms(model: nn.Module, image: Tensor) -> tuple[float, dict[str, float]]:
    """Loss and gradient norms of the golden gradient probe, by parameter name. The model must be in train mode."""
    logits = model(image)
    direction = np.random.RandomState(2).standard_normal(tuple(logits.shape)).astype(np.float32)
    loss = (logits * torch.from_numpy(direction)).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad.double().norm().item() for name, parameter in model.named_parameters()}


def list_golden(*families: str) -> list[Golden]:
    """Golden files of some families, all variants."""
    return [Golden(path) for family in families for path in sorted((FOLDER / family).glob("*.json"))]
