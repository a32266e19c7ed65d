"""What we take from private modules of other libraries does what we take it for; an upgrade fails here by name."""

import inspect
import json
import re
from pathlib import Path

import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from vicinal import timm_internals, torch_internals


def test_timms_index_rule_of_features():
    assert timm_internals.feature_take_indices(4, 2) == ([2, 3], 3)
    assert timm_internals.feature_take_indices(4, [0, -2]) == ([0, 2], 2)
    assert timm_internals.feature_take_indices(4, None) == ([0, 1, 2, 3], 3)


def test_timms_getter_of_features_gives_nchw_maps():
    model = timm.create_model("test_convnext").eval()
    getter = timm_internals.FeatureGetterNet(model, out_indices=(0, 2))
    maps = getter(torch.zeros(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == getter.feature_info.channels()
    assert getter.model is model


def test_timms_record_of_a_new_input_size():
    model = timm.create_model("test_vit")
    timm_internals.update_model_input_size(model, (96, 128))
    assert model._model_args["img_size"] == (96, 128)


def test_timms_groups_by_a_matcher():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    matcher = {"stem": r"^0", "blocks": [(r"^(\d)", None)]}
    groups = timm_internals.group_with_matcher(model.named_parameters(), matcher, reverse=True)
    assert groups == {"0.weight": 0, "1.weight": 1, "2.weight": 2}


def test_timms_writer_of_a_hub_config(tmp_path: Path):
    timm_internals.save_config_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_vit", 3)


def test_nothing_else_of_ours_reads_timms_private_modules():
    root = Path(inspect.getfile(timm_internals)).parent
    rooms = ("zoo", "train", "eval", "checkpoints", "kernels")
    readers = [path for room in rooms for path in (root / room).rglob("*.py") if "timm.models._" in path.read_text()]
    assert readers == []


def test_torchs_schema_of_an_operator():
    found = torch_internals.arguments_of_schema(torch.ops.aten.relu.default)
    assert [(argument.name, str(argument.type), argument.has_default_value()) for argument in found] == [
        ("self", "Tensor", False)
    ]
    last = torch_internals.arguments_of_schema(torch.ops.aten.add.Tensor)[-1]
    assert (last.name, last.default_value) == ("alpha", 1)


def test_torchs_guard_passes_autocast_by():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with torch_internals.excluding("AutocastCPU"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_torchs_way_below_autograd():
    library = torch.library.Library("vicinal_internals", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    op, keysets = torch.ops.vicinal_internals.double.default, []

    def at_autograd(keyset: torch_internals.DispatchKeySet, x: torch.Tensor) -> torch.Tensor:
        keysets.append(keyset)
        return torch_internals.below_autograd(op, keyset, (x,))

    library.impl("double", at_autograd, "Autograd", with_keyset=True)
    x = torch.ones(2, requires_grad=True)
    result = op(x)
    assert (result.tolist(), result.requires_grad, len(keysets)) == ([2.0, 2.0], False, 1)


def test_torchs_search_for_gradients():
    x = torch.ones(2)
    assert not torch_internals.any_requires_grad(x, 1, [x], None)
    assert torch_internals.any_requires_grad(x, 1, [x.clone().requires_grad_()], None)


def test_torchs_news_of_transforms():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_internals.are_transforms_active(), torch_internals.is_inside_transform()))
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_torchs_level_and_switch_of_forward_mode():
    assert not torch_internals.is_forward_mode_open(0)
    with forward_ad.dual_level():
        assert torch_internals.is_forward_mode_open(0)
        assert not torch_internals.is_forward_mode_open(1)
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with forward_ad._set_fwd_grad_enabled(False), torch_internals.keep_forward_gradients():
            assert forward_ad.unpack_dual(2 * dual).tangent.tolist() == [2.0, 2.0]
        assert forward_ad.unpack_dual(3 * dual).tangent.tolist() == [3.0, 3.0]


def test_torchs_tensor_below_the_wrappers():
    found = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(torch_internals.unwrapped(x).tolist())
        return x

    torch.vmap(torch.vmap(look))(torch.tensor([[1, 2], [3, 4]]))
    assert found == [[[1, 2], [3, 4]]]


def test_torchs_function_of_a_single_level():
    class Double(torch_internals.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            return 2 * x.detach()

        @staticmethod
        def backward(ctx, gradient):
            return 5 * gradient

    def double(x: torch.Tensor) -> torch.Tensor:
        with torch_internals.enable_single_level_autograd_function():
            return Double.apply(x).sum()

    assert torch.func.grad(double)(torch.ones(2)).tolist() == [5.0, 5.0]


def test_torchs_permission_to_make_variables_inside_a_transform():
    def inner(x: torch.Tensor) -> torch.Tensor:
        with torch_internals.enable_inplace_requires_grad(True):
            variable = x.detach().requires_grad_()
        return torch.autograd.grad((variable**2).sum(), variable)[0].sum() + x.sum()

    assert torch.func.grad(inner)(torch.ones(2)).tolist() == [1.0, 1.0]


def test_torchs_fake_tensors_are_what_graphs_are_traced_with():
    seen = []
    library = torch.library.Library("vicinal_internals", "FRAGMENT")
    library.define("same(Tensor x) -> Tensor")
    library.impl("same", torch.clone, "CompositeExplicitAutograd")

    @torch.library.register_fake("vicinal_internals::same", lib=library)
    def _(x: torch.Tensor) -> torch.Tensor:
        seen.append(isinstance(x, torch_internals.FakeTensor))
        return torch.empty_like(x)

    torch.ops.vicinal_internals.same(torch.ones(2, device="meta"))
    make_fx(torch.ops.vicinal_internals.same, tracing_mode="fake")(torch.ones(2))
    assert (seen[0], any(seen[1:])) == (False, True)


def test_torchs_gradient_of_the_softmax():
    grads, scores = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    weights = scores.softmax(-1)
    expected = weights * (grads - (weights * grads).sum(-1, keepdim=True))
    out = torch.empty_like(weights)
    assert torch_internals.softmax_backward(grads, weights, out) is out
    for found in (out, torch_internals.softmax_backward(grads, weights)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_torchs_attention_on_the_cpu_gives_the_lse():
    query, key, value = torch.randn(3, 2, 2, 20, 8, dtype=torch.float64)
    bias = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    output, lse = torch_internals.attend_on_cpu(query, key, value, bias, 0.3)
    scores = 0.3 * query @ key.transpose(-1, -2) + bias
    torch.testing.assert_close(output, scores.softmax(-1) @ value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_torchs_shared_memory():
    storage = torch_internals.shared_storage(12)
    assert (storage.nbytes(), storage.is_shared()) == (12, True)


def test_torchs_copy_of_many():
    targets = [torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
    torch_internals.copy_all(targets, [torch.tensor([1.0, 2.0]), torch.tensor([3])])
    assert [target.tolist() for target in targets] == [[1.0, 2.0], [3]]


def test_torchs_base_of_batch_norms():
    norms = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    assert all(isinstance(norm, torch_internals.BatchNorm) for norm in norms)
    assert not isinstance(nn.LayerNorm(2), torch_internals.BatchNorm)


PRIVATE = re.compile(
    r"\b(?:torch|aten|forward_ad)(?:\.\w+)*\._(?!_|assert\b)\w+|^from torch\S* import .*\b_[a-zA-Z]", re.MULTILINE
)
"""A private name of torch. torch documents _assert, which FX keeps in a graph."""


def test_nothing_else_of_ours_names_torchs_private_parts():
    assert PRIVATE.search("x = torch._C._functorch.peek()")
    assert PRIVATE.search("from torch.autograd.function import Function, _SingleLevelFunction")
    assert PRIVATE.search("torch.ops.aten._softmax_backward_data(x)")
    assert not PRIVATE.search("torch.__version__, torch._assert(x), aten.relu")
    root = Path(inspect.getfile(torch_internals)).parent
    rooms = ("zoo", "train", "eval", "checkpoints", "kernels")
    found = {path: PRIVATE.findall(path.read_text()) for room in rooms for path in (root / room).rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
