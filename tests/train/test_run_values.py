"""What a run is built of, shows, records and refuses, against values written out here."""

import json
import math
import os
import shutil
import signal
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import vicinal.zoo  # noqa: F401  registers the models
from vicinal.checkpoints import save, save_model
from vicinal.errors import RunStopped, UserError
from vicinal.train import build, dry_run
from vicinal.train.build import (
    autocast,
    build_models,
    build_scheduler,
    memory_format,
    resolve_precision,
)
from vicinal.train.config import (
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from vicinal.train.loop import Meter, default_output
from vicinal.train.network.create import build_model
from vicinal.train.network.probe import freeze, set_training_mode
from vicinal.train.network.weights import locate_weights
from vicinal.train.run import profiling, screen, signals, world
from vicinal.train.run.log import MetricsLog, TensorBoardSink, read_records
from vicinal.train.run.world import Arrival, World, first_exception, join_world

CPU = torch.device("cpu")
ALONE = World(CPU)

# --- Configuration


def test_defaults_are_the_documented_ones():
    """What a run is without a recipe: AdamW at 1e-3 with a cosine over 100 epochs, random resized crops, no mixing."""
    found = {name: value for section in asdict(TrainConfig()).values() for name, value in section.items()}
    expected = {
        **{"pretrained": False, "weights": None, "probe": None, "probe_queries": 32, "teacher": None},
        **{"teacher_weight": 0.5, "drop_path_rate": None, "model_kwargs": {}},
        **{"download": False, "img_size": None, "batch_size": 128, "workers": None, "val_fraction": 0.2},
        **{"split_seed": 0, "mean": None, "std": None, "interpolation": None, "crop_pct": None, "max_unreadable": 0},
        **{"stream_lanes": 64, "shuffle_buffer": 8192, "num_classes": None},
        **{"crop": "rrc", "scale": None, "shift": 0.125, "hflip": 0.5, "color_jitter": 0.0, "auto_augment": None},
        **{"random_erasing": 0.0, "erasing_mode": "pixel", "repeats": 1, "mixup": 0.0, "cutmix": 0.0},
        **{"mixup_prob": 1.0, "mixup_switch_prob": 0.5},
        **{"optimizer": "adamw", "lr": 1e-3, "lr_base_size": None, "weight_decay": 0.05, "layer_decay": None},
        **{"optimizer_kwargs": {}, "loss": "ce", "bce_threshold": None, "label_smoothing": 0.1, "clip_grad": None},
        **{"clip_mode": "norm", "accumulation": 1, "max_skips": 5},
        **{"epochs": 100, "schedule": "cosine", "warmup_lr": 1e-6, "cooldown_epochs": 0, "min_lr": 1e-5},
        **{"scale_all": False, "output": None, "resume": None, "seed": 0, "device": "auto", "threads": 0},
        **{"precision": "auto", "channels_last": False, "compile": False, "grad_checkpointing": False},
        **{"sync_bn": False, "deterministic": False, "parallel": "ddp", "ema_decay": None, "ema_warmup": False},
        **{"save_interval": None, "save_epochs": None, "keep": 3, "sharded_checkpoints": False, "log_interval": 50},
        **{"tensorboard": False, "wandb": None, "profile": 0, "report": False},
    }
    assert {name: found[name] for name in expected} == expected
    assert (TrainConfig().model.name, TrainConfig().data.name) == ("nat_pico", "digits")


@pytest.mark.parametrize(
    ("section", "allowed", "refused"),
    [
        (
            ModelConfig,
            {"teacher_weight": [1.0, 1e-3], "probe_queries": [1]},
            {"teacher_weight": [0, 1.1], "probe_queries": [0]},
        ),
        (
            DataConfig,
            {
                "batch_size": [1],
                "img_size": [1, None],
                "workers": [0],
                "val_fraction": [0.01, 0.99],
                "max_unreadable": [0],
            },
            {"batch_size": [0], "img_size": [0], "workers": [-1], "val_fraction": [0, 1], "max_unreadable": [-1]},
        ),
        (
            DataConfig,
            {"stream_lanes": [1], "shuffle_buffer": [0], "crop_pct": [1.0, 0.01]},
            {"stream_lanes": [0], "shuffle_buffer": [-1], "crop_pct": [0, 1.01]},
        ),
        (
            AugmentationConfig,
            {name: [0, 1] for name in ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob")}
            | {"shift": [0, 0.99]},
            {name: [-0.1, 1.1] for name in ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob")}
            | {"shift": [-0.1, 1], "repeats": [0], "mixup": [-1], "cutmix": [-1]},
        ),
        (
            OptimizerConfig,
            {"lr": [1e-9], "lr_base_size": [1], "accumulation": [1], "max_skips": [0], "label_smoothing": [0, 0.99]}
            | {"clip_grad": [1e-9], "layer_decay": [1, 0.01]},
            {"lr": [0, -1], "lr_base_size": [0], "accumulation": [0], "max_skips": [-1], "label_smoothing": [-0.1, 1]}
            | {"clip_grad": [0], "layer_decay": [0, 1.1], "bce_threshold": [0.5]},
        ),
        (
            ScheduleConfig,
            {"cooldown_epochs": [0, 99]},
            {"epochs": [0], "cooldown_epochs": [-1, 100], "warmup_epochs": [-1, 100]},
        ),
        (
            RunConfig,
            {"log_interval": [1], "save_interval": [1], "save_epochs": [1], "keep": [1], "threads": [0], "profile": [0]}
            | {"ema_decay": [0.01, 0.99]},
            {
                "log_interval": [0],
                "save_interval": [0],
                "save_epochs": [0],
                "keep": [0],
                "threads": [-1],
                "profile": [-1],
            }
            | {"ema_decay": [0, 1]},
        ),
    ],
    ids=["model", "data", "streams", "augmentation", "optimizer", "schedule", "run"],
)
def test_bounds_from_both_sides(section, allowed, refused):
    for name, values in allowed.items():
        for value in values:
            assert getattr(section(**{name: value}), name) == value
    for name, values in refused.items():
        for value in values:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
                section(**{name: value})


def test_thresholds_of_binary_cross_entropy():
    assert OptimizerConfig(loss="bce", bce_threshold=0.0).bce_threshold == 0
    for value in (-0.1, 1.0):
        with pytest.raises(UserError, match="--bce-threshold"):
            OptimizerConfig(loss="bce", bce_threshold=value)


def test_lowest_rate_may_be_the_peak_and_no_more():
    assert TrainConfig(schedule=ScheduleConfig(min_lr=1e-3)).schedule.min_lr == 1e-3
    assert TrainConfig(schedule=ScheduleConfig(min_lr=1.0, schedule="constant")).schedule.min_lr == 1.0
    with pytest.raises(UserError, match="--min-lr"):
        TrainConfig(schedule=ScheduleConfig(min_lr=1.01e-3))


@pytest.mark.parametrize(("mixup", "cutmix", "mixes"), [(0, 0, False), (0.1, 0, True), (0, 0.1, True)])
def test_either_mixing_makes_targets_soft(mixup, cutmix, mixes):
    assert AugmentationConfig(mixup=mixup, cutmix=cutmix).mixes == mixes


# --- Parts of a run


def parts_of(config, monkeypatch, size=1):
    """The parts, built as one of ``size`` processes, without a process group."""
    build_task = build.build_task
    monkeypatch.setattr(build, "build_task", lambda *given: build_task(*given[:-1], ALONE))
    return build.build_components(config, World(CPU, size=size))


BASE = TrainConfig(
    model=ModelConfig(name="test_vit"),
    data=DataConfig(img_size=32, batch_size=32),
    augmentation=AugmentationConfig(crop="none", hflip=0.0),
)


def test_parts_are_those_of_the_configuration(monkeypatch):
    """1438 digits in 44 batches of 32; three to an update make 15 updates."""
    config = replace(
        BASE,
        optimizer=OptimizerConfig(lr=0.5, lr_base_size=64, accumulation=3, label_smoothing=0.2, weight_decay=0.25),
        augmentation=replace(BASE.augmentation, mixup=0.8, mixup_prob=0.0),
        schedule=ScheduleConfig(schedule="constant", warmup_epochs=0),
    )
    parts = parts_of(config, monkeypatch)
    assert parts.updates_per_epoch == 15
    parts.scheduler.step_update(0)
    # 32 x 3 images over 64.
    assert {group["lr"] for group in parts.state.optimizer.param_groups} == {0.75}
    assert {group["weight_decay"] for group in parts.state.optimizer.param_groups} == {0.0, 0.25}
    images, targets = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    _, soft = parts.preprocess(images, targets)
    torch.testing.assert_close(soft, 0.8 * torch.eye(10)[:4] + 0.02, rtol=0, atol=1e-6)
    _, hard = parts.val_preprocess(images, targets)
    assert torch.equal(hard, targets)
    assert parts.state.scaler is None
    assert parts.state.model.pretrained_cfg["label_names"] == list("0123456789")


def test_rates_count_all_processes(monkeypatch):
    config = replace(BASE, optimizer=OptimizerConfig(lr=0.5, lr_base_size=64), schedule=ScheduleConfig(warmup_epochs=0))
    parts = parts_of(config, monkeypatch, size=4)
    parts.scheduler.step_update(0)
    assert {group["lr"] for group in parts.state.optimizer.param_groups} == {1.0}
    assert parts.updates_per_epoch == 11


@pytest.mark.parametrize(("precision", "is_scaled"), [("float16", True), ("bfloat16", False), ("auto", False)])
def test_the_loss_is_scaled_in_float16_only(monkeypatch, precision, is_scaled):
    scaler = parts_of(replace(BASE, run=RunConfig(precision=precision)), monkeypatch).state.scaler
    assert (scaler is not None and scaler.is_enabled()) == is_scaled


def test_the_seed_chooses_weights_and_order(monkeypatch):
    def drawn(seed):
        parts = parts_of(replace(BASE, run=RunConfig(seed=seed)), monkeypatch)
        parts.batches.sampler.begin(0)
        weight = parts.state.model.patch_embed.proj.weight.detach()
        return weight.sum().item(), next(iter(parts.batches.sampler))[0].index, parts.batches.dataset.seed

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert first[2] == 3


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")]
)
def test_products_are_of_the_precision_asked_for(precision, dtype):
    with autocast(RunConfig(precision=precision), CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)
    assert [resolve_precision(RunConfig(), torch.device(kind)) for kind in ("cuda", "cpu")] == ["bfloat16", "float32"]


@pytest.mark.parametrize(("warmup", "decays"), [(False, [0.6] * 3), (True, [0.370039, 0.51925, 0.6])])
def test_the_average_decays_as_asked_for(monkeypatch, warmup, decays):
    run = RunConfig(ema_decay=0.6, ema_warmup=warmup)
    average = parts_of(replace(BASE, run=run), monkeypatch).state.task.get_trainable_module(ema=True)
    assert [round(average.get_decay(step), 6) for step in (2, 3, 4)] == decays
    assert not parts_of(BASE, monkeypatch).state.task.has_ema()


def test_options_of_a_model_reach_it():
    model = build_model(ModelConfig(name="nat_pico", drop_path_rate=0.3, model_kwargs={"kernel_size": 5}), None, 7)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.3)
    assert (model.num_classes, model.stages[0].blocks[0].attn.kernel_size) == (7, [5, 5])
    # A network of a fixed size is built for the images that it gets.
    assert build_model(ModelConfig(name="test_vit"), 96, 2).patch_embed.img_size == (96, 96)


def test_a_network_is_compiled_where_it_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(type(model).__name__) or model)
    for flag in (False, True):
        parts_of(replace(BASE, run=RunConfig(compile=flag)), monkeypatch)
        assert compiled == ["VisionTransformer"] * flag


def test_repeats_reach_the_order(monkeypatch):
    sampler = parts_of(replace(BASE, augmentation=replace(BASE.augmentation, repeats=2)), monkeypatch).batches.sampler
    sampler.begin(0)
    keys = next(iter(sampler))
    assert [key.index for key in keys[::2]] == [key.index for key in keys[1::2]]
    assert {key.repeat for key in keys} == {0, 1}


def test_weights_are_the_best_ones_of_a_run(tmp_path):
    """A folder of a model by itself comes before those of a run, and best/ before last/."""
    for place in ("run/best", "run/last", "own"):
        (tmp_path / place).mkdir(parents=True)
        save(tmp_path / place / "model.safetensors", {"weight": torch.zeros(1)})
    save(tmp_path / "file.safetensors", {"weight": torch.zeros(1)})

    def found(path):
        return locate_weights(str(tmp_path / path))["file"].removeprefix(f"{tmp_path}/")

    assert found("run") == "run/best/model.safetensors"
    assert found("run/last") == "run/last/model.safetensors"
    assert found("own") == "own/model.safetensors"
    assert found("file.safetensors") == "file.safetensors"
    shutil.rmtree(tmp_path / "run" / "best")
    assert found("run") == "run/last/model.safetensors"
    released = locate_weights("nat_mini")
    assert "nat_mini" in released["url"] or "nat_mini" in str(released["hf_hub_id"])


def test_checkpointing_of_activations_and_layout_go_by_their_flags():
    for flag in (False, True):
        config = replace(BASE, run=RunConfig(grad_checkpointing=flag, channels_last=flag))
        model, source = build_models(config, 10, ALONE)
        assert (model.grad_checkpointing, source) == (flag, None)
        assert memory_format(config.run) == (torch.channels_last if flag else torch.contiguous_format)


def test_a_linear_probe_trains_the_classifier_and_nothing_else():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model.get_classifier = lambda: model[2]
    freeze(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
    model.eval()
    set_training_mode(model)
    assert [module.training for module in model] == [False, False, True]
    model.requires_grad_(True)
    set_training_mode(model)
    assert [module.training for module in model] == [True, True, True]


def test_an_attentive_probe_keeps_the_input_and_options_of_its_network(tmp_path):
    wanted = ModelConfig(name="nat_pico", probe="attentive", probe_queries=4, model_kwargs={"kernel_size": 5})
    model = build_model(wanted, 32, 6)
    plain = timm.create_model("nat_pico")
    assert model.pretrained_cfg["architecture"] == "attentive_probe"
    assert model.pretrained_cfg["mean"] == plain.pretrained_cfg["mean"]
    assert model.pretrained_cfg["input_size"] == plain.pretrained_cfg["input_size"]
    assert model.backbone.stages[0].blocks[0].attn.kernel_size == [5, 5]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 6)
    rebuilt = timm.create_model(f"local-dir:{save_model(tmp_path / 'probe', model)}", pretrained=True)
    assert rebuilt.backbone.stages[0].blocks[0].attn.kernel_size == [5, 5]
    assert len(rebuilt.head.pool.queries) == 4


# --- What a run shows


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00:00"),
        (59.6, "0:01:00"),
        (3599, "0:59:59"),
        (3600, "1:00:00"),
        (86399, "23:59:59"),
        (86400, "1 d 0:00:00"),
    ],
)
def test_durations(seconds, text):
    assert screen._duration(seconds) == text


def progress(**changes):
    values = {
        "epoch": 1,
        "done": 3,
        "total": 8,
        "loss": 1.5,
        "images_per_second": 99.6,
        "seconds_left": 61,
        "memory": 0,
    }
    return screen.Progress(**{**values, **changes})


def test_rates_for_people():
    assert progress(memory=1610612736).rates == "100 images/s  0:01:01 left  1.5 GiB"
    assert progress(seconds_left=math.nan).rates == "100 images/s  ? left  0.0 GiB"


def test_a_plain_line_comes_once_a_minute(monkeypatch, capsys):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock.now)
    lines = screen.PlainScreen(epochs=2)
    for now in (1059.9, 1060.0, 1119.9, 1120.0):
        clock.now = now
        lines.advance(progress(loss=now))
    shown = [line.split("loss ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1060.0000", "1120.0000"]


def test_a_bar_is_as_long_as_the_epoch_and_gives_way_to_the_next():
    bars = screen.TerminalScreen(epochs=5)
    try:
        bars.advance(progress())
        bars.advance(progress(done=4, loss=0.5))
        (bar,) = bars.bars.tasks
        assert (bar.description, bar.total, bar.completed, bar.fields["loss"]) == ("epoch 1/5", 8, 4, 0.5)
        bars.advance(progress(epoch=2, done=1))
        (bar,) = bars.bars.tasks
        assert (bar.description, bar.completed) == ("epoch 2/5", 1)
    finally:
        bars.close()


def test_the_first_process_alone_shows_anything(monkeypatch):
    assert type(screen.open_screen(False, 3)) is screen.SilentScreen
    assert type(screen.open_screen(True, 3)) is screen.PlainScreen


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_memory_is_in_bytes(monkeypatch, platform, unit):
    monkeypatch.setattr(screen.sys, "platform", platform)
    monkeypatch.setattr(screen.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert screen.peak_memory(CPU) == 5 * unit
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    assert screen.peak_memory(torch.device("cuda")) == 77


def test_throughput_counts_images_over_seconds(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("vicinal.train.loop.time.perf_counter", lambda: clock.now)
    meter = Meter()
    assert math.isnan(meter.seconds_for(3))
    clock.now = 102.0
    meter.add(64)
    meter.add(32)
    clock.now = 104.0
    assert (meter.seconds, meter.images_per_second, meter.seconds_for(5)) == (4.0, 24.0, 10.0)


def test_runs_are_named_by_model_and_data():
    config = TrainConfig(model=ModelConfig(name="local-dir:a/best"), data=DataConfig(name="hfds/you/cats"))
    assert default_output(config) == "runs/best-cats"
    assert default_output(TrainConfig()) == "runs/nat_pico-digits"


def test_cost_is_counted_in_multiply_accumulates_of_one_image():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.BatchNorm1d(8 * 8 * 4), nn.Linear(256, 5)
    )
    # 27 products for each of 8 x 8 x 4 outputs, and 256 for each of 5; batch norm needs evaluation for one image.
    assert dry_run.count_macs(model.train(), (16, 8), ALONE) == 27 * 8 * 8 * 4 + 256 * 5


def test_the_shown_schedule_runs_from_the_first_update_to_the_last():
    """Linear from .8 to 0 over 40 updates, seen at updates 0, 13, 26 and 39."""
    config = TrainConfig(
        optimizer=OptimizerConfig(lr=0.8),
        schedule=ScheduleConfig(epochs=4, schedule="linear", warmup_epochs=0, min_lr=0.0),
    )
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (0.5, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=0.8)
    parts = SimpleNamespace(
        scheduler=build_scheduler(optimizer, config.schedule, 10),
        updates_per_epoch=10,
        state=SimpleNamespace(optimizer=optimizer),
    )
    found = dry_run.learning_rates(config, parts, 4)
    assert found == pytest.approx([0.8, 0.54, 0.28, 0.02], rel=1e-12)


def test_bars_of_anything_above_zero_are_seen():
    assert list(dry_run.draw_bars([0.0, 0.01, 0.5, 1.0], 2)) == ["   █", " ▁██"]
    assert list(dry_run.draw_bars([0.0, 0.0], 1)) == [""]


@pytest.mark.parametrize(("right", "passes"), [(8, False), (9, True)])
def test_nine_tenths_of_a_batch_must_be_recognised(monkeypatch, capsys, right, passes):
    """After as many updates as asked for, all on the first batch, which nothing changes and no warm-up slows."""
    targets = torch.arange(10)
    guesses = torch.where(targets < right, targets, (targets + 1) % 10)
    seen = []

    class Counted:
        def __init__(self, config, *_):
            assert config.optimizer.accumulation == 1
            assert config.augmentation == AugmentationConfig(crop="none", hflip=0.0)

        def run(self, group, key):
            seen.append((group, key))
            return SimpleNamespace(loss=1.0 / len(seen))

    def build(config, world):
        batches = [(torch.zeros(10, 3, 4, 4), targets), "another"]
        network = nn.Identity()
        network.forward = lambda images: nn.functional.one_hot(guesses, 10).float()
        task = SimpleNamespace(get_trainable_module=lambda: network, get_eval_model=lambda: network)
        return SimpleNamespace(
            batches=Sampled(batches),
            state=SimpleNamespace(task=task),
            preprocess=None,
            val_preprocess=lambda *batch: batch,
        )

    monkeypatch.setattr(dry_run, "Updater", Counted)
    monkeypatch.setattr(dry_run, "build_components", build)
    config = TrainConfig(
        optimizer=OptimizerConfig(accumulation=4), augmentation=AugmentationConfig(mixup=0.8, hflip=0.5)
    )
    line = f"one batch of 10 images, 4 updates: loss 1.0000 to 0.2500, {10 * right}.0 % recognised"
    if passes:
        dry_run.overfit_batch(config, ALONE, 4)
        assert capsys.readouterr().out == line + "\n"
    else:
        with pytest.raises(RunStopped, match=line):
            dry_run.overfit_batch(config, ALONE, 4)
    assert len(seen) == 4
    assert all(group[0][1] is targets and len(group) == 1 and key == (0, 0) for group, key in seen)


class Sampled(list):
    """Batches with the sampler that a loader has."""

    sampler = SimpleNamespace(begin=lambda epoch: None)


def test_profile_covers_the_updates_after_five(monkeypatch, tmp_path):
    plans = []

    class Profiler:
        def __init__(self, activities, schedule, on_trace_ready):
            plans.append([schedule(step).name for step in range(9)])
            self.step_num, self.running = 0, False

        def start(self):
            self.running = True

        def step(self):
            self.step_num += 1

        def stop(self):
            self.running = False

    monkeypatch.setattr(profiling, "profile", Profiler)
    profiler = profiling.UpdateProfiler(3, tmp_path)
    inner = profiler._profiler
    said = [profiler.step() for _ in range(10)]
    assert plans == [["WARMUP"] * 5 + ["RECORD"] * 2 + ["RECORD_AND_SAVE"] + ["NONE"]]
    assert [line is not None for line in said] == [False] * 7 + [True] + [False] * 2
    assert said[7] == f"profile of 3 updates: {tmp_path / 'profile.txt'}, {tmp_path / 'profile.json'}"
    assert not inner.running
    assert profiling.UpdateProfiler(0, tmp_path).step() is None


# --- Records


def test_records_until_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"event": event, "epoch": epoch, "step": step}
        for event, epoch, step in (
            *(("step", 1, 1), ("step", 1, 2), ("epoch", 1, 2), ("skipped", 2, 3), ("epoch", 2, 3), ("step", 3, 4)),
        )
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    assert read_records(path) == lines
    assert read_records(path, last_step=3) == lines[:5]
    assert read_records(path, last_step=2) == lines[:3]
    assert read_records(path, last_epoch=1, last_step=3) == lines[:4]
    assert read_records(path, last_epoch=0, last_step=9) == [lines[0], lines[1], lines[3], lines[5]]
    assert read_records(tmp_path / "missing.jsonl") == []


def test_log_goes_on_after_its_records_and_tells_its_sinks(tmp_path):
    told = []
    sink = SimpleNamespace(add=told.append, close=lambda: told.append("closed"))
    old = [
        {"event": "step", "epoch": 1, "step": 1},
        {"event": "epoch", "epoch": 1, "step": 2, "val_top1": 50.0, "lr": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("what came after the checkpoint\n")
    log = MetricsLog(tmp_path / "log.jsonl", tmp_path / "log.csv", old, [sink])
    new = log.add("epoch", epoch=2, step=4, val_top1=75.0, extra="x")
    log.add("step", epoch=3, step=5)
    log.close()
    assert new == {"event": "epoch", "epoch": 2, "step": 4, "val_top1": 75.0, "extra": "x"}
    assert read_records(tmp_path / "log.jsonl") == [*old, new, {"event": "step", "epoch": 3, "step": 5}]
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "epoch,step,lr,train_loss,val_loss,val_top1,val_top5,val_images,images_per_second,seconds",
        *("1,2,0.5,,,50.0,,,,", "2,4,,,,75.0,,,,"),
    ]
    assert told == [new, {"event": "step", "epoch": 3, "step": 5}, "closed"]


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path):
    log = MetricsLog(tmp_path / "log.jsonl", tmp_path / "log.csv", [])
    log.jsonl = tmp_path
    with pytest.raises(RunStopped, match="cannot write"):
        log.add("step", step=1)


def test_scalars_of_tensorboard_are_the_numbers_of_a_record():
    written = []
    sink = object.__new__(TensorBoardSink)
    sink.writer = SimpleNamespace(add_scalar=lambda *given: written.append(given))
    sink.add({"event": "step", "step": 7, "epoch": 2, "train_loss": 0.5, "message": "text"})
    assert written == [("step/epoch", 2, 7), ("step/train_loss", 0.5, 7)]


# --- Signals and processes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_while_entered_and_not_after(name):
    number, noted = getattr(signal, name), []
    before = signal.signal(number, lambda *_: noted.append(name))
    try:
        with signals.StopRequest() as stop:
            assert stop.name is None
            os.kill(os.getpid(), number)
            assert stop.name == name
        assert noted == []
        os.kill(os.getpid(), number)
        assert noted == [name]
    finally:
        signal.signal(number, before)


def test_in_another_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGTERM)
    failed = []

    def enter():
        try:
            with signals.StopRequest():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_process_is_its_own_sum():
    assert (ALONE.sum(5), ALONE.any(True), ALONE.any(False)) == (5, True, False)
    assert (ALONE.all_gather("x"), ALONE.broadcast("x")) == (["x"], "x")
    assert (ALONE.is_primary, World(CPU, rank=1, size=2).is_primary) == (True, False)
    assert (ALONE.is_distributed, World(CPU, size=2).is_distributed) == (False, True)
    assert Arrival(torch.tensor([1.5, 2.0])).read() == [1.5, 2.0]


def test_the_first_process_that_fails_says_why():
    world = SimpleNamespace(all_gather=lambda message: [None, message, "later"])
    assert first_exception(world, UserError("disk")) == "disk"
    assert first_exception(world, ValueError()) == "ValueError"
    assert first_exception(ALONE, None) is None


def test_what_is_shared_is_the_first_processs(monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda world, value: [f"{value} of {rank}" for rank in range(3)])
    assert World(CPU, rank=1, size=3).broadcast("x") == "x of 0"


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:x", "cuda:1", "cuda:99"])
def test_devices_that_are_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"--device {device}"):
        join_world(device)


def test_a_process_knows_its_place(monkeypatch):
    joined = {"device": "cpu", "global_rank": 5, "local_rank": 1, "world_size": 8}
    monkeypatch.setattr(world, "init_distributed_device_so", lambda device, dist_url: joined)
    started = []
    monkeypatch.setattr(world.dist, "init_process_group", lambda backend, **given: started.append((backend, given)))
    assert join_world("cpu") == World(CPU, rank=5, local_rank=1, size=8)
    assert started == []
    join_world("cpu", needs_group=True)
    ((backend, given),) = started
    assert (backend, given["rank"], given["world_size"]) == ("gloo", 0, 1)


def test_a_restart_is_told_by_torchruns_count(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not world.is_restarted()
    for count, restarted in (("0", False), ("1", True), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert world.is_restarted() == restarted
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert world._meeting_point() == "env://"
    registered = []
    monkeypatch.setattr(world.dist, "register_rendezvous_handler", lambda *given: registered.append(given[0]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (world._meeting_point(), registered) == ("restarted://", ["restarted"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert world._meeting_point() == "env://"
