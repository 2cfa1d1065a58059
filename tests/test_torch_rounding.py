"""How parameters narrower than the state are rounded, bit by bit."""

import math
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
    asked: list[tuple[int, int]] = []

    def drawn(start: int, stop: int, shape: Any, **options: Any) -> Any:
        asked.append((start, stop))
        return torch.full(shape, noise, **options)

    monkeypatch.setattr(torch, "randint", drawn)
    for sign in (0, -(2**31)):
        high = 0x3F80 << 16  # 1.0
        value = torch.tensor([sign + high + low], dtype=torch.int32).view(torch.float32)
        up = low + noise >= 2**16
        want = torch.tensor([sign + high + (up << 16)], dtype=torch.int32).view(torch.float32)
        got = rounding.rounded(value, torch.bfloat16, "stochastic")
        assert got.dtype == torch.bfloat16
        assert got.item() == want.item()
    assert asked == [(0, 2**16)] * 2


def test_what_is_not_finite_stays_as_it_is() -> None:
    full = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN, all bits set
    value = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), full])
    got = rounding.rounded(value, torch.bfloat16, "stochastic")
    torch.testing.assert_close(got.float(), value, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_lost_makes_up_for_the_rounding(dtype: Any) -> None:
    value = torch.tensor([1.0 + 2.0**-12, -1.0 / 3.0, 1.0, 3.4e38, math.inf, math.nan])
    narrow = value.to(dtype)
    got = rounding.lost(value, narrow)
    finite = torch.isfinite(narrow)
    torch.testing.assert_close(got[finite] + narrow[finite].float(), value[finite], rtol=0, atol=0)
    assert torch.all(got[~finite] == 0.0)
    assert got[0] == 2.0**-12
