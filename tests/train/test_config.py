import dataclasses
import math
import re
import typing
from io import BytesIO, TextIOWrapper

import pytest

from vicinal.command import flag_of
from vicinal.errors import UserError
from vicinal.train.config import (
    SECTIONS,
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from vicinal.train.recipe import (
    find_recipe,
    list_recipes,
    parse_arguments,
    parse_command,
    read_recipe,
    write_recipe,
)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_command_line_overrides_recipe_overrides_defaults(recipe):
    path = recipe("optimizer: {lr: 0.25, weight_decay: 0.125}\nschedule: {epochs: 7}\n")
    config = parse_arguments(["--config", str(path), "--lr", "0.5"])
    assert config.optimizer.lr == 0.5
    assert config.optimizer.weight_decay == 0.125
    assert config.schedule.epochs == 7
    assert config.optimizer.label_smoothing == TrainConfig().optimizer.label_smoothing


def test_command_line_overrides_in_any_position(recipe):
    path = recipe("schedule: {epochs: 7}\n")
    assert parse_arguments(["--epochs", "9", f"--config={path}"]).schedule.epochs == 9


def test_switches_of_a_recipe_can_be_turned_off(recipe):
    path = recipe("run: {report: true, channels_last: true}\n")
    config = parse_arguments(["--config", str(path), "--no-report"])
    assert (config.run.report, config.run.channels_last) == (False, True)


def test_written_recipe_reads_back_equal(tmp_path):
    config = parse_arguments(
        ["--model-kwargs", "kernel_size=5", "qkv_bias=false", "--mean", "0.1", "0.2", "0.3", "--scale", "0.5", "1"]
    )
    assert config.model.model_kwargs == {"kernel_size": 5, "qkv_bias": False}
    write_recipe(config, tmp_path / "config.yaml")
    assert TrainConfig(**read_recipe(tmp_path / "config.yaml")) == config


def test_numbers_that_yaml_takes_for_strings(recipe):
    sections = read_recipe(
        recipe("optimizer: {lr: 1e-3, optimizer_kwargs: {eps: 1e-6}}\nschedule: {warmup_epochs: 2}\n")
    )
    assert sections["optimizer"].lr == 1e-3
    assert sections["optimizer"].optimizer_kwargs == {"eps": 1e-6}
    assert isinstance(sections["schedule"].warmup_epochs, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "unknown key 'optimiser'; did you mean optimizer?"),
        ("optimizer: {weight_decy: 1}", "unknown key 'weight_decy'; did you mean weight_decay?"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected float, got 'fast'"),
        ("schedule: {epochs: 2.5}", "schedule.epochs: expected int, got 2.5"),
        ("run: {report: 1}", "run.report: expected bool, got 1"),
        ("run: {precision: half}", "expected one of auto, float32, bfloat16, float16, got 'half'"),
        ("data: {mean: [0.5]}", "data.mean: expected"),
        ("optimizer: [1, 2]", "expected a mapping"),
        ("optimizer: {lr: -1}", "--lr -1.0: must be positive"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_recipe_errors_say_what_is_wrong(recipe, text, message):
    with pytest.raises(UserError) as caught:
        read_recipe(recipe(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--batch-size", "33", "--mixup", "0.2"], "--batch-size 33 is odd"),
        (["--batch-size", "33", "--cutmix", "1"], "--batch-size 33 is odd"),
        (["--warmup-epochs", "10", "--epochs", "10"], "--warmup-epochs 10"),
        (["--min-lr", "1"], "--min-lr 1"),
        (["--ema-warmup"], "--ema-decay"),
        (["--random-erasing", "1.5"], "--random-erasing 1.5"),
        (["--val-fraction", "0"], "--val-fraction 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--save-interval", "0"], "--save-interval 0"),
        (["--keep", "0"], "--keep 0"),
        (["--max-unreadable", "-1"], "--max-unreadable -1"),
        (["--max-skips", "-1"], "--max-skips -1"),
        (["--overfit-batch", "-1"], "--overfit-batch -1"),
        (["--sharded-checkpoints"], "add it, or leave the flag out"),
        (["--parallel", "fsdp", "--clip-grad", "1", "--clip-mode", "agc"], "use --clip-mode norm"),
    ],
)
def test_cross_checks_name_the_flag(arguments, flag):
    with pytest.raises(UserError, match=flag):
        parse_arguments(arguments)


def test_odd_batch_is_fine_without_mixing():
    assert TrainConfig(data=DataConfig(batch_size=33), augmentation=AugmentationConfig()).data.batch_size == 33


def test_packaged_recipe_is_found_by_name():
    assert find_recipe("first_run").samefile(find_recipe("configs/first_run.yaml"))


def test_every_packaged_recipe_is_valid_and_opens_with_its_command():
    recipes = list_recipes()
    assert len(recipes) > 70
    for path in recipes:
        assert set(read_recipe(path)) == {"model", "data", "augmentation", "optimizer", "schedule", "run"}
        opening = "".join(path.read_text().splitlines(keepends=True)[:6])
        assert "vicinal train --config" in opening or "vicinal.train --config" in opening


# Of every number of a run's configuration: values that are refused beside values at the edge that are not.
NAN, INF = math.nan, math.inf
NUMBERS = {
    "drop_path_rate": ([-0.1, 1.0, NAN], [0.0, 0.999]),
    "probe_queries": ([0, 2.5, 2**63], [1]),
    "teacher_weight": ([0.0, 1.1, NAN], [1.0]),
    "img_size": ([0, -4, True], [1]),
    "batch_size": ([0, -1, "8"], [1]),
    "workers": ([-1], [0]),
    "val_fraction": ([0.0, 1.0, NAN], [0.001, 0.999]),
    "split_seed": ([-1, 2**63], [0]),
    "mean": ([(0.5, 0.5, 1.1), (-0.1, 0.5, 0.5), (NAN, 0.5, 0.5)], [(0.0, 0.0, 1.0)]),
    "std": ([(0.0, 1.0, 1.0), (0.2, 0.2, 58.0)], [(1.0, 1.0, 0.001)]),
    "crop_pct": ([0.0, 1.01], [1.0]),
    "max_unreadable": ([-1], [0]),
    "stream_lanes": ([0], [1]),
    "shuffle_buffer": ([-1], [0]),
    "scale": ([(0.0, 1.0), (0.5, 1.1), (0.5, 0.4), (NAN, 1.0)], [(0.5, 0.5), (0.001, 1.0)]),
    "shift": ([-0.1, 1.0], [0.0, 0.999]),
    "hflip": ([-0.1, 1.1, NAN], [0.0, 1.0]),
    "color_jitter": ([-0.1, NAN, INF], [0.0, 2.0]),
    "random_erasing": ([-0.1, 1.1], [0.0, 1.0]),
    "repeats": ([0], [1]),
    "mixup": ([-0.1, NAN, INF], [0.0, 8.0]),
    "cutmix": ([-0.1, NAN], [0.0, 1.0]),
    "mixup_prob": ([-0.1, 1.1], [0.0, 1.0]),
    "mixup_switch_prob": ([-0.1, 1.1], [0.0, 1.0]),
    "lr": ([0.0, -1.0, NAN, INF, 10**400], [1e-12, 1e12]),
    "lr_base_size": ([0], [1]),
    "weight_decay": ([-0.1, NAN, INF], [0.0]),
    "layer_decay": ([0.0, 1.1], [1.0]),
    "label_smoothing": ([-0.1, 1.0], [0.0, 0.999]),
    "clip_grad": ([0.0, NAN, INF], [1e-9]),
    "accumulation": ([0], [1]),
    "max_skips": ([-1], [0]),
    "epochs": ([0, -1, 2.5], [1]),
    "warmup_epochs": ([-0.1, 100.0, NAN, INF], [0.0, 99.0]),
    "warmup_lr": ([-1e-9, NAN], [0.0]),
    "cooldown_epochs": ([-1, 100], [0, 99]),
    "min_lr": ([-1e-9, NAN], [0.0]),
    "seed": ([-1, 2**63], [0, 2**63 - 1]),
    "threads": ([-1, 4097], [0, 4096]),
    "ema_decay": ([0.0, 1.0, 2.0, NAN], [0.5]),
    "save_interval": ([0], [1]),
    "save_epochs": ([0], [1]),
    "keep": ([0], [1]),
    "log_interval": ([0], [1]),
    "profile": ([-1], [0]),
}
SPECIAL = {"num_classes", "bce_threshold"}  # allowed beside another option only


def test_every_number_has_its_bounds():
    numeric = set()
    for section in SECTIONS.values():
        for name, hint in typing.get_type_hints(section).items():
            parts = {hint, *typing.get_args(hint)}
            if {int, float} & parts.union(*(typing.get_args(part) for part in parts)):
                numeric.add(name)
    assert numeric == NUMBERS.keys() | SPECIAL


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_bounds_name_the_flag_and_what_was_given(name):
    section = next(s for s in SECTIONS.values() if name in {field.name for field in dataclasses.fields(s)})
    refused, allowed = NUMBERS[name]
    for value in refused:
        with pytest.raises(UserError) as caught:
            section(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{flag_of(section, name)} ")
        assert re.search("must|expected|does not fit|leave nothing|comes first", message)
    for value in allowed:
        assert getattr(section(**{name: value}), name) == value


def test_bounds_that_go_with_another_option():
    assert OptimizerConfig(loss="bce", bce_threshold=0.0).bce_threshold == 0
    with pytest.raises(UserError, match=r"--bce-threshold 1.0: must lie in \[0, 1\)"):
        OptimizerConfig(loss="bce", bce_threshold=1.0)
    with pytest.raises(UserError, match="--num-classes 0: must be at least 1"):
        DataConfig(name="wds/x", num_classes=0)
    assert AugmentationConfig(crop="rkrr", scale=(0.5, 1.5)).scale == (0.5, 1.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(loss="bc"), "--loss bc: must be one of ce, bce; did you mean bce?"),
        (lambda: ScheduleConfig(schedule="cosin"), "--schedule cosin: .* did you mean cosine?"),
        (lambda: AugmentationConfig(crop="rcc"), "--crop rcc: must be one of rrc, rkrr, rkrc, shift, none"),
        (lambda: RunConfig(precision="half"), "--precision half: must be one of auto, float32"),
        (lambda: DataConfig(interpolation="nearest"), "--interpolation nearest: must be one of bilinear, bicubic"),
        (lambda: ModelConfig(probe="linaer"), "--probe linaer: .* did you mean linear?"),
        (lambda: ModelConfig(model_kwargs={"in_chans": 1}), "--model-kwargs in_chans=1: images are read as RGB"),
        (lambda: ModelConfig(model_kwargs={"num_classes": 3}), "num_classes=3: .* comes from the data"),
        (lambda: ModelConfig(model_kwargs={"features_only": True}), "features_only=True: a classifier is trained"),
        (lambda: ModelConfig(drop_path_rate=0.1, model_kwargs={"drop_path_rate": 0.2}), "say the same"),
        (lambda: OptimizerConfig(optimizer_kwargs={"lr": 3}), "--optimizer-kwargs lr=3: use --lr"),
    ],
)
def test_python_refuses_as_the_command_line_does(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    assert ModelConfig(model_kwargs={"in_chans": 3}).model_kwargs == {"in_chans": 3}


@pytest.mark.parametrize(
    ("arguments", "warmup", "cooldown", "notes"),
    [
        ([], 5, 0, 0),
        (["--epochs", "6"], 5, 0, 0),
        (["--epochs", "5"], 0.25, 0, 1),
        (["--epochs", "1"], 0.05, 0, 1),
        (["--epochs=4"], 0.2, 0, 1),
        (["--epochs", "300", "--epochs", "2"], 0.1, 0, 1),
        (["--epochs", "3", "--warmup-epochs", "2"], 2, 0, 0),
        (["--config", "imagenet/nat_mini", "--epochs", "40"], 20, 10, 0),
        # 20 of the recipe's 310 epochs are warm-up and 10 are cool-down
        (["--config", "imagenet/nat_mini", "--epochs", "30"], 2, 0, 2),
        (["--cooldown-epochs", "97"], 0.15, 97, 1),
    ],
)
def test_a_warm_up_that_nobody_gave_keeps_its_share_of_a_short_run(arguments, warmup, cooldown, notes):
    command = parse_command(arguments)
    assert command.schedule.warmup_epochs == pytest.approx(warmup, rel=1e-12)
    assert command.schedule.cooldown_epochs == cooldown
    assert len(command.notes) == notes
    if notes:
        assert re.match(r"--warmup-epochs \d+ does not fit in --epochs \d+", command.notes[0])


def test_a_warm_up_that_was_given_is_refused_where_it_does_not_fit(recipe):
    with pytest.raises(UserError, match=r"--warmup-epochs 5\.0 does not fit in --epochs 3: lower it or raise --epochs"):
        parse_arguments(["--epochs", "3", "--warmup-epochs", "5"])
    with pytest.raises(UserError, match=r"--warmup-epochs 5\.0 does not fit in --epochs 3"):
        read_recipe(recipe("schedule: {epochs: 3, warmup_epochs: 5}"))
    assert read_recipe(recipe("schedule: {epochs: 3}"))["schedule"].warmup_epochs == pytest.approx(0.15)
    assert [ScheduleConfig(epochs=epochs).warmup_epochs for epochs in (2, 5, 6)] == pytest.approx([0.1, 0.25, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--epochs", "2.5"], "--epochs 2.5: expected a whole number"),
        (["--img-size", "x"], "--img-size x: expected a whole number"),
        (["--drop-path-rate", "x"], "--drop-path-rate x: expected a number"),
        (["--mean", "0", "0"], "--mean 0 0: takes 3 values, was given 2"),
        (["--schedule", "cosin"], "--schedule cosin: must be one of cosine, linear, constant; did you mean cosine?"),
        (["--interpolation", "bicubik"], "--interpolation bicubik: must be one of .*did you mean bicubic?"),
        (["--epcohs", "3"], "Unrecognized options: --epcohs, 3; did you mean --epochs?"),
        (["surplus"], r"Unrecognized options: surplus \(vicinal train --help"),
        (["--lr"], "Missing value for argument '--lr'"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_refusals_of_the_parser_are_one_line(arguments, message, encoding, monkeypatch):
    # The parser draws its frames with what standard output can show.
    monkeypatch.setattr("sys.stdout", TextIOWrapper(BytesIO(), encoding=encoding))
    with pytest.raises(UserError, match=f"^vicinal train: {message}") as caught:
        parse_arguments(arguments)
    assert not {"──", "---", "Argument helptext"} & set(str(caught.value).split())
