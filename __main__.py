"""The ``vicinal`` command: hands over to the rooms, and imports only the one it needs."""

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial

from . import __version__

USAGE = """usage: vicinal COMMAND [options]     (vicinal COMMAND --help lists them)

commands:
{commands}

options:
  --help, --version
{debug}"""

# What each command does, and the function that does it, which is imported when it is called.
COMMANDS = {
    "train": ("train an image classifier; torchrun -m vicinal.train runs it on several processes", "__main__:train"),
    "detect": (
        "train, test or show a detector (MMDetection); torchrun -m vicinal detect train ...",
        "eval.dense.command:detect",
    ),
    "segment": ("the same for semantic segmentation (MMSegmentation)", "eval.dense.command:segment"),
    "shapes": ("write synthetic scenes for both", "train.dense.shapes:main"),
    "eval": ("top-1 and top-5 accuracy of a checkpoint", "eval.classify:main"),
    "recipes": ("list the recipes of the package and their learning rates", "train.rates:main"),
    "data": ("check a data set: classes, counts, images that cannot be read", "train.data.check:main"),
    "plot": ("draw the curves of one run or several", "eval.plot:main"),
    "report": ("draw the picture of a run: curves, predictions, attention maps", "eval.report:main"),
    "models": ("list the models: size, cost, published accuracy", "eval.catalog:main"),
    "bench": ("measure operators, models or training", "eval.bench.command:main"),
    "doctor": ("versions, devices, and which backend each operator takes", "eval.doctor:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 stopped, 2 wrong usage or input."""
    from .errors import run_command

    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("-h", "--help", "help"):
        return run_command(partial(_print, _usage()), rest)
    if command == "--version":
        return run_command(partial(_print, f"vicinal {__version__}"), rest)
    return run_command(partial(_hand_over, command), rest)


def _usage() -> str:
    from .errors import DEBUG_HELP

    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, (what, _) in COMMANDS.items())
    return USAGE.format(commands=commands, debug=DEBUG_HELP)


def _print(text: str, _: Sequence[str]) -> int:
    print(text)
    return 0


def _hand_over(command: str, argv: Sequence[str]) -> int:
    from .errors import UserError, nearest

    if command not in COMMANDS:
        hint = nearest(command, COMMANDS, count=1) or "vicinal --help lists the commands"
        raise UserError(f"unknown command {command!r}; {hint}")
    _check_environment()
    module, function = COMMANDS[command][1].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)(argv)


def _check_environment() -> None:
    """Refuse a wrong VICINAL_KERNELS before the first operator does, in the middle of the work."""
    if os.environ.get("VICINAL_KERNELS"):
        from .errors import UserError
        from .kernels.dispatch import selected_backend

        try:
            selected_backend()
        except ValueError as error:
            raise UserError(str(error)) from error


def train(argv: Sequence[str]) -> int:
    """Run ``vicinal train``; returns its exit code."""
    from .train import loop
    from .train.dry_run import dry_run, overfit_batch
    from .train.recipe import parse_command
    from .train.run.world import join_world, leave_world

    arguments = parse_command(argv)
    config, outcome = arguments.run_config, None
    world = join_world(config.run.device, needs_group=config.run.parallel == "fsdp")
    if world.is_primary:
        for note in arguments.notes:
            print(note)
    try:
        if arguments.dry_run:
            dry_run(config, world)
        elif arguments.overfit_batch:
            overfit_batch(config, world, arguments.overfit_batch)
        else:
            outcome = loop.train(config, world)
    finally:
        leave_world()
    if world.is_primary and outcome is not None:
        _conclude(outcome, config.run.report)
    return 0


def _conclude(outcome, draws_report: bool) -> None:
    """Say what came out and where it lies; drawing is the evaluation's task, which training does not know of."""
    folder = outcome.folder
    if draws_report:
        from .eval.report import draw_report

        draw_report(folder.path)
    print(f"val accuracy: {outcome.top1:.2f} % (best {outcome.best_top1:.2f} % in epoch {outcome.best_epoch})")
    print(f"checkpoint: {folder.path / 'best'}")
    if draws_report:
        print(f"picture: {folder.report}")


if __name__ == "__main__":
    sys.exit(main())
