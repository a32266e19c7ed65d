"""Every config that comes with the package: it states the real model's channels, trains a step and predicts."""

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from dense_samples import build_small, detection_batch, segmentation_batch
from mmengine.optim import build_optim_wrapper

from vicinal.train.dense.configs import FOLDERS, describe_backbone, read_config, set_precision

logging.getLogger("mmengine").setLevel(logging.WARNING)
CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [(task, path.stem) for task, folder in FOLDERS.items() for path in sorted((CONFIGS / folder).glob("*.py"))]
# one of each head, and the necks of their own; the others are slow only because they are many
QUICK = {
    "retinanet_litv2_small_1x",
    "mask_rcnn_shvit_s4_1x",
    "cascade_mask_rcnn_dinat_mini_3x",
    "dino_5scale_transnext_tiny_12e",
    "semantic_fpn_litv2_small_80k",
    "upernet_convit_small_160k",
    "mask2former_transnext_tiny_160k",
}


@cache
def real_channels(model: str, out_indices: tuple[int, ...]) -> list[int]:
    return describe_backbone({"model": model, "out_indices": out_indices or None})["channels"]


@pytest.mark.parametrize(("task", "name"), NAMES, ids=[name for _, name in NAMES])
def test_states_the_channels_of_its_model(task: str, name: str):
    cfg = read_config(task, name)
    backbone = cfg.model.backbone
    channels = real_channels(backbone.model, tuple(backbone.get("out_indices") or ()))
    neck = cfg.model.get("neck")
    if isinstance(neck, list):
        assert {neck[0].channels, *neck[1].in_channels} == set(channels)
    elif neck is not None and neck.type == "RescaledPyramid":
        assert {neck.channels} == set(channels)
    else:
        assert (neck or cfg.model.decode_head).in_channels == channels


@pytest.mark.parametrize(
    ("task", "name"),
    [pytest.param(*case, id=case[1], marks=[] if case[1] in QUICK else pytest.mark.slow) for case in NAMES],
)
def test_builds_learns_and_predicts_at_any_size(task: str, name: str):
    torch.manual_seed(0)
    model, cfg = build_small(task, name)
    if "float16" in (CONFIGS / FOLDERS[task] / f"{name}.py").read_text().splitlines()[0]:
        assert cfg.optim_wrapper.type == "AutocastOptimWrapper"
    set_precision(cfg, "float32")
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    batch = detection_batch() if task == "detect" else segmentation_batch()
    losses = model.train()(**model.data_preprocessor(batch, training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    wrapper.backward(loss)
    # a parameter that no gradient reaches would stop distributed training
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    wrapper.step()
    assert any(not torch.equal(before[key], value) for key, value in model.named_parameters())
    model.eval()
    batch = detection_batch() if task == "detect" else segmentation_batch()
    # MMSegmentation predicts images of different sizes one by one
    singles = [
        {key: [value] for key, value in zip(batch, item, strict=True)} for item in zip(*batch.values(), strict=True)
    ]
    check_predictions(task, [model.test_step(single)[0] for single in singles])


def check_predictions(task: str, samples):
    """Whole-image predictions in the images' own size."""
    sizes = [(100, 135), (90, 121)]
    for sample, size in zip(samples, sizes, strict=True):
        if task == "segment":
            assert tuple(sample.pred_sem_seg.data.shape) == (1, *size)
            continue
        boxes = sample.pred_instances.bboxes
        assert torch.isfinite(boxes).all()
        assert boxes.shape[0] == 0 or (boxes.amax(0) <= torch.tensor([size[1], size[0]] * 2) + 1e-3).all()
        if "masks" in sample.pred_instances:
            assert tuple(sample.pred_instances.masks.shape[1:]) == size
