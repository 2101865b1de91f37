"""Model FLOPs of micro-batches, counted while they are trained on, once for each shape.

Model FLOPs are those of the forward and the backward pass as the model defines them (PaLM, arXiv 2204.02311, appendix
B): what is computed a second time, by activation checkpointing or in an attention kernel's backward pass, does not
count, and causal attention counts in full. Frozen weights have no gradients, and parts that no gradient passes have no
backward pass. Only matrix products, convolutions and attention count.
"""

from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

ATEN: Any = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
COUNTED_SHAPES = 64  # of a run; the FLOPs of further ones are estimated


class FlopCounter(TorchDispatchMode):
    """Counts model FLOPs of what runs within its context; computes the same as without it.

    Under FSDP the products within a layer see whole weights: they are those of the whole model on this rank's batch.

    Attributes:
        flops: so far.
        in_backward: set while the loss is backpropagated, to tell recomputation from the forward pass.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.in_backward = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled. Of compiled layers the products and attention are seen here, as these are
        calls of torch's own kernels. FlexAttention would make all scores otherwise, and is then not counted."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            # Compiled code that is checkpointed calls what may draw random numbers, such as attention, through another
            # operator: with the first one it saves their state, with the second one it repeats them.
            if func.name() != "run_and_save_rng_state":
                return out
            func, *args = args
        # The backward pass itself records no gradients; layers that it runs again do, and have hooks, also within
        # compiled code, which never records any.
        again = self.in_backward and (torch.is_grad_enabled() or _top_saved_tensors_default_hooks(False) is not None)
        if (formula := FORMULAS.get(func._overloadpacket)) and not again:
            flops = formula(*args, **kwargs, out_val=out)
            # Of the five products of the backward kernels, the first is the scores again.
            fused = "attention" in (name := func._overloadpacket.__name__) and name.endswith("_backward")
            self.flops += flops * 4 // 5 if fused else flops
        return out


class BatchFlops:
    """FLOPs of the micro-batches of a run: counted for the first `COUNTED_SHAPES` shapes, then estimated.

    Attributes:
        counted: shape → FLOPs.
    """

    def __init__(self) -> None:
        self.counted: dict[tuple[int, ...], int] = {}
        self._shape: tuple[int, ...] = ()
        self._counter: FlopCounter | None = None

    def begin(self, shape: tuple[int, ...]) -> None:
        """Begin a micro-batch.

        Args:
            shape: numbers that its FLOPs depend on, as many for each batch of a run; they are about proportional to
                the first one if the others are similar.
        """
        self._shape = shape
        if shape not in self.counted and len(self.counted) < COUNTED_SHAPES:
            self._counter = FlopCounter()
            self._counter.__enter__()

    def in_backward(self, value: bool) -> None:
        if self._counter is not None:
            self._counter.in_backward = value

    def stop(self) -> FlopCounter | None:
        """Stop counting, also within a micro-batch."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)
        return counter

    def end(self) -> float:
        """End the micro-batch; return its FLOPs."""
        if (counter := self.stop()) is not None:
            self.counted[self._shape] = counter.flops
        return self.counted[self._shape] if self._shape in self.counted else self._estimate()

    def _estimate(self) -> float:
        """FLOPs of the most similar shape, scaled by the first number."""
        shape = self._shape

        def distance(other: tuple[int, ...]) -> float:
            return sum(abs(a - b) / max(a, b, 1) for a, b in zip(shape, other, strict=True))

        nearest = min(self.counted, key=distance)
        return self.counted[nearest] * shape[0] / nearest[0]
