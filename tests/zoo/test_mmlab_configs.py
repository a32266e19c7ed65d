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


# name; learning rate, weight decay, drop path, output norms (of all maps, of the rest after the first, of none), epochs
# or iterations, images of a step on each of 8 GPUs, precision: as the authors' configs have them, or, where the file's
# head says "not published", as it says there
SETTINGS = """
cascade_mask_rcnn_dinat_base_3x 7.5e-05 0.05 0.6 all 36 2 amp
cascade_mask_rcnn_dinat_large_3x 7.5e-05 0.05 0.6 all 36 2 float32
cascade_mask_rcnn_dinat_mini_3x 0.0001 0.05 0.2 all 36 2 amp
cascade_mask_rcnn_dinat_s_base_3x 7.5e-05 0.05 0.6 all 36 2 amp
cascade_mask_rcnn_dinat_s_large_3x 5e-05 0.05 0.6 all 36 2 amp
cascade_mask_rcnn_dinat_s_small_3x 0.0001 0.05 0.5 all 36 2 amp
cascade_mask_rcnn_dinat_s_tiny_3x 0.0001 0.05 0.3 all 36 2 amp
cascade_mask_rcnn_dinat_small_3x 0.0001 0.05 0.5 all 36 2 amp
cascade_mask_rcnn_dinat_tiny_3x 0.0001 0.05 0.3 all 36 2 amp
cascade_mask_rcnn_nat_base_3x 0.0001 0.05 0.5 all 36 2 amp
cascade_mask_rcnn_nat_mini_3x 0.0001 0.05 0.2 all 36 2 amp
cascade_mask_rcnn_nat_small_3x 0.0001 0.05 0.3 all 36 2 amp
cascade_mask_rcnn_nat_tiny_3x 0.0001 0.05 0.3 all 36 2 amp
dino_4scale_transnext_tiny_12e 0.0001 0.05 0.3 - 12 2 float32
dino_5scale_transnext_base_12e 0.0001 0.05 0.6 - 12 2 float32
dino_5scale_transnext_small_12e 0.0001 0.05 0.5 - 12 2 float32
dino_5scale_transnext_tiny_12e 0.0001 0.05 0.3 - 12 2 float32
mask_rcnn_biformer_base_1x 0.0001 0.05 0.3 all 12 2 amp
mask_rcnn_biformer_small_1x 0.0001 0.05 0.2 all 12 2 amp
mask_rcnn_convit_small_1x 0.0001 0.05 0.1 - 12 2 float32
mask_rcnn_davit_base_1x 0.0001 0.05 0.1 all 12 2 float32
mask_rcnn_davit_base_3x 0.0001 0.05 0.2 all 36 2 float32
mask_rcnn_davit_small_1x 0.0001 0.05 0.1 all 12 2 float32
mask_rcnn_davit_small_3x 0.0001 0.05 0.2 all 36 2 float32
mask_rcnn_davit_tiny_1x 0.0001 0.05 0.1 all 12 2 float32
mask_rcnn_davit_tiny_3x 0.0001 0.05 0.2 all 36 2 float32
mask_rcnn_dinat_mini_1x 0.0001 0.05 0.2 all 12 2 amp
mask_rcnn_dinat_mini_3x 0.0001 0.05 0.2 all 36 2 amp
mask_rcnn_dinat_s_small_3x 0.0001 0.05 0.35 all 36 2 amp
mask_rcnn_dinat_s_tiny_3x 0.0001 0.05 0.2 all 36 2 amp
mask_rcnn_dinat_small_3x 0.0001 0.05 0.35 all 36 2 amp
mask_rcnn_dinat_tiny_3x 0.0001 0.05 0.2 all 36 2 amp
mask_rcnn_halonet50ts_1x 0.0001 0.05 0.1 - 12 2 float32
mask_rcnn_litv2_base_1x 0.0002 0.0001 0.3 rest 12 2 amp
mask_rcnn_litv2_medium_1x 0.0002 0.0001 0.2 rest 12 2 amp
mask_rcnn_litv2_small_1x 0.0002 0.0001 0.2 rest 12 2 amp
mask_rcnn_maxvit_tiny_1x 0.0001 0.05 0.2 all 12 2 float32
mask_rcnn_nat_mini_1x 0.0001 0.05 0.2 all 12 2 amp
mask_rcnn_nat_mini_3x 0.0001 0.05 0.2 all 36 2 amp
mask_rcnn_nat_small_3x 0.0001 0.05 0.35 all 36 2 amp
mask_rcnn_nat_tiny_3x 0.0001 0.05 0.2 all 36 2 amp
mask_rcnn_shvit_s4_1x 0.0001 0.05 - - 12 2 float32
mask_rcnn_transnext_base_1x 0.0001 0.05 0.7 - 12 2 amp
mask_rcnn_transnext_small_1x 0.0001 0.05 0.6 - 12 2 float32
mask_rcnn_transnext_tiny_1x 0.0001 0.05 0.4 - 12 2 float32
retinanet_biformer_base_1x 0.0001 0.0001 0.3 all 12 2 amp
retinanet_biformer_small_1x 0.0001 0.0001 0.2 all 12 2 amp
retinanet_davit_base_1x 0.0001 0.05 0.1 all 12 2 float32
retinanet_davit_base_3x 0.0001 0.05 0.2 all 36 2 float32
retinanet_davit_small_1x 0.0001 0.05 0.1 all 12 2 float32
retinanet_davit_small_3x 0.0001 0.05 0.2 all 36 2 float32
retinanet_davit_tiny_1x 0.0001 0.05 0.1 all 12 2 float32
retinanet_davit_tiny_3x 0.0001 0.05 0.2 all 36 2 float32
retinanet_litv2_base_1x 0.0001 0.0001 0.3 all 12 2 amp
retinanet_litv2_medium_1x 0.0001 0.0001 0.2 all 12 2 amp
retinanet_litv2_small_1x 0.0001 0.0001 0.2 all 12 2 amp
retinanet_shvit_s4_1x 0.0001 0.05 - - 12 2 float32
shapes_mask_rcnn_nat_pico 0.002 0.05 - all 600 8 float32
mask2former_transnext_base_160k 0.0001 0.05 0.6 - 160000 2 float32
mask2former_transnext_small_160k 0.0001 0.05 0.5 - 160000 2 float32
mask2former_transnext_tiny_160k 0.0001 0.05 0.3 - 160000 2 float32
semantic_fpn_biformer_base_80k 0.0002 0.0001 0.3 all 80000 4 amp
semantic_fpn_biformer_small_80k 0.0002 0.0001 0.15 all 80000 4 amp
semantic_fpn_biformer_stl_80k 0.0002 0.0001 0.1 all 80000 4 amp
semantic_fpn_litv2_base_80k 0.0001 0.0001 0.3 rest 80000 2 float32
semantic_fpn_litv2_medium_80k 0.0001 0.0001 0.2 rest 80000 2 float32
semantic_fpn_litv2_small_80k 0.0001 0.0001 0.2 rest 80000 2 float32
shapes_semantic_fpn_nat_pico 0.002 0.05 - all 2000 4 float32
upernet_biformer_base_160k 6e-05 0.01 0.4 all 160000 2 amp
upernet_biformer_small_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_convit_small_160k 6e-05 0.01 0.2 - 160000 2 float32
upernet_davit_base_160k 6e-05 0.01 0.3 all 160000 2 float32
upernet_davit_small_160k 6e-05 0.01 0.3 all 160000 2 float32
upernet_davit_tiny_160k 6e-05 0.01 0.3 all 160000 2 float32
upernet_dinat_base_160k 6e-05 0.01 0.5 all 160000 2 amp
upernet_dinat_large_160k 6e-05 0.01 0.3 all 160000 2 float32
upernet_dinat_mini_160k 6e-05 0.01 0.2 all 160000 2 amp
upernet_dinat_s_base_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_dinat_s_large_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_dinat_s_small_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_dinat_s_tiny_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_dinat_small_160k 6e-05 0.01 0.5 all 160000 2 amp
upernet_dinat_tiny_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_halonet50ts_160k 6e-05 0.01 0.2 - 160000 2 float32
upernet_litv2_small_160k 6e-05 0.01 0.2 rest 160000 2 float32
upernet_maxvit_tiny_160k 6e-05 0.01 0.2 all 160000 2 float32
upernet_nat_base_160k 6e-05 0.01 0.5 all 160000 2 amp
upernet_nat_mini_160k 6e-05 0.01 0.2 all 160000 2 amp
upernet_nat_small_160k 6e-05 0.01 0.5 all 160000 2 amp
upernet_nat_tiny_160k 6e-05 0.01 0.3 all 160000 2 amp
upernet_shvit_s4_160k 6e-05 0.01 - - 160000 2 float32
upernet_transnext_base_160k 6e-05 0.05 0.7 - 160000 2 float32
upernet_transnext_small_160k 6e-05 0.05 0.6 - 160000 2 float32
upernet_transnext_tiny_160k 6e-05 0.05 0.4 - 160000 2 float32
"""
NORMS = {"all": "layer", "rest": [None, "layer", "layer", "layer"], "-": None}
# what changes the learning rate: type, first and last step, places of its steps
SCHEDULES = {
    "_1x": [("LinearLR", 0, 500, None), ("MultiStepLR", 0, 12, [8, 11])],
    "_3x": [("LinearLR", 0, 500, None), ("MultiStepLR", 0, 36, [27, 33])],
    "_12e": [("MultiStepLR", 0, 12, [11])],
    "upernet": [("LinearLR", 0, 1500, None), ("PolyLR", 1500, 160000, None)],
    "semantic_fpn_litv2": [("PolyLR", 0, 80000, None)],
    "semantic_fpn_biformer": [("LinearLR", 0, 1000, None), ("CosineAnnealingLR", 1000, 80000, None)],
    "mask2former": [("PolyLR", 0, 160000, None)],
    "shapes_mask": [("LinearLR", 0, 60, None), ("CosineAnnealingLR", 60, 600, None)],
    "shapes_semantic": [("LinearLR", 0, 200, None), ("CosineAnnealingLR", 200, 2000, None)],
}
# gamma, power and ends of the decays
DECAYS = {
    "MultiStepLR": {"gamma": 0.1},
    "upernet": {"power": 1.0, "eta_min": 0.0},
    "semantic_fpn_litv2": {"power": 0.9, "eta_min": 1e-6},
    "semantic_fpn_biformer": {"eta_min_ratio": 1e-8},
    "mask2former": {"power": 0.9, "eta_min": 0.0},
    "shapes": {"eta_min": 2e-5},
}


@cache
def read(task: str, name: str):
    return read_config(task, name)


@cache
def real_channels(model: str, out_indices: tuple[int, ...]) -> list[int]:
    return describe_backbone({"model": model, "out_indices": out_indices or None})["channels"]


@pytest.mark.parametrize(("task", "name"), NAMES, ids=[name for _, name in NAMES])
def test_states_the_channels_of_its_model(task: str, name: str):
    cfg = read(task, name)
    backbone = cfg.model.backbone
    channels = real_channels(backbone.model, tuple(backbone.get("out_indices") or ()))
    neck = cfg.model.get("neck")
    if isinstance(neck, list):
        assert {neck[0].channels, *neck[1].in_channels} == set(channels)
    elif neck is not None and neck.type == "RescaledPyramid":
        assert {neck.channels} == set(channels)
    else:
        assert (neck or cfg.model.decode_head).in_channels == channels


def test_has_the_settings_of_the_published_runs():
    found = []
    for task, name in NAMES:
        cfg = read(task, name)
        backbone, optimizer, wrapper = cfg.model.backbone, cfg.optim_wrapper.optimizer, cfg.optim_wrapper
        norm = next(word for word, value in NORMS.items() if value == backbone.get("output_norm"))
        length = cfg.train_cfg.get("max_epochs") or cfg.train_cfg.max_iters
        images = cfg.train_dataloader.batch_size * wrapper.get("accumulative_counts", 1)
        precision = "amp" if wrapper.type == "AutocastOptimWrapper" else "float32"
        drop_path = backbone.get("drop_path_rate", "-")
        values = (name, optimizer.lr, optimizer.weight_decay, drop_path, norm, length, images, precision)
        found.append(" ".join(map(str, values)))
        assert optimizer.type == "AdamW"
        assert tuple(optimizer.get("betas", (0.9, 0.999))) == (0.9, 0.999)
    assert found == SETTINGS.strip().splitlines()


@pytest.mark.parametrize(("task", "name"), NAMES, ids=[name for _, name in NAMES])
def test_the_learning_rate_takes_the_published_course(task: str, name: str):
    schedulers = read(task, name).param_scheduler
    course = [(each.type, each.get("begin", 0), each.end, each.get("milestones")) for each in schedulers]
    assert [course] == [steps for part, steps in SCHEDULES.items() if part in name]
    decays = [decay for part, decay in DECAYS.items() if part in name or part == schedulers[-1].type]
    assert [{key: schedulers[-1].get(key) for key in decay} for decay in decays] == decays
    assert len(decays) == 1


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
