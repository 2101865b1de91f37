"""Buffers that are no weights keep their precision when a part is cast."""

from typing import Any

from torch import nn


class ExactBuffers(nn.Module):
    """A part whose non-persistent buffers stay in the precision in which they were computed.

    They are no weights: rotary frequencies, and the mean of pixels. With frequencies in bf16 the angles of position
    1,000 are off by up to a radian, and a model would be trained with other positions than it is evaluated with.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers = [(m, name, m._buffers[name]) for m in self.modules() for name in m._non_persistent_buffers_set]
        super()._apply(fn, recurse)
        for module, name, before in buffers:
            now = module._buffers[name]
            if before is not None and now is not None and now.dtype.itemsize < before.dtype.itemsize:
                module._buffers[name] = before.to(now.device)
        return self
