"""timm's models with our operators inside, against the same models as timm builds them."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.models.byobnet import ByoBlockCfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import get_graph_node_names

from vicinal.zoo import accelerate


@dataclass(frozen=True)
class Case:
    """A small network of one of timm's architectures.

    Attributes:
        name: of timm's model.
        options: what makes it small.
        size: height and width of its images.
        calls: operators of a forward pass.
        left: classes of the attention that stays timm's.
    """

    name: str
    options: dict[str, Any]
    size: tuple[int, int]
    calls: int
    left: set[str] = field(default_factory=set)


def swin(size: tuple[int, int], calls: int = 4, **options: Any) -> Case:
    small = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "img_size": size}
    return Case("swin_tiny_patch4_window7_224", {**small, **options}, size, calls)


def maxxvit(name: str, blocks: tuple[str, ...], calls: int, size: tuple[int, int] = (64, 64), **options: Any) -> Case:
    small = {"embed_dim": (32, 32, 64)[-len(blocks) :], "depths": (1,) * len(blocks), "stem_width": 16}
    return Case(name, {**small, "block_type": blocks, "img_size": size, **options}, size, calls)


def davit(size: tuple[int, int], left: str, **options: Any) -> Case:
    return Case(
        "davit_tiny", {"embed_dims": (32, 64), "depths": (1, 1), "num_heads": (1, 2), **options}, size, 2, {left}
    )


def halonet(calls: int, left: set[str], *attention: str, **halo: Any) -> Case:
    arguments = {"halo": halo, "lambda": {}, "bottleneck": {}}
    blocks = [
        ByoBlockCfg("self_attn", d=1, c=32, s=2, br=0.5, self_attn_layer=layer, self_attn_kwargs=arguments[layer])
        for layer in attention
    ]
    options = {"blocks": tuple(blocks), "stem_chs": 16, "num_features": 0, "img_size": 64}
    return Case("halonet26t", options, (64, 64), calls, left)


CASES = {
    "swin": swin((56, 56), window_size=7),
    "swin_padded": swin((60, 44)),
    "swin_wide_heads": swin((48, 64), head_dim=12),
    "swin_any_size": swin((72, 40), strict_img_size=False),
    # one window covers the map and is shifted nevertheless
    "swin_always_partition": swin((28, 28), window_size=7, always_partition=True),
    "maxvit_tf": maxxvit("maxvit_tiny_tf_224", ("M", "M"), 4),
    "maxvit_rw": maxxvit("maxvit_pico_rw_256", ("M", "M"), 4, (64, 96)),
    "maxvit_rmlp": maxxvit("maxvit_rmlp_pico_rw_256", ("M", "M"), 4),
    "maxvit_nchw": maxxvit("maxvit_rmlp_pico_rw_256", ("M", "M"), 4, transformer_use_nchw_attn=True),
    "maxvit_parallel": maxxvit("maxvit_tiny_pm_256", ("PM", "PM"), 4),
    "maxxvit": maxxvit("maxxvit_rmlp_nano_rw_256", ("M", "M"), 4),
    "coatnet": maxxvit("coatnet_0_rw_224", ("C", "T", "T"), 2),
    "coatnet_rmlp": maxxvit("coatnet_rmlp_nano_rw_224", ("C", "T", "T"), 2, (64, 96)),
    "davit": davit((56, 56), "ChannelAttention"),
    "davit_padded": davit((75, 90), "ChannelAttentionV2", channel_attn_v2=True),
    "convit": Case(
        "convit_tiny",
        {"img_size": 64, "depth": 3, "local_up_to_layer": 2, "embed_dim": 12},
        (64, 64),
        2,
        {"MHSA"},
    ),
    "halonet": halonet(2, set(), "halo", "halo", block_size=4, halo_size=1, num_heads=2),
    "halonet_odd_block": halonet(
        2, set(), "halo", "halo", block_size=1, halo_size=2, num_heads=2, scale_pos_embed=True
    ),
    "halonet_hybrid": halonet(
        1, {"LambdaLayer", "BottleneckAttn"}, "halo", "lambda", "bottleneck", block_size=4, num_heads=2
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def create(case: Case, **options: Any) -> nn.Module:
    """timm's network in float64 with every branch and every bias at work, as training would leave it."""
    torch.manual_seed(0)
    model = timm.create_model(case.name, num_classes=5, **case.options, **options)
    for name, parameter in model.named_parameters():
        if not parameter.any() or name.endswith(("gamma", "bias_table", "gating_param")):
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.5)
    return model.eval().double()


def image(case: Case, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *case.size, generator=torch.Generator().manual_seed(1)).double()


def assert_same(ours: nn.Module, theirs: nn.Module, batch: Tensor) -> None:
    """Logits and the gradient of every parameter, with the same random numbers."""
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        logits = model(batch)
        results.append((logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    (actual, gradients), (expected, references) = results
    # float64 rounds to 1e-16 in sums of other orders; attention that is nearly one-hot loses some digits of gradients
    assert (actual - expected).abs().max() <= 1e-10 * expected.std()
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - reference).abs().max() <= 1e-9 * reference.abs().max() + 1e-12


class OperatorCalls(TorchDispatchMode):
    """Counts the operators of ours that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "vicinal"
        return func(*args, **(kwargs or {}))


@cases
def test_numbers_names_and_operators(case: Case):
    theirs = create(case)
    ours = copy.deepcopy(theirs)
    before = dict(ours.named_parameters())
    acceleration = accelerate(ours)
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert set(acceleration.left.values()) == case.left
    assert_same(ours, theirs, image(case))
    with torch.no_grad(), OperatorCalls() as calls:
        ours(image(case))
    assert calls.count == case.calls


@cases
def test_training_with_the_same_random_numbers(case: Case):
    theirs = create(case, drop_path_rate=0.2).train()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert_same(ours, theirs, image(case, 4))


@pytest.mark.parametrize("name", ["swin", "maxvit_tf", "maxvit_nchw", "maxvit_parallel", "coatnet", "convit"])
def test_attention_dropout_in_training_is_timms(name: str):
    case = CASES[name]
    option = "transformer_attn_drop" if case.name.startswith(("maxvit", "coatnet")) else "attn_drop_rate"
    theirs = create(case, **{option: 0.3}).train()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert_same(ours, theirs, image(case))
    with torch.no_grad(), OperatorCalls() as calls:
        ours(image(case))
        assert calls.count == 0
        ours.eval()(image(case))
        assert calls.count == case.calls


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("swin", {"img_size": (72, 100), "window_size": (4, 5)}, (72, 100)),
        ("swin_any_size", {"img_size": (40, 64), "window_size": 3}, (40, 64)),
        ("maxvit_tf", {"img_size": (96, 128)}, (96, 128)),
        ("maxvit_rmlp", {"img_size": (96, 128)}, (96, 128)),
        ("maxvit_parallel", {"img_size": 96}, (96, 96)),
        ("coatnet", {"img_size": (96, 64)}, (96, 64)),
        ("coatnet_rmlp", {"img_size": (32, 64)}, (32, 64)),
    ],
)
def test_set_input_size_afterwards(name: str, options: dict[str, Any], size: tuple[int, int]):
    case = CASES[name]
    theirs = create(case)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (ours, theirs):
        model.set_input_size(**options)
    assert_same(ours, theirs, image(Case(name, {}, size, 0)))


@pytest.mark.parametrize("size", [(64, 64), (36, 52), (16, 40), (12, 16)])
def test_swin_of_changing_sizes(size: tuple[int, int]):
    theirs = create(CASES["swin_any_size"])
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert_same(ours, theirs, image(Case("", {}, size, 0)))


def test_convit_of_changing_sizes_keeps_timms_coordinates():
    theirs = create(CASES["convit"])
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    tokens = torch.randn(2, 25, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours(image(CASES["convit"]))
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            actual = ours.to(dtype).blocks[0](tokens.to(dtype))
            expected = theirs.to(dtype).blocks[0](tokens.to(dtype))
            assert (actual - expected).abs().max() <= tolerance * expected.std()


# The others take the same paths, and compiling is slow.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if name in ("swin_padded", "maxvit_nchw", "convit") else pytest.mark.slow)
        for name, case in CASES.items()
    ],
    ids=CASES,
)
def test_compiles_without_graph_breaks(case: Case):
    torch._dynamo.reset()
    ours = create(case)
    accelerate(ours)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    assert_same(compiled, ours, image(case))


@cases
def test_traces_with_fx(case: Case):
    ours = create(case)
    accelerate(ours)
    leaves = {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
    }
    last = get_graph_node_names(ours, tracer_kwargs=leaves)[1][-1]
    graph = create_feature_extractor(ours, {last: "logits"})
    with torch.no_grad():
        assert torch.equal(graph(image(case))["logits"], ours(image(case)))


@pytest.mark.parametrize("name", ["swin_padded", "maxvit_rmlp", "coatnet", "davit", "convit", "halonet"])
def test_single_and_half_precision(name: str):
    theirs = create(CASES[name])
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    batch = image(CASES[name]).float()
    with torch.no_grad():
        exact = theirs(batch.double())
        single, expected = ours.float()(batch), theirs.float()(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, reference = ours(batch), theirs(batch)
        half = ours.bfloat16()(batch.bfloat16())
    assert half.dtype == torch.bfloat16
    # timm's own distance from float64, thrice for other places of rounding, and the unit of rounding besides
    for actual, timms, unit in ((single, expected, 1e-6), (mixed, reference, 0.02)):
        assert (actual - exact).abs().max() <= 3 * (timms - exact).abs().max() + unit * exact.std()


def test_features_only():
    case = CASES["davit"]
    options = {**case.options, "features_only": True, "out_indices": (0, 1)}
    torch.manual_seed(0)
    theirs = timm.create_model(case.name, **options).eval().double()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    with torch.no_grad():
        for actual, expected in zip(ours(image(case)), theirs(image(case)), strict=True):
            assert (actual - expected).abs().max() <= 1e-10 * expected.std()


def test_a_second_time_changes_nothing():
    model = create(CASES["davit"])
    first, second = accelerate(model), accelerate(model)
    assert first.changed == {f"stages.{stage}.blocks.0.0": "window_attention" for stage in (0, 1)}
    assert second.changed == {}
    assert second.left == first.left


def test_unknown_attention_is_refused_by_name():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, device="meta")
    with pytest.raises(ValueError, match=r"VisionTransformer has no .* Found: Attention \(2\)\. Known, of timm: mod"):
        accelerate(model)
    with pytest.raises(ValueError, match=r"ResNet has no attention .* Found: no attention"):
        accelerate(timm.create_model("resnet18", device="meta"))


def test_classes_that_only_resemble_timms_are_left_alone():
    class OwnAttention(timm.models.swin_transformer.WindowAttention):
        """Somebody's own."""

    model = create(CASES["swin"])
    model.layers[0].blocks[1].attn.__class__ = OwnAttention
    acceleration = accelerate(model)
    assert acceleration.left == {"layers.0.blocks.1.attn": "OwnAttention"}
    assert len(acceleration.changed) == 3


@pytest.mark.parametrize("keeps_the_old_method", [False, True])
def test_a_timm_that_renamed_the_method_is_refused(monkeypatch: pytest.MonkeyPatch, keeps_the_old_method: bool):
    """Its forward would go on with its own computation, and nothing would have become faster."""
    model = create(CASES["swin"])
    block = timm.models.swin_transformer.SwinTransformerBlock
    monkeypatch.setattr(block, "_attention", block._attn, raising=False)
    monkeypatch.setattr(block, "forward", lambda self, x: x + self._attention(self.norm1(x)))
    if not keeps_the_old_method:
        monkeypatch.delattr(block, "_attn")
    with pytest.raises(RuntimeError, match=rf"SwinTransformerBlock of timm {timm.__version__} .* by _attn\(\), which"):
        accelerate(model)
    assert type(model.layers[0].blocks[0]) is block


def test_a_method_that_is_called_by_another_is_found(monkeypatch: pytest.MonkeyPatch):
    block = timm.models.swin_transformer.SwinTransformerBlock
    forward = block.forward
    monkeypatch.setattr(block, "run", forward, raising=False)
    monkeypatch.setattr(block, "forward", lambda self, x: self.run(x))
    assert len(accelerate(create(CASES["swin"])).changed) == 4
