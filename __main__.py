"""The ``vicinal`` command: hands over to the rooms, and imports only the one it needs."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from . import __version__

USAGE = """usage: vicinal COMMAND [options]     (vicinal COMMAND --help lists them)

commands:
  train    train an image classifier; torchrun -m vicinal.train runs it on several processes
  detect   train, test or show a detector (MMDetection); torchrun -m vicinal detect train ...
  segment  the same for semantic segmentation (MMSegmentation)
  shapes   write synthetic scenes for both
  eval     top-1 and top-5 accuracy of a checkpoint
  recipes  list the recipes of the package and their learning rates
  data     check a data set: classes, counts, images that cannot be read
  plot     draw the curves of one run or several
  report   draw the picture of a run: curves, predictions, attention maps
  models   list the models: size, cost, published accuracy
  bench    measure operators or models
  doctor   versions, devices, and which backend each operator takes

options:
  --help, --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 stopped, 2 wrong usage or input."""
    from .train.errors import run_command

    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("-h", "--help", "help"):
        return run_command(partial(_print, USAGE), rest)
    if command == "--version":
        return run_command(partial(_print, f"vicinal {__version__}"), rest)
    return run_command(partial(_hand_over, command), rest)


def _print(text: str, _: Sequence[str]) -> int:
    print(text)
    return 0


def _hand_over(command: str, argv: Sequence[str]) -> int:
    from .train.errors import UserError, nearest

    runners = {
        "train": _train,
        "detect": partial(_dense, "detect"),
        "segment": partial(_dense, "segment"),
        "shapes": _shapes,
        "eval": _classify,
        "recipes": _recipes,
        "data": _data,
        "plot": _plot,
        "report": _report,
        "models": _models,
        "bench": _bench,
        "doctor": _doctor,
    }
    if command not in runners:
        hint = nearest(command, runners, count=1) or "vicinal --help lists the commands"
        raise UserError(f"unknown command {command!r}; {hint}")
    _check_environment()
    return runners[command](argv)


def _check_environment() -> None:
    """Refuse a wrong VICINAL_KERNELS before the first operator does, in the middle of the work."""
    if os.environ.get("VICINAL_KERNELS"):
        from .kernels.dispatch import selected_backend
        from .train.errors import UserError

        try:
            selected_backend()
        except ValueError as error:
            raise UserError(str(error)) from error


def _train(argv: Sequence[str]) -> int:
    from .train.distributed import join_world, leave_world
    from .train.loop import train
    from .train.recipe import parse_command
    from .train.rehearse import dry_run, overfit_batch

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
            outcome = train(config, world)
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
    print(f"held-out accuracy: {outcome.top1:.2f} % (best {outcome.best_top1:.2f} % in epoch {outcome.best_epoch})")
    print(f"checkpoint: {folder.path / 'best'}")
    if draws_report:
        print(f"picture: {folder.report}")


def _dense(task: str, argv: Sequence[str]) -> int:
    from .train.errors import UserError, nearest

    action, *rest = argv or ["--help"]
    if action == "train":
        from .train.dense.options import train_command

        return train_command(task, rest)
    if action in ("test", "show"):
        from .eval import dense

        return dense.main(task, action, rest)
    if action in ("-h", "--help"):
        print(f"usage: vicinal {task} train CONFIG | test RUN | show RUN     (each takes --help)")
        return 0
    hint = nearest(action, ("train", "test", "show"), count=1)
    raise UserError(f"unknown action {action!r}: vicinal {task} train, test or show" + (f"; {hint}" if hint else ""))


def _shapes(argv: Sequence[str]) -> int:
    from .train import shapes

    return shapes.main(argv)


def _classify(argv: Sequence[str]) -> int:
    from .eval import classify

    return classify.main(argv)


def _recipes(argv: Sequence[str]) -> int:
    from .train import rates

    return rates.main(argv)


def _data(argv: Sequence[str]) -> int:
    from .train import check

    return check.main(argv)


def _plot(argv: Sequence[str]) -> int:
    from .eval import plot

    return plot.main(argv)


def _bench(argv: Sequence[str]) -> int:
    from .eval import bench

    return bench.main(argv)


def _models(argv: Sequence[str]) -> int:
    from .eval import catalog

    return catalog.main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from .eval import doctor

    return doctor.main(argv)


def _report(argv: Sequence[str]) -> int:
    from .eval import report

    return report.main(argv)


if __name__ == "__main__":
    sys.exit(main())
