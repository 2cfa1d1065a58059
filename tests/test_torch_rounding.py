"""How parameters narrower than the state are rounded, bit by bit."""

import math
import shutil
from typing import Any

import pytest

torch = pytest.importorskip("torch")
rounding = pytest.importorskip("metaopt_torch.rounding")

VALUES = [0.0, -0.0, 1.0, -1.0, 1.0 / 3.0, -2.7, 1e-3, 7e4, 3.4e38, math.inf, -math.inf, math.nan]
NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("choice", ["nearest", "kahan", "stochastic"])
def test_what_is_not_stochastic_is_nearest(dtype: Any, choice: str) -> None:
    """Of float16 as well: the noise is that of a bfloat16's bits."""
    if choice == "stochastic" and dtype == torch.bfloat16:
        pytest.skip("that is what is stochastic")
    for wide in (torch.float32, torch.float64):
        value = torch.tensor(VALUES, dtype=wide)
        got = rounding.rounded(value, dtype, choice)
        assert got.dtype == dtype
        torch.testing.assert_close(got, value.to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("low", [0, 1, 2**15, 2**16 - 1])
@pytest.mark.parametrize("noise", [0, 1, 2**15, 2**16 - 2, 2**16 - 1])
def test_noise_carries_into_the_upper_half(
    low: int, noise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is up with the probability low / 2**16: in as many of the cases of the noise."""
    monkeypatch.setattr(
        rounding,
        "_uniform",
        lambda shape, device: torch.full(shape, noise, dtype=torch.int32, device=device),
    )
    for sign in (0, -(2**31)):
        high = 0x3F80 << 16  # 1.0
        value = torch.tensor([sign + high + low], dtype=torch.int32).view(torch.float32)
        up = low + noise >= 2**16
        want = torch.tensor([sign + high + (up << 16)], dtype=torch.int32).view(torch.float32)
        got = rounding.rounded(value, torch.bfloat16, "stochastic")
        assert got.dtype == torch.bfloat16
        assert got.item() == want.item()


def test_noise_is_uniform_and_new_at_every_place_and_call() -> None:
    torch.manual_seed(0)
    draws = torch.stack(
        [rounding._uniform(torch.Size((256, 512)), torch.device("cpu")) for _ in range(8)]
    )
    assert draws.dtype == torch.int32
    cells = torch.bincount(draws.flatten() >> 8, minlength=256)
    assert len(cells) == 256
    assert int(draws.min()) >= 0
    expected = draws.numel() / 256
    assert float(((cells - expected) ** 2 / expected).sum()) < 255 + 5 * math.sqrt(2 * 255)
    # neighbours, rows and calls are not correlated, in the upper bits nor in the lower
    for bits in (draws.double(), (draws & 255).double()):
        noise = (bits - bits.mean()) / bits.std()
        allowed = 5 / math.sqrt(noise.numel())
        assert abs(noise.mean()) < allowed
        for one, other in (
            (noise[:, :, 1:], noise[:, :, :-1]),
            (noise[:, 1:], noise[:, :-1]),
            (noise[1:], noise[:-1]),
        ):
            assert abs((one * other).mean()) < 1.1 * allowed


def test_what_is_not_finite_stays_as_it_is() -> None:
    full = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN, all bits set
    value = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), full])
    got = rounding.rounded(value, torch.bfloat16, "stochastic")
    torch.testing.assert_close(got.float(), value, rtol=0.0, atol=0.0, equal_nan=True)


def every_kind_of_number() -> Any:
    """Return float32 numbers of all signs and exponents: halfway cases, their neighbours, others.

    The bits that a float16 or bfloat16 cannot hold are ones and zeros in all such ways.
    """
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    halves = [2**k for k in range(16)] + [2**16 - 2**k for k in range(16)]
    lower = sorted({low + off for low in (0, *halves) for off in (-1, 0, 1) if low + off >= 0})
    odd = torch.randint(0, 2**16, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    return (upper + torch.tensor(lower + odd, dtype=torch.int32)).view(torch.float32).flatten()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the compiler's
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_lost_makes_up_for_the_rounding(dtype: Any, compiled: bool) -> None:
    """Whatever the number; 0 where it is none, or becomes infinite."""
    if compiled and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    value = every_kind_of_number()
    narrow = value.to(dtype).float()
    difference = value - narrow
    want = torch.where(torch.isfinite(difference), difference, 0.0)
    lost = torch.compile(rounding.lost) if compiled else rounding.lost
    got = lost(value, dtype)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    assert torch.count_nonzero(got) > value.numel() / 2
