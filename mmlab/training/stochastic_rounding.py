"""AdamW for weights that lie in bfloat16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StochasticAdamW(torch.optim.AdamW):
    """AdamW whose bfloat16 weights and moments are rounded up or down by chance, so that they are right on average.

    Rounded to the nearest, a bfloat16 weight of 0.02 loses every step below 4e-5 (LLaVA's are 2e-5), and a second
    moment with β₂ = 0.999 never falls: 0.1 % is less than half of its last bit. With stochastic rounding, bfloat16
    training follows float32's (arXiv 2010.06192). Each step computes in float32; float32 weights are
    rounded by nobody, and learn as with torch's AdamW.

    What is drawn depends on the number of the step alone, so all ranks round alike, and a resumed run as an unbroken
    one.

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                count, device = int(state["step"]), parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(count)
                self._update(parameter, state, group, count, generators[device])
        return loss

    def _update(
        self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], count: int, chance: torch.Generator
    ) -> None:
        assert parameter.grad is not None
        (beta1, beta2), lr = group["betas"], group["lr"]
        gradient = parameter.grad.float()
        mean = state["exp_avg"].float().lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        scale = square.div(1 - beta2**count).sqrt_().add_(group["eps"])
        weight = parameter.float().mul(1 - lr * group["weight_decay"])
        weight = weight.addcdiv(mean, scale, value=-lr / (1 - beta1**count))
        for place, exact in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, weight)):
            place.copy_(stochastically_rounded(exact, chance) if place.dtype == torch.bfloat16 else exact)


def stochastically_rounded(exact: Tensor, chance: torch.Generator) -> Tensor:
    """A float32 tensor in bfloat16: of the two neighbours each with the probability that makes the mean exact.

    Args:
        exact: float32, finite or not.
        chance: where the random bits come from, of the same device.
    """
    # bfloat16 is the upper half of float32: what is added to the lower half carries over as often as it should.
    bits = exact.view(torch.int32)
    random = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=chance)
    carried = bits.add(random).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), carried, exact).bfloat16()
