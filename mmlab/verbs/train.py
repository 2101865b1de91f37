"""Train parts of a model and save them."""

import signal

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.runs.sweep.sweep import sweep


def main(argv: list[str]) -> int:
    return hydra_verb("train", train, argv, sweep)


def train(cfg: DictConfig) -> None:
    """Train the parts that `stage.trainable` names and write them to `<run.dir>/artifacts`.

    mmlab train experiment=llava/align_tiny                        a recipe
    mmlab train experiment=llava/align_tiny optim.lr=1e-3 seed=1   with other settings
    mmlab train model=llava data=shapes stage=align …              composed from options
    mmlab train -m experiment=llava/align_tiny seed=0,1,2          a sweep; the same command resumes it
    mmlab train -m … hydra/launcher=slurm                          each point is a SLURM job

    Where to read on: docs/training.md, docs/sweeps_and_clusters.md, docs/own_data.md.
    """
    from mmlab.data.upcoming import check_addresses
    from mmlab.runs.check import check
    from mmlab.runs.compiler import prepare_compiler
    from mmlab.runs.ranks import check_devices, connected_ranks, end_with_first_rank, rank
    from mmlab.runs.run import prepare_run

    check(cfg)
    check_addresses(cfg)
    start = prepare_run(cfg)
    folder = start.folder
    if start.complete:
        print(f"{cfg.run.name} is complete: {folder} (run.fresh=true trains it again, beside it)")
        return
    prepare_compiler(cfg.trainer)
    check_devices(cfg.trainer)  # not for a complete run
    end_with_first_rank()

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)  # warnings from SLURM must not end the run while it starts

    import lightning

    from mmlab.config.build import build
    from mmlab.runs.run import finish
    from mmlab.runs.run_status import noting_failure
    from mmlab.stage.assembly import build_data, build_stage
    from mmlab.training.artifacts import describe, describe_frozen, save_parts
    from mmlab.training.gathering import gather
    from mmlab.training.run_identity import RunIdentity, identity_of
    from mmlab.training.trainable import count_parameters, parts_of
    from mmlab.training.trainer import build_trainer, check_end, fit

    lightning.seed_everything(cfg.seed, verbose=False)
    stage = build_stage(cfg)
    saved = [*cfg.stage.trainable, *stage.kept]
    frozen = describe_frozen(stage.model, saved)
    data = build_data(cfg, stage)
    steps = data.plan(cfg.trainer.max_steps, cfg.trainer.max_epochs)
    for part, count in count_parameters(stage.model).items() if rank() == 0 else ():
        print(f"{part:<12} {count['trainable']:>14,} trainable {count['frozen']:>14,} frozen")
    callbacks = [build(node) for node in cfg.callbacks.values() if node is not None]
    if not start.fresh:
        check_end(folder, callbacks, steps)
    callbacks.insert(0, RunIdentity(start, identity_of(start, cfg, stage, data, frozen)))
    start.open()
    trainer = build_trainer(cfg.trainer, folder, build(cfg.logger), callbacks, data, steps)
    with noting_failure(start):
        with connected_ranks():
            metrics = fit(trainer, stage, data, start.fresh)
            names = [*saved, *stage.completed]
            gather(stage.model, names, stage.bases, folder)
        if not trainer.is_global_zero:
            return
        card = {"run": cfg.run.name, "steps": steps}
        against = {**frozen, **{name: describe(parts_of(stage.model)[name], trained=True) for name in stage.completed}}
        written = save_parts(stage.model, names, folder / "artifacts", card, against, stage.bases)
        finish(folder, {"steps": steps, **metrics})
        print(f"{cfg.run.name}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}")
        print(f"trained parts: {', '.join(str(path) for path in written)}")
