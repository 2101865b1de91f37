"""Matrix products of fp32 by oneDNN."""

import pytest
import torch
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.training import cpu_products
from mmlab.training.cpu_products import LEAST, products, use_products


@pytest.fixture
def onednn():
    use_products("onednn")
    yield
    use_products("torch")


def layer_and_input(bias: bool = True, rows: int = 300) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(256, 512, bias=bias), torch.randn(2, rows // 2, 256, requires_grad=True)


@pytest.fixture
def used(monkeypatch) -> list[torch.Size]:
    """Shapes that oneDNN computes."""
    shapes: list[torch.Size] = []
    large = cpu_products._large

    def note(a, b) -> bool:
        if answer := large(a, b):
            shapes.append(torch.Size([*a.shape, b.shape[1]]))
        return answer

    monkeypatch.setattr(cpu_products, "_large", note)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch_but_for_rounding(used, bias):
    results = []
    for kind in ("torch", "onednn"):
        use_products(kind)
        layer, x = layer_and_input(bias)
        layer(x).square().mean().backward()
        results.append((layer(x), x.grad, *(weight.grad for weight in layer.parameters())))
    use_products("torch")
    assert set(used) == {(300, 256, 512), (300, 512, 256), (512, 300, 256)}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * float(b.detach().abs().max()), rtol=1e-5)


def test_small_products_other_dtypes_and_factors_keep_torchs_bits(used):
    layer, x = layer_and_input(rows=2)
    wide, large = torch.randn(300, 256).double(), torch.randn(300, 256)
    weight, bias, table = torch.randn(256, 512), torch.randn(512), torch.randn(300, 512)

    def compute() -> list[torch.Tensor]:
        return [
            layer(x),
            wide @ weight.double(),
            torch.addmm(bias, large, weight, beta=0.5),
            torch.addmm(table, large, weight),
            torch.randn(0, 3) @ torch.randn(3, 4),
            torch.randn(3, 0) @ torch.randn(0, 4),
        ]

    expected = compute()
    use_products("onednn")
    try:
        for a, b in zip(compute(), expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    finally:
        use_products("torch")
    assert len(used) == 2  # the two with a factor and a table, which have to be told apart


def test_strided_operands_and_biases_are_read_as_torch_reads_them(used):
    table = torch.randn(1024, 1024)
    spaced, rows, columns = torch.randn(1024)[::2], table[::2, ::2], table.t()[:512, 512:]

    def compute() -> list[torch.Tensor]:
        return [
            torch.addmm(spaced, rows, columns),
            torch.addmm(torch.ones(1).expand(512), rows.t(), columns),
            rows @ torch.ones(1, 1).expand(512, 512),
            torch.ones(512, 1).expand(512, 512) @ columns.t(),
        ]

    expected = compute()
    use_products("onednn")
    try:
        for a, b in zip(compute(), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max()), rtol=1e-5)
    finally:
        use_products("torch")
    assert len(used) == 4


def test_shapes_that_do_not_fit_are_said_as_torch_says_it(onednn):
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(512x513 and 512x512\)"):
        torch.randn(512, 513) @ torch.randn(512, 512)


def test_the_kernels_of_torch_come_back(onednn, used):
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    assert LEAST <= 512**3
    torch.mm(a, b)
    use_products("torch")
    torch.mm(a, b)
    assert len(used) == 1


@pytest.mark.parametrize(
    "vendor, capability, expected",
    [("AuthenticAMD", "AVX512", "onednn"), ("AuthenticAMD", "AVX2", "torch"), ("GenuineIntel", "AVX512", "torch")],
)
def test_auto_depends_on_the_processor_alone(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(cpu_products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products("auto", "cpu") == expected
    assert products("onednn", "cpu") == "onednn"
    assert products("torch", "cpu") == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert products("auto", "auto") == "torch"


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products("auto", "cpu") == "torch"
    with pytest.raises(ConfigError, match=r"trainer\.products=onednn: this build of torch has no oneDNN"):
        products("onednn", "cpu")
