"""GPUs: memory, and the peak rate of dense bf16 matrix products with fp32 accumulation.

The rates are those of NVIDIA's data sheets, for GeForce and RTX of the whitepapers of GA102, AD102 and GB202, without
structured sparsity: half of what most sheets print. Lightning's table mixes the two.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A model of GPU.

    Attributes:
        words: what its name, as CUDA reports it, contains.
        tflops: peak of dense bf16, TFLOP/s.
        gb: memory of its variants, GB as in their names.
    """

    words: tuple[str, ...]
    tflops: float
    gb: tuple[int, ...]


# The first entry whose words are all in a name counts, so variants come before the plain name.
GPUS = (
    GPU(("GB200",), 2500, (186,)),
    GPU(("B200",), 2250, (180,)),
    GPU(("GH200",), 989, (96, 141)),
    GPU(("H200", "NVL"), 835, (141,)),
    GPU(("H200",), 989, (141,)),
    GPU(("H100", "NVL"), 835, (94,)),
    GPU(("H100", "PCIe"), 756, (80,)),
    GPU(("H100",), 989, (80,)),
    GPU(("H800", "PCIe"), 756, (80,)),
    GPU(("H800",), 989, (80,)),
    GPU(("H20",), 148, (96,)),
    GPU(("A100",), 312, (40, 80)),
    GPU(("A800",), 312, (40, 80)),
    GPU(("A30",), 165, (24,)),
    GPU(("A40",), 149.7, (48,)),
    GPU(("A10G",), 70, (24,)),
    GPU(("A10",), 125, (24,)),
    GPU(("L40S",), 362, (48,)),
    GPU(("L40",), 181, (48,)),
    GPU(("L4",), 121, (24,)),
    GPU(("RTX", "6000", "Ada"), 364, (48,)),
    GPU(("RTX", "A6000"), 154.8, (48,)),
    GPU(("5090",), 209.5, (32,)),
    GPU(("4090",), 165.2, (24,)),
    GPU(("3090",), 71, (24,)),
)


# Words of slices of GPUs, and of other models with the same number.
OTHERS = {"MIG", "Laptop", "Ti", "D", "SUPER"}


def gpu_named(name: str) -> GPU | None:
    """The GPU of a name that CUDA reports, such as "NVIDIA A100-SXM4-80GB"; None if it is not in the table."""
    words = set(name.replace("-", " ").split())
    if words & OTHERS:
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.words)), None)
