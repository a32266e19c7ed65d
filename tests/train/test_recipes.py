"""The recipes that come with the package, and what a recipe may say."""

from dataclasses import replace

import pytest
import torch

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.build import build_optimizer, build_scheduler
from vicinal.train.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from vicinal.train.dry_run import dry_run
from vicinal.train.network.create import build_model
from vicinal.train.rates import scale_rates
from vicinal.train.recipe import find_recipe, list_recipes, read_recipe
from vicinal.train.run.world import World

# Published learning rates for 8 x 128 images (times the accumulation that a recipe brings): peak, start of the warm-up,
# lowest. By the beginning of the recipe's name, the longest that fits.
PUBLISHED = {
    "biformer": (1e-3, 1e-6, 1e-5),
    "transnext": (1e-3, 1e-6, 1e-5),
    "transnext_small_384": (1e-5, None, None),
    "transnext_base_384": (1e-5, None, None),
    "shvit": (2e-3, 1e-6, 1e-5),
    "litv2": (1e-3, 1e-6, 1e-5),
    "litv2_base_384": (4e-5, 4e-8, 4e-7),
    "davit": (1e-3, 1e-6, 1e-5),
    "convit": (1e-3, 1e-6, 1e-5),
    "nat": (1e-3, 1e-6, 5e-6),
    "dinat": (1e-3, 1e-6, 5e-6),
    "vitrpb": (1e-3, 1e-6, 5e-6),
    "dinat_large": (5e-5, None, None),
    "dinat_large_21k": (1e-3, None, None),
    "dinat_s_large": (5e-5, None, None),
    "dinat_s_large_21k": (1e-3, None, None),
    "maxvit": (3e-3, None, 1e-5),
    **{f"maxvit_{size}_{px}": (5e-5, None, None) for size in ("tiny", "small", "base", "large") for px in (384, 512)},
    **{f"maxvit_{size}_21k": (1e-3, None, None) for size in ("base", "large", "xlarge")},
    "hal": (5e-3, None, None),
    "lamhalo": (5e-3, None, None),
}
IMAGENET = [path for path in list_recipes() if path.parent.name == "imagenet"]


def load(path):
    return TrainConfig(**read_recipe(path))


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_learning_rates_at_8_x_128_are_the_published_ones(path):
    config = load(path)
    scaled = scale_rates(replace(config, data=replace(config.data, batch_size=128)), 8)
    expected = PUBLISHED[max((name for name in PUBLISHED if path.stem.startswith(name)), key=len)]
    found = (scaled.optimizer.lr, scaled.schedule.warmup_lr, scaled.schedule.min_lr)
    for name, value, wanted in zip(("lr", "warmup_lr", "min_lr"), found, expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted, rel=1e-12), name


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model(path):
    config = load(path)
    classes = 21841 if "21k" in path.stem else 1000
    with torch.device("meta"):
        model = build_model(replace(config.model, pretrained=False, weights=None), config.data.img_size, classes)
    assert model.num_classes == classes
    assert build_optimizer(model, config.optimizer).param_groups


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_every_recipe_makes_an_update_in_a_dry_run(path, tmp_path, monkeypatch, capsys):
    """As it stands but for what a CPU and a machine without released weights cannot do: two images of 64 px."""
    monkeypatch.chdir(tmp_path)
    config, classes = load(path), 21841 if "21k" in path.stem else 1000
    rates = scale_rates(replace(config, data=replace(config.data, batch_size=128)), 8)
    config = replace(
        rates,
        model=replace(config.model, pretrained=False, weights=None, teacher=None),
        data=replace(config.data, name=f"synthetic/{classes}/{classes}", img_size=64, batch_size=2, workers=0),
        optimizer=replace(rates.optimizer, accumulation=1),
        run=replace(config.run, device="cpu", precision="float32", threads=1),
    )
    dry_run(config, World(torch.device("cpu")))
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:10] if line[:1].isalpha())
    assert shown["model"].startswith(config.model.name)
    assert "(2, 3, 64, 64)" in shown["input"]
    assert "loss" in shown["first"]
    assert "loss nan" not in shown["first"]


def test_recipe_says_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "_base.yaml").write_text("optimizer: {lr: 0.25, weight_decay: 0.125}\nschedule: {epochs: 7}\n")
    (tmp_path / "middle.yaml").write_text("extends: _base.yaml\noptimizer: {lr: 0.5}\nrun: {ema_decay: 0.9}\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\nrun: {ema_decay: null}\n")
    sections = read_recipe(tmp_path / "top.yaml")
    assert (sections["optimizer"].lr, sections["optimizer"].weight_decay) == (0.5, 0.125)
    assert sections["schedule"].epochs == 7
    assert sections["run"].ema_decay is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: _bas.yaml", "extends '_bas.yaml', which is not there; did you mean _base.yaml"),
        ("extends: [1]", "which is not there"),
        ("extends: _loop.yaml", "extends 'top.yaml', which extends this recipe again"),
        ("extends: top.yaml", "extends this recipe again"),
        ("extends: _wrong.yaml", "unknown key 'lr'"),
    ],
)
def test_bases_that_cannot_be_used_are_refused(tmp_path, text, message):
    (tmp_path / "_base.yaml").write_text("optimizer: {lr: 0.25}\n")
    (tmp_path / "_loop.yaml").write_text("extends: top.yaml\n")
    (tmp_path / "_wrong.yaml").write_text("lr: 1\n")
    (tmp_path / "top.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "top.yaml")
    assert message in str(caught.value)


def test_learning_rate_counts_processes_and_accumulated_batches():
    optimizer = OptimizerConfig(lr=5e-4, lr_base_size=512, accumulation=2)
    config = TrainConfig(optimizer=optimizer, schedule=ScheduleConfig(min_lr=1e-5, warmup_lr=1e-6, scale_all=True))
    config = replace(config, data=replace(config.data, batch_size=64))
    scaled = scale_rates(config, 8)
    assert scaled.optimizer.lr == pytest.approx(1e-3, rel=1e-12)
    assert scaled.schedule.min_lr == pytest.approx(2e-5, rel=1e-12)
    assert scaled.schedule.warmup_lr == pytest.approx(2e-6, rel=1e-12)
    assert scale_rates(scaled, 8) == scaled
    bounds_stay = replace(config, schedule=replace(config.schedule, scale_all=False))
    assert scale_rates(bounds_stay, 8).schedule == bounds_stay.schedule


def rates(schedule, updates_per_epoch=10):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0))
    scheduler = build_scheduler(optimizer, schedule, updates_per_epoch)
    found = []
    for update in range(schedule.epochs * updates_per_epoch):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cool_down_stays_at_the_lowest_rate():
    found = rates(ScheduleConfig(epochs=6, warmup_epochs=1, cooldown_epochs=2, min_lr=0.1, warmup_lr=0.0))
    assert found[8] < found[9]
    assert found[39] > 0.1
    assert found[40:] == [0.1] * 20


def test_linear_schedule_falls_by_equal_steps():
    found = rates(ScheduleConfig(epochs=4, schedule="linear", warmup_epochs=0, min_lr=0.2))
    # 40 updates from 1.0 to 0.2, each one 0.02 lower; a few roundings of numbers below 1.
    assert found == pytest.approx([1.0 - 0.02 * update for update in range(40)], abs=1e-14)


def test_recipes_are_listed_with_their_rates(capsys):
    assert main(["recipes", "--batch-size", "128"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["imagenet/shvit_s1"][1:5] == ["shvit_s1_vicinal", "300", "1024", "0.002"]
    assert len(lines) == len(list_recipes()) + 1


def test_imagenet_recipe_is_found_by_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("nat_mini") == find_recipe("imagenet/nat_mini")


def test_options_that_contradict_each_other_are_refused():
    for build, message in [
        (lambda: OptimizerConfig(bce_threshold=0.2), "--bce-threshold"),
        (lambda: OptimizerConfig(lr_base_size=0), "--lr-base-size 0"),
        (lambda: ScheduleConfig(schedule="constant", cooldown_epochs=1), "--cooldown-epochs"),
        (lambda: ScheduleConfig(epochs=10, warmup_epochs=5, cooldown_epochs=5), "--warmup-epochs 5"),
        (lambda: TrainConfig(schedule=ScheduleConfig(scale_all=True)), "--scale-all"),
        (lambda: ModelConfig(pretrained=True, weights="x"), "--weights"),
    ]:
        with pytest.raises(UserError, match=message):
            build()


def test_binary_cross_entropy_trains(train, records):
    code, folder = train("--loss", "bce", "--bce-threshold", "0.2", "--mixup", "0.2", "--epochs", "2")
    assert code == 0
    losses = [record["train_loss"] for record in records(folder) if record["event"] == "epoch"]
    assert losses[1] < losses[0] < 1.0


def test_run_starts_from_the_weights_of_another(train, tmp_path):
    assert train("--epochs", "1", output="first")[0] == 0
    config = ModelConfig(name="test_vit", weights=str(tmp_path / "first"), model_kwargs={"img_size": 32})
    same = build_model(config, None, 10)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "first" / "best" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in same.state_dict().items())
    fresh = build_model(config, None, 3)
    assert torch.equal(fresh.patch_embed.proj.weight, saved["patch_embed.proj.weight"])
    assert fresh.num_classes == 3
    with pytest.raises(UserError, match="--weights nowhere"):
        build_model(replace(config, weights="nowhere"), None, 10)
