"""The two comparisons that tests of numbers use: against an fp64 oracle, and of page sets with ties."""

import torch


def error(actual, oracle64):
    """Largest absolute difference, over the entries where the oracle is finite."""
    finite = oracle64.isfinite()
    if not finite.any():
        return 0.0
    return (actual.double() - oracle64)[finite].abs().max().item()


def tolerance(oracle64, low_precision_reference, dtype):
    """Allowed error: 2 err(reference in that dtype) + eps max|oracle|."""
    assert oracle64.dtype == torch.float64, f"the oracle is computed in float64, got {oracle64.dtype}"
    finite = oracle64[oracle64.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return 2 * error(low_precision_reference, oracle64) + torch.finfo(dtype).eps * largest


def assert_close_to_oracle(actual, oracle64, low_precision_reference, dtype):
    """The result is as accurate as the reference in that dtype, up to a factor of two.

    All inputs must have been rounded to `dtype` first; the oracle is the reference on those numbers in fp64. Where
    the oracle is infinite, the result must be the same infinity.
    """
    actual, oracle64, low = actual.detach().cpu(), oracle64.detach().cpu(), low_precision_reference.detach().cpu()
    assert actual.shape == oracle64.shape == low.shape, f"{actual.shape}, {oracle64.shape}, {low.shape}"
    finite = oracle64.isfinite()
    bad = ~actual.double().isfinite() & finite
    assert not bad.any(), f"{bad.sum()} of {bad.numel()} entries are not finite, first at {bad.nonzero()[0].tolist()}"
    assert torch.equal(actual.double()[~finite], oracle64[~finite]), "infinite entries differ from the oracle"
    allowed, got = tolerance(oracle64, low, dtype), error(actual, oracle64)
    if got > allowed:
        worst = (actual.double() - oracle64).masked_fill(~finite, 0).abs().argmax()
        where = tuple(int(i) for i in torch.unravel_index(worst, actual.shape))
        raise AssertionError(
            f"error {got:.3g} at {where} (got {actual[where].item():.6g}, oracle {oracle64[where].item():.6g}) "
            f"exceeds {allowed:.3g}; the reference in {dtype} has error {error(low, oracle64):.3g}"
        )


def assert_same_pages(actual, expected, scores, band=0.0):
    """Two `[B, HK, K]` selections hold the same pages; pages whose scores tie within `band` may stand for each other.

    Args:
        actual: Ids under test; also checked to be ascending, distinct and -1 padded at the end.
        expected: Ids of the reference.
        scores: `[B, HK, N]` scores in the highest precision at hand.
        band: Largest difference of scores that counts as a tie, see `tolerance`.
    """
    actual, expected, scores = actual.cpu(), expected.cpu(), scores.cpu()
    assert actual.shape == expected.shape, f"{actual.shape} and {expected.shape}"
    assert actual.dtype == torch.int32, f"page ids are int32, got {actual.dtype}"
    for index in torch.cartesian_prod(torch.arange(actual.shape[0]), torch.arange(actual.shape[1])).tolist():
        got = actual[tuple(index)].tolist()
        ids = [i for i in got if i != -1]
        assert got == sorted(set(ids)) + [-1] * (len(got) - len(ids)), f"{index}: not ascending and -1 padded: {got}"
        want = {i for i in expected[tuple(index)].tolist() if i != -1}
        assert len(ids) == len(want), f"{index}: {len(ids)} pages, expected {len(want)}"
        different = sorted(want.symmetric_difference(ids))
        if different:
            values = scores[tuple(index)][different]
            spread = (values.max() - values.min()).item()
            assert spread <= band, f"{index}: pages {different} differ, scores {values.tolist()}, band {band:.3g}"
