"""Every recipe is what its paper or its official script says, written out here figure by figure.

Where a family's sources are silent, the value is that of DeiT (arXiv:2012.12877, table 9), from which most start.
"""

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from vicinal.__main__ import main
from vicinal.eval.catalog import MARKDOWN_HEADER
from vicinal.train.build import build_optimizer, build_scheduler
from vicinal.train.config import TrainConfig
from vicinal.train.rates import images_per_update, scale_rates
from vicinal.train.recipe import RECIPES, list_recipes, read_recipe

DEIT = {
    "pretrained": False,
    "weights": None,
    "probe": None,
    "drop_path_rate": None,
    "teacher": None,
    "model_kwargs": {},
    "data": "data/imagenet",
    "img_size": None,
    "batch_size": 128,
    "mean": None,
    "std": None,
    "interpolation": None,
    "crop_pct": None,
    "max_unreadable": 0,
    "crop": "rrc",
    "scale": None,
    "hflip": 0.5,
    "color_jitter": 0.0,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "erasing_mode": "pixel",
    "repeats": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "optimizer": "adamw",
    "lr": 1e-3,
    "lr_base_size": None,
    "weight_decay": 0.05,
    "layer_decay": None,
    "optimizer_kwargs": {},
    "loss": "ce",
    "bce_threshold": None,
    "label_smoothing": 0.1,
    "clip_grad": None,
    "clip_mode": "norm",
    "accumulation": 1,
    "epochs": 300,
    "schedule": "cosine",
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-6,
    "cooldown_epochs": 0,
    "min_lr": 1e-5,
    "scale_all": False,
    "seed": 0,
    "precision": "bfloat16",
    "channels_last": False,
    "grad_checkpointing": False,
    "sync_bn": False,
    "ema_decay": None,
    "ema_warmup": False,
}
LINEAR = {"lr": 5e-4, "lr_base_size": 512}
# File main.py of BiFormer: 5e-4 for 512 images, repeated augmentation, an average at .99996, no clipping.
BIFORMER = {**LINEAR, "repeats": 3, "ema_decay": 0.99996}
CONVIT = {**LINEAR, "repeats": 3, "drop_path_rate": 0.1}
DAVIT = {"clip_grad": 1.0, "drop_path_rate": 0.1}
TRANSNEXT = {"clip_grad": 1.0, "repeats": 3}
TRANSNEXT_384 = {
    **TRANSNEXT,
    **{"img_size": 384, "crop_pct": 1.0, "cutmix": 0.0, "lr": 1e-5, "model_kwargs": {"pretrain_size": 224}},
    **{"epochs": 5, "schedule": "constant", "warmup_epochs": 0.0},
}
SHVIT = {
    **{"batch_size": 256, "lr": 1e-3, "lr_base_size": 512, "repeats": 3, "ema_decay": 0.99996},
    **{"clip_grad": 0.02, "clip_mode": "agc"},
}
DISTILLED = {"teacher": "regnety_160.deit_in1k", "teacher_weight": 0.5, "model_kwargs": {"distilled": True}}
LITV2 = {
    **LINEAR,
    **{"clip_grad": 5.0, "warmup_epochs": 20.0, "warmup_lr": 5e-7, "min_lr": 5e-6, "scale_all": True},
}
# NAT and DiNAT: 300 epochs and ten more at the lowest rate.
NAT = {"clip_grad": 5.0, "epochs": 310, "warmup_epochs": 20.0, "cooldown_epochs": 10, "min_lr": 5e-6}
NAT_21K = {
    **{**NAT, "data": "data/imagenet21k", "drop_path_rate": 0.2, "accumulation": 4, "grad_checkpointing": True},
    **{"epochs": 90, "schedule": "linear", "warmup_epochs": 5.0, "cooldown_epochs": 0},
}
NAT_TUNED = {
    **{**NAT, "drop_path_rate": 0.35, "batch_size": 64, "mixup": 0.0, "cutmix": 0.0, "lr": 5e-5, "min_lr": 1e-6},
    **{"epochs": 30, "schedule": "linear", "warmup_epochs": 0.0, "cooldown_epochs": 0},
}
AT_384 = {"img_size": 384, "crop_pct": 1.0}
ISOTROPIC_BASE = {**NAT, "drop_path_rate": 0.4, "warmup_epochs": 50.0, "ema_decay": 0.9998}
# File hp/vision_i1k.py of MaxViT: 3e-3 for 4096 images, 10,000 updates of warm-up, two layers of RandAugment at 15.
MAXVIT = {
    **{"auto_augment": "rand-m15-n2", "random_erasing": 0.0, "cutmix": 0.0, "lr": 3e-3, "clip_grad": 1.0},
    **{"accumulation": 4, "warmup_epochs": 32.0, "warmup_lr": 0.0, "ema_decay": 0.9999},
}
MAXVIT_21K = {
    **{**MAXVIT, "data": "data/imagenet21k", "auto_augment": "rand-m5-n2", "mixup": 0.0, "lr": 1e-3},
    **{"weight_decay": 0.01, "loss": "bce", "label_smoothing": 1e-4, "epochs": 90, "warmup_epochs": 5.0},
    **{"ema_decay": None, "grad_checkpointing": True},
}
MAXVIT_TUNED = {
    **{**MAXVIT, "batch_size": 64, "crop_pct": 1.0, "lr": 5e-5, "weight_decay": 1e-8, "accumulation": 1},
    **{"epochs": 30, "schedule": "constant", "warmup_epochs": 0.0},
}
# Procedure A1 of ResNet strikes back, table 2.
HALONET = {
    **{"img_size": 256, "batch_size": 256, "drop_path_rate": 0.05, "auto_augment": "rand-m7-mstd0.5-inc1"},
    **{"random_erasing": 0.0, "repeats": 3, "mixup": 0.2, "optimizer": "lamb", "lr": 5e-3, "weight_decay": 0.01},
    **{"loss": "bce", "epochs": 600, "min_lr": 1e-6},
}


def maxvit_at(px: int, size: str, drop_path_rate: float) -> dict:
    at = {"img_size": px, "model_kwargs": {"img_size": px}, "drop_path_rate": drop_path_rate}
    return {**MAXVIT_TUNED, **at, "weights": f"maxvit_{size}"}


MAXVIT_DROP_PATH = {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6}
SHVIT_SIZES = {
    "s1": {**SHVIT, "weight_decay": 0.025},
    "s2": {**SHVIT, "weight_decay": 0.032},
    "s3": {**SHVIT, "weight_decay": 0.035},
    "s4": {**SHVIT, "weight_decay": 0.03, "img_size": 256},
}
EXPECTED = {
    "biformer_tiny": {**BIFORMER, "drop_path_rate": 0.1},
    "biformer_small": {**BIFORMER, "drop_path_rate": 0.15},
    "biformer_base": {**BIFORMER, "drop_path_rate": 0.4},
    "biformer_stl": {**BIFORMER, "drop_path_rate": 0.1},
    "biformer_stl_nchw": {**BIFORMER, "drop_path_rate": 0.1},
    "convit_tiny": CONVIT,
    "convit_small": CONVIT,
    "convit_base": CONVIT,
    "davit_tiny": DAVIT,
    "davit_small": DAVIT,
    "davit_base": DAVIT,
    "transnext_micro": {**TRANSNEXT, "drop_path_rate": 0.15},
    "transnext_micro_aaaa": {**TRANSNEXT, "drop_path_rate": 0.15, "img_size": 256},
    "transnext_tiny": {**TRANSNEXT, "drop_path_rate": 0.25},
    "transnext_small": {**TRANSNEXT, "drop_path_rate": 0.45},
    "transnext_base": {**TRANSNEXT, "drop_path_rate": 0.6},
    "transnext_small_384": {**TRANSNEXT_384, "drop_path_rate": 0.7, "weights": "transnext_small"},
    "transnext_base_384": {**TRANSNEXT_384, "drop_path_rate": 0.8, "weights": "transnext_base"},
    **{f"shvit_{size}": values for size, values in SHVIT_SIZES.items()},
    **{f"shvit_{size}_distilled": {**values, **DISTILLED} for size, values in SHVIT_SIZES.items()},
    "litv2_small": {**LITV2, "drop_path_rate": 0.2},
    "litv2_medium": {**LITV2, "drop_path_rate": 0.3},
    "litv2_base": {**LITV2, "drop_path_rate": 0.5},
    "litv2_base_384": {
        **{**LITV2, **AT_384, "drop_path_rate": 0.5, "weights": "litv2_base", "lr": 2e-5, "weight_decay": 1e-8},
        **{"epochs": 30, "warmup_epochs": 5.0, "warmup_lr": 2e-8, "min_lr": 2e-7},
    },
    **{f"{family}_mini": {**NAT, "drop_path_rate": 0.2} for family in ("nat", "dinat")},
    **{f"{family}_tiny": {**NAT, "drop_path_rate": 0.2} for family in ("nat", "dinat", "dinat_s")},
    **{f"{family}_small": {**NAT, "drop_path_rate": 0.3} for family in ("nat", "dinat", "dinat_s")},
    **{f"{family}_base": {**NAT, "drop_path_rate": 0.5} for family in ("nat", "dinat", "dinat_s")},
    **{f"{name}_small": {**NAT, "drop_path_rate": 0.1} for name in ("nat_isotropic", "dinat_isotropic", "vitrpb")},
    **{f"{name}_base": ISOTROPIC_BASE for name in ("nat_isotropic", "dinat_isotropic", "vitrpb")},
    **dict.fromkeys(("dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"), NAT_21K),
    "dinat_large": {**NAT_TUNED, "weight_decay": 1e-4, "weights": "dinat_large_21k"},
    "dinat_large_384": {**NAT_TUNED, **AT_384, "weight_decay": 1e-10, "weights": "dinat_large_21k"},
    "dinat_large_384_11x11": {**NAT_TUNED, **AT_384, "weight_decay": 1e-10, "weights": "dinat_large_21k_11x11"},
    "dinat_s_large": {**NAT_TUNED, "weight_decay": 1e-4, "weights": "dinat_s_large_21k"},
    "dinat_s_large_384": {**NAT_TUNED, **AT_384, "weight_decay": 1e-5, "weights": "dinat_s_large_21k"},
    **{f"maxvit_{size}": {**MAXVIT, "drop_path_rate": rate} for size, rate in MAXVIT_DROP_PATH.items()},
    **{
        f"maxvit_{size}_{px}": maxvit_at(px, size, rate) for size, rate in MAXVIT_DROP_PATH.items() for px in (384, 512)
    },
    "maxvit_base_21k": {**MAXVIT_21K, "drop_path_rate": 0.3},
    "maxvit_large_21k": {**MAXVIT_21K, "drop_path_rate": 0.4},
    "maxvit_xlarge_21k": {**MAXVIT_21K, "drop_path_rate": 0.6},
    **dict.fromkeys(("halonet26t", "halonet50ts", "halo2botnet50ts_256", "lamhalobotnet50ts_256"), HALONET),
}
# The models of three families stand beside timm's, under names of their own.
RENAMED = ("davit", "convit", "shvit", "hal", "lamhalo")


def model_of(recipe: str) -> str:
    """The registered name of the model that a recipe trains."""
    name = recipe.removesuffix("_distilled")
    if not name.startswith(("dinat_large", "dinat_s_large")):
        name = name.removesuffix("_384").removesuffix("_512")
    if name.startswith("maxvit"):
        name = name.removesuffix("_21k")
    return f"{name}_vicinal" if name.startswith(RENAMED) else name


@cache
def load(path: Path) -> TrainConfig:
    return TrainConfig(**read_recipe(path))


def flat(config: TrainConfig) -> dict:
    """Settings by the names of their flags."""
    settings = {name: value for section in asdict(config).values() for name, value in section.items()}
    return {**settings, "model": config.model.name, "data": config.data.name}


def differences(path: Path, expected: dict) -> dict:
    """Settings of a recipe that are not as expected: name -> (found, expected)."""
    found = flat(load(path))
    return {name: (found[name], value) for name, value in expected.items() if found[name] != value}


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe_is_the_published_one(name):
    expected = {**DEIT, **EXPECTED[name], "model": model_of(name)}
    assert differences(RECIPES / "imagenet" / f"{name}.yaml", expected) == {}


def test_no_recipe_is_without_its_figures():
    assert {path.stem for path in list_recipes() if path.parent.name == "imagenet"} == set(EXPECTED)
    others = {path.stem for path in list_recipes() if path.parent.name != "imagenet"}
    assert others == {"first_run", "imagenet_folder"}


def test_recipe_for_folders_is_that_of_nat_mini():
    assert read_recipe(RECIPES / "imagenet_folder.yaml") == read_recipe(RECIPES / "imagenet" / "nat_mini.yaml")


def test_first_run():
    expected = {
        **{"model": "nat_pico", "data": "digits", "img_size": 32, "batch_size": 32, "crop_pct": 1.0},
        **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "val_fraction": 0.2, "split_seed": 0},
        **{"crop": "shift", "shift": 0.125, "hflip": 0.0, "auto_augment": None, "random_erasing": 0.0},
        **{"mixup": 0.0, "cutmix": 0.0, "repeats": 1, "optimizer": "adamw", "lr": 1.5e-3, "weight_decay": 0.05},
        **{"label_smoothing": 0.1, "clip_grad": None, "accumulation": 1, "epochs": 30, "warmup_epochs": 2.0},
        **{"warmup_lr": 1e-6, "min_lr": 1e-5, "schedule": "cosine", "cooldown_epochs": 0, "ema_decay": None},
        **{"threads": 1, "log_interval": 10, "report": True, "precision": "auto", "seed": 0},
    }
    assert differences(RECIPES / "first_run.yaml", expected) == {}


# Images of an update on 8 processes, as their authors trained.
IMAGES = {
    "shvit": 2048,
    "hal": 2048,
    "lamhalo": 2048,
    "maxvit": 4096,
    "dinat_large_21k": 4096,
    "dinat_s_large_21k": 4096,
}
TUNED = {name: 512 for name in EXPECTED if name.startswith(("dinat_large", "dinat_s_large")) and "21k" not in name}
TUNED |= {name: 512 for name in EXPECTED if name.startswith("maxvit") and name.endswith(("_384", "_512"))}


@pytest.mark.parametrize("name", EXPECTED)
def test_eight_processes_make_the_published_batch(name):
    config = load(RECIPES / "imagenet" / f"{name}.yaml")
    fits = max((start for start in IMAGES if name.startswith(start)), key=len, default="")
    assert images_per_update(config, 8) == TUNED.get(name, IMAGES.get(fits, 1024))


def rates_of(name: str, epochs: tuple[float, ...]) -> list[float]:
    """Learning rates at the given epochs of a recipe on 8 processes, of 100 updates each."""
    config = scale_rates(load(RECIPES / "imagenet" / f"{name}.yaml"), 8)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), replace(config.optimizer, optimizer="sgd"))
    scheduler, found = build_scheduler(optimizer, config.schedule, 100), []
    for epoch in epochs:
        scheduler.step_update(round(100 * epoch))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_rates_that_the_recipes_mean():
    """By hand: the line of the warm-up, half a cosine at its middle, the lowest rate at the end."""
    # (1e-3 + 1e-5) / 2 in the middle of 300 epochs.
    assert rates_of("davit_tiny", (0, 2.5, 150, 300)) == pytest.approx([1e-6, 5.005e-4, 5.05e-4, 1e-5], rel=1e-9)
    # 300 epochs of cosine and ten of cool-down, after 20 of warm-up.
    assert rates_of("nat_tiny", (0, 10, 150, 300, 309)) == pytest.approx(
        [1e-6, 5.005e-4, 5.025e-4, 5e-6, 5e-6], rel=1e-9
    )
    # 8 x 128 images are twice 512: everything doubles.
    assert rates_of("litv2_small", (0, 10, 150, 300)) == pytest.approx([1e-6, 5.005e-4, 5.05e-4, 1e-5], rel=1e-9)
    # 8 x 256 images are four times 512: the peak alone is scaled.
    assert rates_of("shvit_s1", (0, 150, 300)) == pytest.approx([1e-6, (4e-3 + 1e-5) / 2, 1e-5], rel=1e-9)
    assert rates_of("maxvit_tiny", (0, 16, 150)) == pytest.approx([0, 1.5e-3, (3e-3 + 1e-5) / 2], rel=1e-9)
    assert rates_of("maxvit_tiny_384", (0, 15, 29.99)) == [5e-5] * 3
    assert rates_of("transnext_base_384", (0, 4.99)) == [1e-5] * 2
    # Linear from 5e-5 to 1e-6, halfway after 15 of 30 epochs.
    assert rates_of("dinat_large", (0, 15, 30)) == pytest.approx([5e-5, 2.55e-5, 1e-6], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (
            (),
            {
                "imagenet/litv2_small": "litv2_small 300 1024 0.001 1e-06 1e-05",
                "imagenet/shvit_s1": "shvit_s1_vicinal 300 2048 0.004 1e-06 1e-05",
                "imagenet/maxvit_tiny": "maxvit_tiny 300 4096 0.003 0 1e-05",
                # A constant rate is its own lowest.
                "imagenet/maxvit_tiny_384": "maxvit_tiny 30 512 5e-05 0 5e-05",
            },
        ),
        (
            ("--processes", "2", "--batch-size", "64"),
            {
                "imagenet/litv2_small": "litv2_small 300 128 0.000125 1.25e-07 1.25e-06",
                "imagenet/maxvit_tiny": "maxvit_tiny 300 512 0.003 0 1e-05",
            },
        ),
    ],
    ids=["as they stand", "smaller"],
)
def test_listed_rates(capsys, arguments, rows):
    assert main(["recipes", *arguments]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["recipe"] == ["model", "epochs", "images/update", "lr", "warm-up", "lowest"]
    for name, row in rows.items():
        assert " ".join(lines[name]) == row


def test_results_that_recipes_name_are_those_of_the_table_of_models():
    """A recipe at the model's own size says the accuracy that the README lists, to its one decimal."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = readme.partition(MARKDOWN_HEADER)[2].partition("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    listed = {name.strip("`"): (size.partition("x")[0], top1) for name, size, _, _, top1 in cells}
    compared = 0
    for path in list_recipes():
        results = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Result: ")]
        size, top1 = listed.get(load(path).model.name, ("", ""))
        is_published = results[0].startswith("# Result: published ")
        if top1 and is_published and path.parent.name == "imagenet" and f"({size} px)" in results[0]:
            assert f"{float(results[0].partition(' %')[0].split()[-1]):.1f}" == top1, path.stem
            compared += 1
    assert compared > 45


def test_slurm_script_resumes_and_queues_itself_again():
    """What its header promises, line by line."""
    lines = (RECIPES / "slurm" / "train.sbatch").read_text(encoding="utf-8").splitlines()
    for line in (
        *("#!/bin/bash", "#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8"),
        *("#SBATCH --cpus-per-task=8", "#SBATCH --signal=USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"),
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "srun --kill-on-bad-exit=1 python -m vicinal.train --resume auto --save-interval 500 "
        '--workers "$SLURM_CPUS_PER_TASK" "$@"',
    ):
        assert line in lines
    assert lines[-5:] == [
        "code=$?",
        "if [ $code -eq 75 ]; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
