"""Which timesteps a sampler visits."""

from fractions import Fraction

from mmlab.config.errors import ConfigError, nearest

SPACINGS = ("trailing", "linspace", "leading")


def spaced(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` different timesteps of 0 … T−1, noisiest first (arXiv 2305.08891, table 2).

    Args:
        timesteps: T.
        steps: how many, at most T.
        spacing: `trailing` starts at T−1, `linspace` starts at T−1 and ends at 0, `leading` ends at 0: it never
            sees the noisiest timesteps, though its samples start as noise.

    Raises:
        ConfigError: an unknown spacing, or a number of steps out of 1 … T.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing={spacing!r} is none of {', '.join(SPACINGS)}.{nearest(spacing, SPACINGS)}")
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"steps={steps} must lie in 1 … {timesteps}, the number of timesteps.")
    if spacing == "trailing":
        return [round(timesteps - Fraction(i * timesteps, steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * timesteps // steps for i in reversed(range(steps))]
    return (
        [timesteps - 1]
        if steps == 1
        else [round(Fraction(i * (timesteps - 1), steps - 1)) for i in reversed(range(steps))]
    )
