import pytest

from vicinal.train.config import AugmentationConfig, DataConfig, TrainConfig
from vicinal.train.errors import UserError
from vicinal.train.recipe import find_recipe, list_recipes, parse_arguments, read_recipe, write_recipe


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
        (["--max-broken", "-1"], "--max-broken -1"),
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
