"""newton_schulz against the reference in fp64, torch.optim.Muon's own, and the singular values that it promises."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_s

from headgate.kernels import newton_schulz, newton_schulz_reference
from headgate.kernels.newton_schulz import COEFFICIENTS
from headgate.kernels.newton_schulz.gram import by_gram, symmetric_product


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4), (2, 0, 4), (1, 1, 1), (3, 33, 70), (3, 70, 33), (2, 17, 17), (1, 260, 600), (1, 512, 520)],
    ids=str,
)
def test_equals_the_reference(shape, assert_close):
    g = torch.randn(shape)
    assert_close(newton_schulz(g), newton_schulz_reference(g.double()).float(), torch.float32)
    assert_close(newton_schulz(g.double()), newton_schulz_reference(g.double()))


def test_small_singular_values_in_fp32():
    """Both forms, and more steps than one run takes: the Gram matrix has their squares."""
    u, v = (torch.linalg.qr(torch.randn(2, 60, 60).double())[0] for _ in range(2))
    g = (u * 10 ** torch.linspace(0, -5, 60).double()) @ v
    for steps in (1, 5, 6, 12):
        x = g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
        exact = newton_schulz_reference(g, steps=steps)
        assert (by_gram(x.float(), COEFFICIENTS, steps) - exact).abs().max() < 3e-3 * exact.abs().max()
        assert (newton_schulz(g.float(), steps=steps) - exact).abs().max() < 3e-3 * exact.abs().max()


def test_singular_values_come_near_one_and_vectors_stay():
    g = torch.randn(3, 40, 90).double()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found = u.mT @ newton_schulz(g) @ v.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert ((values > 0.65) & (values < 1.25)).all()
    assert (found - torch.diag_embed(values)).abs().max() < 1e-10


def test_in_bf16_it_is_torch_s_for_each_matrix():
    for shape in ((4, 24, 40), (4, 40, 24)):
        g = torch.randn(shape)
        one = torch.stack([torch_s(m, COEFFICIENTS, 5, 1e-7) for m in g])
        assert (newton_schulz(g, dtype=torch.bfloat16).float() - one.float()).abs().max() < 0.03
        assert (newton_schulz(g) - one.float()).abs().max() < 0.03


def test_a_matrix_keeps_to_itself():
    g = torch.randn(4, 5, 9)
    g[1], g[2, 0, 0] = 0, torch.nan
    found = newton_schulz(g)
    assert (found[1] == 0).all()
    assert found[2].isnan().any()
    for e in (0, 3):
        assert torch.equal(found[e], newton_schulz(g[e : e + 1])[0])


@pytest.mark.parametrize("m", [5, 256, 515])
def test_a_symmetric_product_is_the_product(m, assert_close):
    s = torch.randn(2, m, m).double()
    s = s + s.mT
    assert_close(symmetric_product(s, s @ s), s @ s @ s)


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (TypeError, "g must be a floating point tensor, got torch.int64", {"g": torch.ones(1, 2, 2).long()}),
        (ValueError, r"g must be \[B, m, n\], got \(2, 2\)", {"g": torch.ones(2, 2)}),
        (ValueError, "steps must be between 1 and 99, got 100", {"g": torch.ones(1, 2, 2), "steps": 100}),
        (TypeError, "dtype must be .*, got torch.float16", {"g": torch.ones(1, 2, 2), "dtype": torch.float16}),
    ],
)
def test_what_is_refused(error, words, given):
    with pytest.raises(error, match=f"newton_schulz: {words}"):
        newton_schulz(**given)
