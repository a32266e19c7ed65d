"""What an update, a schedule and an augmented batch are, against numbers worked out here."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.task import ClassificationTask
from torch import nn

import vicinal.zoo  # noqa: F401  registers the models
from vicinal.checkpoints import save_model
from vicinal.train.build import build_optimizer, build_scheduler, build_task, record_input
from vicinal.train.config import (
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from vicinal.train.data.images import UnreadableImage
from vicinal.train.data.loader import IGNORED_TARGET
from vicinal.train.data.order import SampleKey
from vicinal.train.data.transforms import (
    EvalDataset,
    InputSpec,
    Preprocess,
    TrainDataset,
    eval_transform,
    train_transform,
)
from vicinal.train.network.create import build_model
from vicinal.train.run.randomness import seed_all, seed_host, stream_seed
from vicinal.train.run.state import TrainState
from vicinal.train.run.world import Arrival, World
from vicinal.train.update import Updater, groups_of

CPU = torch.device("cpu")
ALONE = World(CPU)
SPEC = InputSpec((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
SGD = OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.0, optimizer_kwargs={"momentum": 0.0, "nesterov": False})


class Tiny(nn.Module):
    """Three features of an image, normalised over the batch if asked to, and a linear classifier."""

    def __init__(self, batch_norm: bool = False):
        super().__init__()
        self.norm = nn.BatchNorm1d(3) if batch_norm else nn.Identity()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.norm(x.mean((2, 3))))


def as_given(images, targets):
    return images, targets


def make_updater(optimizer=SGD, run=None, model=None, preprocess=as_given, world=ALONE, **options):
    """An updater of a tiny network without smoothing, at the rate of the configuration."""
    config = TrainConfig(optimizer=replace(optimizer, label_smoothing=0.0), run=run or RunConfig(precision="float32"))
    torch.manual_seed(0)
    model = model or Tiny()
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=CPU, verbose=False)
    if config.run.ema_decay is not None:
        task.setup_ema(decay=config.run.ema_decay, use_warmup=config.run.ema_warmup)
    scaler = torch.amp.GradScaler("cpu") if config.run.precision == "float16" else None
    state = TrainState(task, build_optimizer(model, config.optimizer), scaler)
    return Updater(config, world, state, preprocess, **options)


def batch_of(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 4, 4, generator=generator), torch.randint(4, (size,), generator=generator)


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def change(model, before):
    return torch.cat([(parameter - before[name]).detach().flatten() for name, parameter in model.named_parameters()])


# --- The update


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_clipping_bounds_the_step_in_every_precision(precision):
    """The gradient of float16 is multiplied by 65536; its norm counts without that."""
    updater = make_updater(replace(SGD, clip_grad=1e-3), RunConfig(precision=precision))
    model = updater.state.model
    before = parameters_of(model)
    updater.run([batch_of(0)], (0, 0))
    # A step is of 1e-3 on weights of order one: float32 leaves four digits of it.
    assert float(change(model, before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_clipping_by_value_and_against_the_weights():
    """By value each number counts by itself; adaptively the classifier is left alone and the rest goes by its norm."""
    images, targets = batch_of(0)
    steps = {}
    for mode, limit in (("norm", 1e9), ("value", 0.01), ("agc", 0.01)):
        model = Tiny(batch_norm=True)
        updater = make_updater(replace(SGD, clip_grad=limit, clip_mode=mode), model=model)
        nn.init.constant_(model.head.weight, 0.5)
        nn.init.constant_(model.head.weight[0], -2.0)
        before = parameters_of(model)
        updater.run([(images, targets)], (0, 0))
        steps[mode] = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    assert max(float(step.abs().max()) for step in steps["norm"].values()) > 0.1
    for name, step in steps["norm"].items():
        torch.testing.assert_close(steps["value"][name], step.clamp(-0.01, 0.01), rtol=0, atol=1e-6)
        if name.startswith("head"):
            torch.testing.assert_close(steps["agc"][name], step, rtol=0, atol=1e-6)
    # A hundredth of the norm of three ones.
    norm = steps["norm"]["norm.weight"]
    wanted = norm * (0.01 * 3**0.5 / norm.norm())
    assert norm.norm() > 0.02
    torch.testing.assert_close(steps["agc"]["norm.weight"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_is_the_mean_gradient_of_the_group(precision):
    """The last group of an epoch is smaller than the others: it is averaged over what it has."""
    updater = make_updater(run=RunConfig(precision=precision))
    model = updater.state.model
    batches = [batch_of(seed) for seed in range(3)]
    tolerance = 1e-6 if precision == "float32" else 2e-3
    for size in (2, 1):
        before = parameters_of(model)
        losses = [nn.functional.cross_entropy(model(images), targets) for images, targets in batches[:size]]
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses) / size, list(model.parameters()))])
        report = updater.run(batches[:size], (0, 0))
        torch.testing.assert_close(change(model, before), -wanted, rtol=tolerance, atol=tolerance)
        assert report.loss == pytest.approx(float(sum(losses).detach()) / size, rel=tolerance)
        assert (report.stop, report.unreadable, report.is_finite) == (False, 0, True)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert (updater.state.step, updater.state.skips) == (2, 0)


def test_groups_are_of_the_size_asked_for_and_the_last_holds_the_rest():
    assert list(groups_of(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(groups_of(range(4), 2)) == [[0, 1], [2, 3]]


def draws(rank=0, seed=0, key=(1, 64)):
    """What the batches of a group draw."""
    seen = []

    def preprocess(images, targets):
        seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return images, targets

    world = World(CPU, rank=rank)
    updater = make_updater(run=RunConfig(precision="float32", seed=seed), preprocess=preprocess, world=world)
    updater.run([batch_of(number) for number in range(3)], key)
    return seen


def test_every_batch_of_a_group_draws_its_own_numbers():
    """By run, epoch, place in the epoch, place in the group and process: all of these, and nothing else."""
    first = draws()
    assert draws() == first
    others = [draws(rank=1), draws(seed=1), draws(key=(2, 64)), draws(key=(1, 128))]
    for generator in range(3):
        drawn = [batch[generator] for batch in (*first, *(batch for other in others for batch in other))]
        assert len(set(drawn)) == 3 * 5


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(poison):
    run = RunConfig(precision="float32", ema_decay=0.5)
    optimizer = replace(SGD, optimizer_kwargs={"momentum": 0.9})
    updater = make_updater(optimizer, run, model=Tiny(batch_norm=True))
    state = updater.state
    updater.run([batch_of(0)], (0, 0))
    kept = {name: value.clone() for name, value in state.model.state_dict().items()}
    average = {name: value.clone() for name, value in state.weights(average=True).items()}
    momentum = [entry["momentum_buffer"].clone() for entry in state.optimizer.state.values()]
    images, targets = batch_of(1)
    report = updater.run([batch_of(2), (images * poison, targets)], (0, 1))
    assert not report.is_finite
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert all(torch.equal(value, average[name]) for name, value in state.weights(average=True).items())
    for entry, before in zip(state.optimizer.state.values(), momentum, strict=True):
        assert torch.equal(entry["momentum_buffer"], before)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (state.step, state.skips) == (2, 1)
    updater.run([batch_of(3)], (0, 2))
    assert (state.step, state.skips) == (3, 0)
    assert not torch.equal(state.model.norm.running_mean, kept["norm.running_mean"])


class Apart(World):
    """Two processes, of which the other one has half the loss, goes on, and found one unreadable image more."""

    def all_reduce(self, values):
        return Arrival(values + torch.stack([values[0] / 2, torch.tensor(0.0), torch.tensor(1.0)]))


def test_a_report_averages_the_loss_and_adds_up_the_rest_over_processes():
    alone = make_updater().run([batch_of(0)], (0, 0))
    updater = make_updater(world=Apart(CPU, size=2), should_stop=lambda: True, count_unreadable=lambda: 2)
    report = updater.run([batch_of(0)], (0, 0))
    assert report.loss == pytest.approx(0.75 * alone.loss, rel=1e-6)
    assert (report.stop, report.unreadable) == (True, 3)
    report = make_updater(world=Apart(CPU, size=2)).run([batch_of(0)], (0, 0))
    assert (report.stop, report.unreadable) == (False, 1)


# --- The moving average


@pytest.mark.parametrize("warmup", [False, True])
def test_moving_average_of_four_updates(warmup):
    """Decay .9; warmed up it is 1 - (1 + t) ** -2/3 after t updates: .370, .519, .603."""
    updater = make_updater(run=RunConfig(precision="float32", ema_decay=0.9, ema_warmup=warmup))
    state, average = updater.state, None
    for number, decay in enumerate(
        (0.0, *((0.37003947505256, 0.519250143230866, 0.603149737007950) if warmup else [0.9] * 3))
    ):
        updater.run([batch_of(number)], (0, number))
        weight = state.weights(average=False)["head.weight"].double()
        average = weight if average is None else decay * average + (1 - decay) * weight
        torch.testing.assert_close(state.weights(average=True)["head.weight"].double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state.weights(average=True)["head.weight"], state.weights(average=False)["head.weight"])


def test_warmed_up_decay_ends_at_the_one_asked_for():
    updater = make_updater(run=RunConfig(precision="float32", ema_decay=0.4, ema_warmup=True))
    average = updater.state.task.get_trainable_module(ema=True)
    assert [round(average.get_decay(step), 6) for step in (1, 2, 3, 1000)] == [0.0, 0.370039, 0.4, 0.4]


# --- Groups of parameters


LAYERS_OF_NAT_PICO = (
    "stem.",
    "stages.0.blocks.0.",
    "stages.1.",
    "stages.2.downsample. stages.2.blocks.0.",
    "stages.2.blocks.1.",
    "stages.2.blocks.2.",
    "stages.3. norm.",
    "head.",
)


def test_layer_decay_reaches_every_parameter():
    """The head learns at the whole rate, each layer at half of the one above, the stem at 1/128."""
    model = timm.create_model("nat_pico")
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.25, layer_decay=0.5))
    build_scheduler(optimizer, ScheduleConfig(schedule="constant", epochs=2, warmup_epochs=0), 10).step_update(3)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        (layer,) = (n for n, starts in enumerate(LAYERS_OF_NAT_PICO) if name.startswith(tuple(starts.split())))
        assert rates[id(parameter)] == 0.25 * 0.5 ** (7 - layer), name


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_norms_biases_and_tables_are_not_decayed(layer_decay):
    model = timm.create_model("nat_pico")
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.125, layer_decay=layer_decay))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith("relative_position_bias")
        assert decay[id(parameter)] == (0.0 if exempt else 0.125), name


def test_options_reach_the_optimizer():
    options = {"betas": [0.8, 0.95], "eps": 1e-6}
    optimizer = build_optimizer(Tiny(), OptimizerConfig(lr=0.25, weight_decay=0.5, optimizer_kwargs=options))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.25, (0.8, 0.95), 1e-6)
    assert isinstance(build_optimizer(Tiny(), OptimizerConfig(optimizer="lamb")), timm.optim.Lamb)


def test_factors_of_the_model_multiply_with_those_of_the_layers():
    model = Tiny()
    model.learning_rate_scales = lambda: {"head.weight": 0.25}
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0))
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(model.head.weight)] == 0.25
    assert scales[id(model.head.bias)] == 1.0


# --- Schedules


def learning_rates(schedule, updates, updates_per_epoch=10):
    optimizer = build_optimizer(Tiny(), replace(SGD, lr=1.0))
    scheduler, found = build_scheduler(optimizer, schedule, updates_per_epoch), []
    for update in updates:
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


SIX = {"epochs": 6, "warmup_epochs": 2, "warmup_lr": 0.1, "min_lr": 0.02}
FIRST = {0: 0.1, 1: 0.145, 10: 0.55, 19: 0.955}
"""Twenty updates of warm-up from .1 to 1, by .045 each."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # .02 + .49 (1 + cos(pi t / 50)) until update 50, then the lowest rate.
        (
            {"schedule": "cosine", "cooldown_epochs": 1},
            {20: 0.02 + 0.49 * (1 + math.cos(0.4 * math.pi)), 25: 0.51, 40: 0.02 + 0.49 * (1 + math.cos(0.8 * math.pi))}
            | {50: 0.02, 59: 0.02},
        ),
        ({"schedule": "cosine"}, {20: 0.02 + 0.49 * 1.5, 30: 0.51, 40: 0.02 + 0.49 * 0.5}),
        # .02 + .98 (1 - t / 50): .0196 less by each update.
        ({"schedule": "linear", "cooldown_epochs": 1}, {20: 0.608, 30: 0.412, 49: 0.0396, 50: 0.02, 59: 0.02}),
        ({"schedule": "linear"}, {20: 0.02 + 0.98 * 2 / 3, 30: 0.51, 59: 0.02 + 0.98 / 60}),
        ({"schedule": "constant"}, {20: 1.0, 41: 1.0, 59: 1.0}),
    ],
    ids=["cosine, cool-down", "cosine", "linear, cool-down", "linear", "constant"],
)
def test_rates_of_each_schedule_by_hand(options, expected):
    expected = FIRST | expected
    found = learning_rates(ScheduleConfig(**SIX, **options), expected)
    assert found == pytest.approx(list(expected.values()), rel=1e-12)


def test_part_of_an_epoch_is_warmed_up():
    found = learning_rates(ScheduleConfig(schedule="constant", epochs=3, warmup_epochs=0.5, warmup_lr=0.0), range(7))
    assert found == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1], rel=1e-12)


def test_rates_and_losses_of_accumulated_batches(train, jpeg_tree, records):
    """24 images in batches of 8, two to an update: updates of two and of one, whose losses count by their batches."""
    arguments = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 8, "--accumulation", 2, "--epochs", 3)
    # Where layers differ, the largest rate is told.
    rates = ("--schedule", "linear", "--lr", 6e-3, "--min-lr", 0, "--warmup-lr", 0, "--layer-decay", 0.5)
    _, folder = train(*arguments, *rates)
    steps = [record for record in records(folder) if record["event"] == "step"]
    epochs = [record for record in records(folder) if record["event"] == "epoch"]
    # Six updates in all: the rate falls by a sixth with each.
    assert [record["lr"] for record in steps] == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3], rel=1e-9)
    assert [record["epoch"] for record in steps] == [1, 1, 2, 2, 3, 3]
    for number, record in enumerate(epochs):
        first, second = (step["train_loss"] for step in steps[2 * number : 2 * number + 2])
        assert record["train_loss"] == pytest.approx((2 * first + second) / 3, rel=1e-12)
        assert (record["step"], record["lr"]) == (2 * number + 2, steps[2 * number + 1]["lr"])


# --- Losses


LOGITS = torch.tensor([[2.0, -1.0, 0.5]])


def loss_of(targets, mixes=False, **options):
    """The loss that a task built from these options gives for fixed logits."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[1].weight)
    config = TrainConfig(
        optimizer=OptimizerConfig(**options), augmentation=AugmentationConfig(mixup=0.8 if mixes else 0.0)
    )
    return float(build_task(model, None, config, ALONE)(LOGITS[:, :, None, None], targets)["loss"].detach())


def cross_entropy(targets):
    return -sum(t * float(x) for t, x in zip(targets, LOGITS.double().log_softmax(1)[0], strict=True))


def binary_cross_entropy(targets):
    """Mean over the classes of -t log s(x) - (1 - t) log s(-x)."""
    losses = [
        math.log1p(math.exp(-x)) * t + math.log1p(math.exp(x)) * (1 - t)
        for t, x in zip(targets, LOGITS[0].tolist(), strict=True)
    ]
    return sum(losses) / 3


CLASS_1, MIXED = torch.tensor([1]), torch.tensor([[0.7, 0.15, 0.15]])


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        (CLASS_1, {"label_smoothing": 0.0}, cross_entropy([0, 1, 0])),
        (CLASS_1, {"label_smoothing": 0.3}, cross_entropy([0.1, 0.8, 0.1])),
        (CLASS_1, {"label_smoothing": 0.0, "loss": "bce"}, binary_cross_entropy([0, 1, 0])),
        (CLASS_1, {"label_smoothing": 0.3, "loss": "bce"}, binary_cross_entropy([0.1, 0.8, 0.1])),
        # Mixing has smoothed these targets already.
        (MIXED, {"label_smoothing": 0.3, "mixes": True}, cross_entropy([0.7, 0.15, 0.15])),
        (MIXED, {"label_smoothing": 0.3, "mixes": True, "loss": "bce"}, binary_cross_entropy([0.7, 0.15, 0.15])),
        (MIXED, {"mixes": True, "loss": "bce", "bce_threshold": 0.2}, binary_cross_entropy([1, 0, 0])),
        (MIXED, {"mixes": True, "loss": "bce", "bce_threshold": 0.1}, binary_cross_entropy([1, 1, 1])),
    ],
)
def test_losses_by_hand(targets, options, expected):
    assert loss_of(targets, **options) == pytest.approx(expected, rel=1e-6)


def test_student_learns_the_teachers_guesses_at_its_share(tmp_path):
    """The teacher sees the image in its own normalisation, and as in evaluation."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=10)
    record_input(teacher, InputSpec((32, 32), (0.1,) * 3, (0.25,) * 3, "bilinear", 1.0), list("0123456789"))
    for norm in (module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    save_model(tmp_path / "teacher", teacher)
    options = {"model_kwargs": {"distilled": True}, "teacher": f"local-dir:{tmp_path / 'teacher'}"}
    wanted = ModelConfig(name="shvit_pico_vicinal", teacher_weight=0.25, **options)
    student = build_model(wanted, 32, 10)
    record_input(student, SPEC, list("0123456789"))
    task = build_task(student, None, TrainConfig(model=wanted, optimizer=OptimizerConfig(label_smoothing=0.2)), ALONE)
    images, targets = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    assert not task.teacher.model.training
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    guesses = teacher.eval()((images * 0.5 + 0.5 - 0.1) / 0.25).argmax(1)
    assert len(set(guesses.tolist())) > 1
    student.train()
    labels, distilled = student(images)
    smooth = nn.functional.cross_entropy(labels, targets, label_smoothing=0.2)
    expected = 0.75 * smooth + 0.25 * nn.functional.cross_entropy(distilled, guesses)
    torch.testing.assert_close(task(images, targets)["loss"], expected, rtol=1e-6, atol=1e-6)


# --- Images


def picture(height=48, width=40):
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_array(tensor):
    return tensor.permute(1, 2, 0).numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)


@pytest.mark.parametrize(("name", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize(("crop_pct", "resized"), [(1.0, 32), (0.875, 36)])
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(name, resample, crop_pct, resized):
    spec = SPEC._replace(interpolation=name, crop_pct=crop_pct)
    found = as_array(eval_transform(spec)(picture()))
    height = int(48 * resized / 40)
    whole = np.asarray(picture().resize((resized, height), resample))
    top, left = round((height - 32) / 2), (resized - 32) // 2
    np.testing.assert_array_equal(found, whole[top : top + 32, left : left + 32])


def test_values_of_the_configuration_come_before_the_models_own():
    own = {
        "input_size": (3, 64, 48),
        "mean": (0.1,) * 3,
        "std": (0.2,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }
    assert InputSpec.resolve(DataConfig(), own) == ((64, 48), (0.1,) * 3, (0.2,) * 3, "bicubic", 0.9)
    given = {"img_size": 96, "mean": (0.3,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear", "crop_pct": 0.5}
    resolved = InputSpec.resolve(DataConfig(**given), own)
    assert resolved == ((96, 96), (0.3,) * 3, (0.4,) * 3, "bilinear", 0.5)
    assert resolved.as_pretrained_cfg() == {
        **{"input_size": (3, 96, 96), "mean": (0.3,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear"},
        "crop_pct": 0.5,
    }


def test_a_saved_model_carries_its_input_and_classes():
    model = timm.create_model("nat_pico", num_classes=2)
    record_input(model, InputSpec((40, 48), (0.1,) * 3, (0.2,) * 3, "bilinear", 0.75), ["cat", "dog"])
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["test_input_size"]) == ((3, 40, 48), None)
    assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"]) == (
        (0.1,) * 3,
        (0.2,) * 3,
        "bilinear",
        0.75,
    )
    assert (cfg["num_classes"], cfg["label_names"]) == (2, ["cat", "dog"])


@pytest.mark.parametrize("crop", ["none", "shift"])
@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_images_are_flipped_where_they_must_be(crop, hflip):
    transform = train_transform(AugmentationConfig(crop=crop, shift=0.0, hflip=hflip), SPEC)
    still = as_array(eval_transform(SPEC)(picture()))
    np.testing.assert_array_equal(as_array(transform(picture())), still[:, ::-1] if hflip else still)


def test_shifts_reach_their_share_of_each_side_and_no_further():
    """An image of 16 x 32 px on black: an eighth is 2 rows and 4 columns."""
    spec = SPEC._replace(img_size=(16, 32))
    transform = train_transform(AugmentationConfig(crop="shift", shift=0.125, hflip=0.0), spec)
    white, down, right = Image.new("RGB", (32, 16), (255, 255, 255)), set(), set()
    for seed in range(150):
        seed_host(seed)
        lit = transform(white)[0] > 0
        rows, columns = lit.any(1), lit.any(0)
        down.add(int(16 - rows.sum()) * (1 if not rows[0] else -1))
        right.add(int(32 - columns.sum()) * (1 if not columns[0] else -1))
    assert (down, right) == (set(range(-2, 3)), set(range(-4, 5)))


def transforms_of(**options):
    crop, change, _ = train_transform(AugmentationConfig(**options), SPEC).transforms
    return [*crop.transforms, *change.transforms] if hasattr(crop, "transforms") else [crop, *change.transforms]


def find(transforms, name):
    return next((transform for transform in transforms if type(transform).__name__ == name), None)


def test_options_of_the_augmentation_reach_timm():
    plain = transforms_of()
    crop = find(plain, "RandomResizedCropAndInterpolation")
    assert (tuple(crop.scale), tuple(crop.ratio), tuple(crop.size)) == ((0.08, 1.0), (3 / 4, 4 / 3), (32, 32))
    assert len(crop.interpolation) == 2  # bilinear or bicubic, by chance
    assert find(plain, "RandomHorizontalFlip").p == 0.5
    assert find(plain, "ColorJitter") is find(plain, "RandAugment") is None
    changed = transforms_of(scale=(0.25, 0.5), hflip=0.25, color_jitter=0.4)
    assert tuple(find(changed, "RandomResizedCropAndInterpolation").scale) == (0.25, 0.5)
    assert find(changed, "RandomHorizontalFlip").p == 0.25
    jitter = find(changed, "ColorJitter")
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.6, 1.4),) * 3
    policy = find(transforms_of(auto_augment="rand-m7-n3"), "RandAugment")
    assert (policy.num_layers, {op.magnitude for op in policy.ops}) == (3, {7})
    # What policies fill uncovered corners with is the mean colour.
    assert policy.ops[0].kwargs["fillcolor"] == (128, 128, 128)
    assert find(transforms_of(crop="rkrr"), "ResizeKeepRatio") is not None
    assert find(transforms_of(crop="none", hflip=0.25), "RandomHorizontalFlip").p == 0.25


IMAGES = torch.arange(4 * 3 * 32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8).view(4, 3, 32, 32)
LABELS = torch.arange(4)


def prepared(smoothing=0.1, **options):
    return Preprocess(SPEC, CPU, 4, smoothing, AugmentationConfig(**options))(IMAGES, LABELS)


NORMALISED = IMAGES.double() / 127.5 - 1


def test_targets_of_mixing_are_smoothed_where_nothing_is_mixed_too():
    images, targets = prepared(mixup=0.8, mixup_prob=0.0)
    expected = torch.full((4, 4), 0.025) + 0.9 * torch.eye(4)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(images.double(), NORMALISED, rtol=0, atol=1e-6)


def test_mixup_weighs_image_and_target_alike():
    seed_host(0)
    images, targets = prepared(mixup=1000.0, cutmix=1e-3, mixup_switch_prob=0.0)
    # Of Beta(1000, 1000): within .05 of a half.
    share = (float(targets[0, 0]) - 0.025) / 0.9
    assert share == pytest.approx(0.5, abs=0.05)
    assert share != 0.5
    expected = share * NORMALISED + (1 - share) * NORMALISED.flip(0)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)


def test_cutmix_replaces_a_rectangle_and_weighs_targets_by_its_area():
    seed_host(0)
    images, targets = prepared(mixup=1e-3, cutmix=1000.0, mixup_switch_prob=1.0)
    kept = (images.double() - NORMALISED).abs().amax(1) < 1e-5
    share = (float(targets[0, 0]) - 0.025) / 0.9
    assert 0.3 < share < 0.9
    assert float(kept[0].double().mean()) == pytest.approx(share, abs=2e-2)
    swapped = (images.double() - NORMALISED.flip(0)).abs().amax(1) < 1e-5
    assert (kept | swapped).all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_a_rectangle(mode):
    seed_host(1)
    images, targets = prepared(random_erasing=1.0, erasing_mode=mode)
    assert torch.equal(targets, LABELS)
    for image, plain in zip(images.double(), NORMALISED, strict=True):
        changed = ((image - plain).abs() > 1e-5).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        part = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # 2 % to a third of the image, up to the rounding of both sides.
        assert 0.01 < part[0].numel() / 1024 < 0.4
        assert len(part[0].unique()) == 1 if mode != "pixel" else len(part[0].unique()) == part[0].numel()
        assert (part == 0).all() if mode == "const" else (part != 0).any()


def test_erasing_comes_before_mixing_and_happens_at_its_rate():
    seed_host(0)
    preprocess = Preprocess(SPEC, CPU, 4, 0.0, AugmentationConfig(random_erasing=0.25, mixup=0.8))
    assert preprocess.erase.probability == 0.25
    preprocess.erase, preprocess.mix = lambda images: images * 0 + 2, lambda images, targets: (images + 1, targets)
    assert (preprocess(IMAGES, LABELS)[0] == 3).all()
    assert Preprocess(SPEC, CPU, 4).erase is Preprocess(SPEC, CPU, 4).mix is None


def test_layout_of_images():
    for layout in (torch.channels_last, torch.contiguous_format):
        images, _ = Preprocess(SPEC, CPU, 4, memory_format=layout)(IMAGES, LABELS)
        assert images.is_contiguous(memory_format=layout)


class Pictures:
    """Five images of one colour each; some cannot be read."""

    def __init__(self, *unreadable):
        self.unreadable, self.classes, self.targets = unreadable, list("abcde"), [4, 3, 2, 1, 0]

    def load(self, index):
        if index in self.unreadable:
            raise UnreadableImage(f"cannot read image {index}")
        return Image.new("RGB", (8, 8), (index * 10, 0, 0))


def colour_of(image):
    return torch.tensor(image.getpixel((0, 0)))


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_with_its_class():
    dataset = TrainDataset(Pictures(4, 0), colour_of, seed=0)
    image, target, messages = dataset[SampleKey(0, 4, 0)]
    # After the last image comes the first, which is unreadable too.
    assert (image.tolist(), target) == ([10, 0, 0], 3)
    assert messages == ("cannot read image 4", "cannot read image 0")
    assert dataset[SampleKey(0, 2, 0)][1:] == (2, ())


def test_val_images_that_cannot_be_read_are_black_and_not_counted():
    dataset = EvalDataset(Pictures(3), colour_of)
    assert (len(dataset), dataset[2][1:]) == (5, (2, ()))
    image, target, messages = dataset[3]
    assert (image.tolist(), target, messages) == ([0, 0, 0], IGNORED_TARGET, ("cannot read image 3",))


def test_changes_to_an_image_follow_run_epoch_image_and_repeat():
    def drawn(seed=0, epoch=0, index=0, repeat=0):
        dataset = TrainDataset(Pictures(), lambda _: (random.random(), np.random.rand(), float(torch.rand(()))), seed)
        return dataset[SampleKey(epoch, index, repeat)][0]

    assert drawn() == drawn()
    different = [drawn(), drawn(seed=1), drawn(epoch=1), drawn(index=1), drawn(repeat=1)]
    assert all(len(set(values)) == 5 for values in zip(*different, strict=True))


# --- Random streams


def test_streams_do_not_change_from_version_to_version():
    """A run goes on under another version with the numbers that it would have drawn."""
    assert stream_seed("batch", 0, 1, 2) == 4197818136551870457
    assert stream_seed("sample", 7) == 2773768320304521345
    assert stream_seed("order") == 7979482035644370722
    assert stream_seed("sample", -1, 2**40) == 3540231805261927885


@pytest.mark.parametrize("seed_them", [seed_host, seed_all])
def test_every_host_generator_is_seeded(seed_them):
    seed = 2**40 + 3
    seed_them(seed)
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(seed % 2**32).rand()
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(seed)))
