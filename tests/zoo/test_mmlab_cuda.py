"""Whole detectors on a GPU, where the heads call operators that they replace by formulas on the CPU."""

import importlib
import math
from collections import Counter

import pytest
import torch
from dense_samples import detection_batch, mmlab, read_config, shrink
from mmengine.registry import MODELS, init_default_scope

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="these operators are called on a GPU alone")

FOCAL = {"sigmoid_focal_loss_forward", "sigmoid_focal_loss_backward"}
ATTENTION = {"ms_deform_attn_forward", "ms_deform_attn_backward"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each operator was called."""
    counted: Counter = Counter()
    compiled = importlib.import_module(mmlab.operators.MODULE)
    for name in FOCAL | ATTENTION:
        original = getattr(compiled, name)

        def counting(*args, name=name, original=original, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(compiled, name, counting)
    return counted


def learn_once(name: str, device: str) -> dict[str, float]:
    """Losses of one batch, after a backward pass; the weights are the same on every device."""
    torch.manual_seed(0)
    cfg = shrink(read_config("detect", name))
    cfg.model.backbone.drop_path_rate = 0.0
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = model.to(device).train()
    losses = model(**model.data_preprocessor(detection_batch(), training=True), mode="loss")
    loss, values = model.parse_losses(losses)
    loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.requires_grad)
    return {key: float(value) for key, value in values.items()}


def test_retinanets_focal_loss_on_a_gpu_is_that_of_the_cpu(calls: Counter):
    cpu = learn_once("retinanet_litv2_small_1x", "cpu")
    assert not calls
    gpu = learn_once("retinanet_litv2_small_1x", "cuda")
    assert set(calls) == FOCAL
    # convolutions in TF32 have 10 bits of mantissa
    assert gpu == pytest.approx(cpu, rel=1e-2)


def test_dino_attends_by_the_operator_on_a_gpu(calls: Counter):
    losses = learn_once("dino_5scale_transnext_tiny_12e", "cuda")
    assert set(calls) == FOCAL | ATTENTION
    # an encoder and a decoder of six layers
    assert calls["ms_deform_attn_forward"] == calls["ms_deform_attn_backward"] == 12
    assert all(math.isfinite(value) for value in losses.values())
