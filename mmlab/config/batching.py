"""How a global batch is divided; no heavy import, so that a config is checked before torch is loaded."""

from mmlab.config.errors import ConfigError


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Return how many micro batches each of `world` processes takes before the optimizer steps.

    Raises:
        ConfigError: the global batch is not a whole number of micro batches on every process; the message
            names the nearest micro batch that divides, or the nearest global batches where none can.
    """
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch), ("devices", world)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if global_batch % (micro_batch * world) == 0:
        return global_batch // (micro_batch * world)
    per_process, rest = divmod(global_batch, world)
    on = f"global_batch={global_batch} does not divide into micro_batch={micro_batch} on {world} device(s)"
    if rest:
        lower = global_batch - rest
        near = f"{lower} or {lower + world}" if lower else str(world)
        raise ConfigError(f"{on}; a multiple of {world} does: global_batch={near}.")
    divisors = [b for b in range(1, per_process + 1) if per_process % b == 0]
    best = min(divisors, key=lambda b: (abs(b - micro_batch), -b))
    raise ConfigError(f"{on}; the nearest micro batch that does: micro_batch={best}.")
