"""Print what a run would take of each device, without allocating it."""

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    return hydra_verb("plan", plan, argv)


def plan(cfg: DictConfig) -> None:
    """Run a step of the model on tensors without values, and print the memory, FLOPs and time that the run would need.

    mmlab plan experiment=llava/v15_7b_finetune trainer.devices=8
    """
    from mmlab.config.build import check_targets
    from mmlab.runs.check import check_length, check_rates, check_trainable
    from mmlab.stage.estimate import estimate
    from mmlab.training.gpus import GPUS, gpu_named
    from mmlab.verbs._plan_report import memory_table, parts_table, remedies, step_lines, unknown_gpu

    if (gpu := gpu_named(cfg.plan.gpu)) is None:
        raise unknown_gpu(cfg.plan.gpu, GPUS)
    check_trainable(cfg)
    check_rates(cfg.optim)
    check_length(cfg)
    check_targets(cfg)
    expected = estimate(cfg)
    for line in [*parts_table(expected), "", *memory_table(cfg, expected), "", *step_lines(cfg, expected, gpu)]:
        print(line)
    for line in remedies(cfg, expected):
        print(line, flush=True)
