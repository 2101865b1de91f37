"""Print the parameters, the memory and the batches of a run, without allocating anything."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb

# Precision → bytes of a trainable weight, and of its gradient and Adam's two moments.
BYTES = {"32-true": (4, 12), "bf16-mixed": (4, 12), "bf16-true": (2, 6)}


def main(argv: list[str]) -> int:
    return hydra_verb("plan", plan, argv)


def plan(cfg: DictConfig) -> None:
    """Build the model on the meta device and print its parameters, the memory they need, and the batches.

    mmlab plan experiment=llava/v15_7b_finetune
    """
    import torch

    from mmlab.config.build import build, check_targets
    from mmlab.model.quantization import BITS
    from mmlab.runs.check import check_trainable
    from mmlab.runs.ranks import accumulation, world_size
    from mmlab.training.lora import add_adapters
    from mmlab.training.trainable import count_parameters, parts_of, set_trainable

    check_trainable(cfg)
    check_targets(cfg)
    with torch.device("meta"):
        model = build(cfg.model)
        rounded = sum(_rounded(part) for part in parts_of(model).values())
        set_trainable(model, cfg.stage.trainable, cfg.stage.get("lora") or ())
        if cfg.stage.get("lora"):
            lora: Any = OmegaConf.to_object(cfg.stage.lora)
            add_adapters(model, lora)
    counts = count_parameters(model)
    print(f"{'part':<14}{'trainable':>16}{'frozen':>16}")
    for part, count in counts.items():
        print(f"{part:<14}{count['trainable']:>16,}{count['frozen']:>16,}")
    trainable, frozen = (sum(count[kind] for count in counts.values()) for kind in ("trainable", "frozen"))
    print(f"{'all':<14}{trainable:>16,}{frozen:>16,}")
    if rounded:
        print(f"{'in 4 bits':<14}{'':>16}{rounded:>16,}")

    world = world_size(cfg.trainer)
    micro = accumulation(cfg.data.global_batch, cfg.data.micro_batch, world)
    batch = f"{cfg.data.micro_batch} samples x {micro} micro-batches x {world} device(s)"
    print(f"\nglobal batch {cfg.data.global_batch} = {batch}")
    print(f"length: {cfg.trainer.max_steps or '-'} steps, {cfg.trainer.max_epochs or '-'} epochs")
    for precision, (weight, state) in BYTES.items():
        whole = (frozen - rounded) * (2 if "bf16" in precision else weight)
        size = (trainable * (weight + state) + whole + rounded * BITS / 8) / 2**30
        chosen = " (configured)" if cfg.trainer.precision == precision else ""
        print(f"{precision:<12} weights, gradients, optimizer: {size:8.2f} GiB per device, plus activations{chosen}")


def _rounded(part: Any) -> int:
    """How many weights of a part are stored in 4 bits."""
    from mmlab.model.quantization import quantized_layers

    if getattr(getattr(part, "settings", None), "quantize", None) is None:
        return 0
    return sum(layer.weight.numel() for layer in quantized_layers(part.causal).values())
