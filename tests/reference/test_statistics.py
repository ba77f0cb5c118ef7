"""Page statistics (Eq. 1): right numbers, exactly mergeable, blind to padding, bounded error when stored coarsely."""

import pytest
import torch

from unique_attention import reference
from unique_attention.reference_stats import codes_to_float
from unique_attention.settings import SCORES, STATS_DTYPES

QMAX = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def exact(k, page_size, score, **kwargs):
    """Unquantised vectors and spread."""
    stats = reference.page_stats(k, page_size=page_size, score=score, stats_dtype="fp32", **kwargs)
    return stats.codes, stats.spread


def assert_same_stats(actual, expected):
    for name, a, b in zip(actual._fields, actual, expected):
        if a is not None or b is not None:
            assert torch.equal(a.double(), b.double()), f"{name} differ"


@pytest.mark.parametrize("page_size", [2, 4, 16])
def test_page_stats_are_the_population_mean_and_std(page_size):
    k = torch.randn(2, 3, 37, 8, dtype=torch.float64)  # the last page is partial
    vectors, _ = exact(k, page_size, "diagonal")
    for page, keys in enumerate(k.split(page_size, dim=2)):
        torch.testing.assert_close(vectors[:, :, page, 0], keys.mean(2), rtol=0, atol=1e-14)
        torch.testing.assert_close(vectors[:, :, page, 1], keys.var(2, unbiased=False).sqrt(), rtol=0, atol=1e-14)


def test_scalar_spread_is_the_rms_distance_from_the_mean():
    k = torch.randn(1, 2, 32, 8, dtype=torch.float64)
    _, spread = exact(k, 8, "scalar")
    pages = k.unflatten(2, (4, 8))
    distance = (pages - pages.mean(3, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(spread, distance.square().mean(-1).sqrt())


def test_keys_far_from_zero_keep_their_std():
    k = 1000 + 0.1 * torch.randn(1, 2, 64, 16)
    _, spread = exact(k, 8, "scalar")
    _, truth = exact(k.double(), 8, "scalar")
    torch.testing.assert_close(spread.double(), truth, rtol=1e-3, atol=0)
    assert (truth > 0.2).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("order", [[3, 1, 0, 2], [1, 0, 3, 2]])
def test_permuting_keys_inside_a_page_changes_nothing(score, order):
    k = torch.randn(1, 2, 16, 8, dtype=torch.float64)
    shuffled = k.unflatten(2, (4, 4))[:, :, :, order].flatten(2, 3)
    a, b = exact(k, 4, score), exact(shuffled, 4, score)
    if score == "principal":  # its direction has no sign
        a[0][..., 1, :], b[0][..., 1, :] = a[0][..., 1, :].abs(), b[0][..., 1, :].abs()
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)


def test_minmax_keeps_the_box_of_the_page():
    k = torch.randn(2, 1, 12, 4)
    vectors, _ = exact(k, 4, "minmax")
    torch.testing.assert_close(vectors[..., 0, :], k.unflatten(2, (3, 4)).amax(3))
    torch.testing.assert_close(vectors[..., 1, :], k.unflatten(2, (3, 4)).amin(3))


def test_principal_direction_is_the_first_eigenvector():
    axis = torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0)
    k = torch.randn(1, 1, 16, 1, dtype=torch.float64) * 3 * axis + 0.1 * torch.randn(1, 1, 16, 8, dtype=torch.float64)
    vectors, _ = exact(k, 16, "principal")
    covariance = torch.cov(k[0, 0].T, correction=0)
    values, directions = torch.linalg.eigh(covariance)
    expected = directions[:, -1] * values[-1].sqrt()
    direction = vectors[0, 0, 0, 1]
    torch.testing.assert_close(direction * torch.sign(direction @ expected), expected, rtol=0, atol=1e-6)


def test_principal_direction_and_residual_share_out_the_variance():
    k = torch.randn(2, 2, 64, 8, dtype=torch.float64)
    vectors, _ = exact(k, 8, "principal")
    diagonal, _ = exact(k, 8, "diagonal")
    torch.testing.assert_close(vectors[..., 1:, :].square().sum(-2), diagonal[..., 1, :].square())


def test_a_page_of_one_token_has_no_spread():
    k = torch.randn(1, 2, 9, 8)
    for score in ("scalar", "diagonal", "principal"):
        vectors, spread = exact(k, 4, score)
        torch.testing.assert_close(vectors[:, :, 2, 0], k[:, :, 8])
        assert (vectors[:, :, 2, 1:] == 0).all() and (spread[:, :, 2] == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("stats_dtype", STATS_DTYPES)
def test_slots_that_hold_no_token_do_not_count(score, stats_dtype):
    k = torch.randn(2, 2, 24, 8)
    lens, starts = torch.tensor([21, 13]), torch.tensor([0, 6])
    slot = torch.arange(24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, 9] = mask[1, 8:12] = False
    used = (slot < lens[:, None]) & (slot >= starts[:, None]) & mask
    poisoned = k.masked_fill(~used[:, None, :, None], float("nan"))
    rows = {"seq_lens": lens, "seq_starts": starts, "token_mask": mask}
    stats = reference.page_stats(poisoned, page_size=4, score=score, stats_dtype=stats_dtype, **rows)
    values = reference.dequantize(stats, 8)
    assert values.isfinite().all() and stats.spread.isfinite().all()
    # the page of a row equals a page that never had other tokens
    for row, page in [(0, 2), (0, 5), (1, 1), (1, 3)]:
        alone = k[row, :, page * 4 : page * 4 + 4][:, used[row, page * 4 : page * 4 + 4]][None]
        kept = reference.page_stats(alone, page_size=4, score=score, stats_dtype=stats_dtype)
        torch.testing.assert_close(values[row, :, page], reference.dequantize(kept, 8)[0, :, 0])
        torch.testing.assert_close(stats.spread[row, :, page], kept.spread[0, :, 0])
    empty = ~used.unflatten(1, (6, 4)).any(-1)
    assert empty.sum() == 4
    assert (values.transpose(1, 2)[empty] == 0).all() and (stats.spread.transpose(1, 2)[empty] == 0).all()


def test_merging_equals_recomputing():
    x = 1000 + torch.randn(3, 20, 8, dtype=torch.float64)
    whole = reference.moments(x)
    merged = reference.merge_moments(reference.moments(x[:, :7]), reference.moments(x[:, 7:]))
    for a, b in zip(merged, whole):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


def test_merging_one_at_a_time_loses_nothing_at_large_means():
    x = (1000 + 0.1 * torch.randn(1, 64, 4)).float()
    running = reference.moments(x[:, :1])
    for i in range(1, 64):
        running = reference.merge_moments(running, reference.moments(x[:, i : i + 1]))
    truth = reference.moments(x.double())
    torch.testing.assert_close(running.m2.double(), truth.m2, rtol=0.01, atol=0)


def test_merging_with_nothing_changes_nothing():
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    full, none = reference.moments(x), reference.moments(x, torch.zeros(2, 5, dtype=torch.bool))
    assert all((field == 0).all() for field in none)
    for pair in ((full, none), (none, full)):
        for a, b in zip(reference.merge_moments(*pair), full):
            torch.testing.assert_close(a, b)
    assert all((field == 0).all() for field in reference.merge_moments(none, none))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_super_pages_merged_from_pages_equal_larger_pages(factor):
    x = 50 + torch.randn(2, 9, 4, 8, dtype=torch.float64)  # 9 pages: the last super-page is partial
    mask = torch.rand(2, 9, 4) < 0.8
    merged = reference.merge_pages(reference.moments(x, mask), factor)
    for i, (keys, valid) in enumerate(zip(x.split(factor, 1), mask.split(factor, 1))):
        whole = reference.moments(keys.flatten(1, 2), valid.flatten(1, 2))
        for a, b in zip(merged, whole):
            torch.testing.assert_close(a[:, i], b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("stats_dtype", ["fp32", "fp8", "int4"])
def test_appending_equals_recomputing_bit_for_bit(chunk, score, stats_dtype):
    settings = {"page_size": 4, "score": score, "stats_dtype": stats_dtype, "seq_starts": torch.tensor([0, 5])}
    k, v = torch.randn(2, 2, 27, 8), torch.randn(2, 2, 27, 6)
    k_cache, v_cache = torch.full((2, 2, 28, 8), float("nan")), torch.full((2, 2, 28, 6), float("nan"))
    stats = reference.empty_stats((2, 2, 7), 8, score, stats_dtype, k)
    for i in range(0, 27, chunk):
        new = slice(i, i + chunk)
        lens = torch.full((2,), min(i + chunk, 27))
        reference.append_tokens(k_cache, v_cache, stats, k[:, :, new], v[:, :, new], lens, **settings)
    assert torch.equal(k_cache[:, :, :27], k) and torch.equal(v_cache[:, :, :27], v)
    assert_same_stats(stats, reference.page_stats(k_cache, seq_lens=lens, **settings))


def test_appending_to_ragged_rows_equals_row_by_row():
    k, v = torch.randn(3, 2, 32, 8), torch.randn(3, 2, 32, 8)
    settings = {"page_size": 4, "score": "diagonal", "stats_dtype": "fp32"}
    lens = torch.tensor([17, 0, 9])
    stats = reference.page_stats(k, seq_lens=lens, **settings)
    new_k, new_v, after = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8), torch.tensor([22, 0, 14])
    expected_k = k.clone()
    expected_k[0, :, 17:22], expected_k[2, :, 9:14] = new_k[0], new_k[2]
    reference.append_tokens(k, v, stats, new_k, new_v, after, **settings)
    assert torch.equal(k, expected_k)
    assert_same_stats(stats, reference.page_stats(expected_k, seq_lens=after, **settings))


def test_append_writes_the_touched_pages_only():
    k = torch.randn(1, 1, 32, 8)
    marked = reference.page_stats(k, page_size=4, stats_dtype="fp32")
    for field in (marked.codes, marked.spread):
        field.fill_(-7)
    reference.page_stats(k, page_size=4, stats_dtype="fp32", seq_lens=torch.tensor([21]), num_new=3, out=marked)
    written = (marked.spread[0, 0] != -7).nonzero().flatten().tolist()
    assert written == [4, 5]  # slots 18, 19, 20
    reference.page_stats(k, page_size=4, stats_dtype="fp32", seq_lens=torch.tensor([29]), num_new=1, out=marked)
    assert (marked.spread[0, 0] != -7).nonzero().flatten().tolist() == [4, 5, 7]


def test_num_new_needs_statistics_to_update():
    with pytest.raises(ValueError, match="expected `out`, got None"):
        reference.page_stats(torch.randn(1, 1, 8, 4), page_size=4, num_new=1)


def paged_copy(x, page_size, table, num_pages):
    """Scatter a contiguous cache into physical pages; unused ones hold NaN."""
    pages = x.unflatten(2, (-1, page_size)).transpose(1, 2)  # [B, N, HK, P, D]
    out = torch.full((num_pages, x.shape[1], page_size, x.shape[3]), float("nan"), dtype=x.dtype)
    out[table.flatten().long()] = pages.flatten(0, 1)
    return out


@pytest.mark.parametrize("score", ["scalar", "minmax", "principal"])
def test_page_table_equals_contiguous(score):
    k = torch.randn(2, 2, 24, 8)
    table = torch.randperm(15)[:12].reshape(2, 6).int()
    lens = torch.tensor([22, 7])
    settings = {"page_size": 4, "score": score, "stats_dtype": "fp8", "seq_lens": lens}
    flat = reference.page_stats(k, **settings)
    paged = reference.page_stats(paged_copy(k, 4, table, 15), page_table=table, **settings)
    for a, b in zip(paged, flat):
        for row, pages in ((0, 6), (1, 2)):
            assert torch.equal(a[table[row, :pages].long()].transpose(0, 1).double(), b[row, :, :pages].double())


def test_appending_through_a_page_table_equals_contiguous_and_spares_idle_rows():
    k, v = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    table = torch.tensor([[5, 2, 7, 1], [0, 0, 0, 0]], dtype=torch.int32)  # the second row is idle: any table
    settings = {"page_size": 4, "score": "scalar", "stats_dtype": "fp32"}
    k_paged, v_paged = torch.randn(8, 2, 4, 8), torch.randn(8, 2, 4, 8)
    stats = reference.page_stats(k_paged, page_size=4, stats_dtype="fp32", page_table=torch.arange(8)[None].int())
    before = [x.clone() for x in (k_paged, stats.codes, stats.spread)]
    for length in (6, 7, 13):
        new = slice(length - (6 if length == 13 else 6 if length == 6 else 1), length)
        lens = torch.tensor([length, 0])
        args = (k_paged, v_paged, stats, k[:, :, new], v[:, :, new], lens)
        reference.append_tokens(*args, page_table=table, **settings)
    expected = reference.page_stats(k[:1], seq_lens=torch.tensor([13]), **settings)
    used = table[0].long()
    torch.testing.assert_close(k_paged[used].transpose(0, 1).flatten(1, 2)[:, :13], k[0, :, :13])
    torch.testing.assert_close(stats.codes[used].transpose(0, 1), expected.codes[0])
    torch.testing.assert_close(stats.spread[used].transpose(0, 1), expected.spread[0])
    idle = [0, 3, 4, 6]
    for after, old in zip((k_paged, stats.codes, stats.spread), before):
        assert torch.equal(after[idle], old[idle])


@pytest.mark.parametrize("table", [None, torch.tensor([[2, 0]], dtype=torch.int32)])
def test_appending_past_the_capacity_is_refused(table):
    cache = torch.randn(1, 1, 8, 4) if table is None else torch.randn(3, 1, 4, 4)
    before = cache.clone()
    stats = reference.empty_stats((1, 1, 2) if table is None else (3, 1), 4, "scalar", "fp8", cache)
    settings = {"page_size": 4, "score": "scalar", "stats_dtype": "fp8", "page_table": table}
    new = torch.randn(1, 1, 1, 4)
    with pytest.raises(ValueError, match="seq_lens <= 8, the slots of a row, got 9"):
        reference.append_tokens(cache, cache, stats, new, new, torch.tensor([9]), **settings)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("stats_dtype", STATS_DTYPES)
@pytest.mark.parametrize("dim", [7, 32, 80])
def test_stored_layout_follows_the_design(stats_dtype, dim):
    stats = reference.page_stats(torch.randn(2, 3, 10, dim), page_size=4, score="diagonal", stats_dtype=stats_dtype)
    codes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
    width, groups = ((dim + 1) // 2, -(-dim // 32)) if stats_dtype == "int4" else (dim, 1)
    assert stats.codes.dtype == codes.get(stats_dtype, torch.uint8)
    assert stats.codes.shape == (2, 3, 3, 2, width)
    assert stats.spread.shape == (2, 3, 3)
    assert stats.spread.dtype == (torch.float32 if stats_dtype == "fp32" else torch.bfloat16)
    if stats_dtype in QMAX:
        assert stats.scales.shape == (2, 3, 3, 2, groups) and stats.scales.dtype == torch.bfloat16
    else:
        assert stats.scales is None


@pytest.mark.parametrize("stats_dtype", STATS_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantisation_error_is_bounded(stats_dtype, dtype):
    x = torch.randn(64, 2, 80, dtype=dtype) * torch.logspace(-6, 4, 64, dtype=dtype)[:, None, None]
    stats = reference.quantize(x, x[:, 0, 0].abs(), stats_dtype)
    error = (reference.dequantize(stats, 80, dtype) - x).abs()
    if stats_dtype == "fp32":
        assert (error == 0).all()
        return
    if stats_dtype == "bf16":
        assert (error <= x.abs() / 256).all()
        return
    scale = stats.scales.to(dtype).repeat_interleave(32 if stats_dtype == "int4" else 80, -1)[..., :80]
    bound = x.abs() / 16 + scale / 1024 if stats_dtype == "fp8" else scale / 2
    assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("stats_dtype", QMAX)
def test_scales_round_up_and_never_lose_range(stats_dtype):
    x = torch.randn(500, 1, 32)
    scales = reference.quantize(x, torch.zeros(500), stats_dtype).scales
    ideal = x.abs().amax(-1, keepdim=True) / QMAX[stats_dtype]
    assert (scales.float() >= ideal).all()
    assert (scales.float() <= ideal * (1 + 1 / 128)).all()


@pytest.mark.parametrize("stats_dtype", QMAX)
def test_zero_vectors_stay_zero(stats_dtype):
    stats = reference.quantize(torch.zeros(3, 1, 40), torch.zeros(3), stats_dtype)
    assert (stats.scales == 0).all() and (reference.dequantize(stats, 40) == 0).all()


def test_int4_packs_low_dims_low_and_high_dims_high():
    x = torch.tensor([[7.0, -7.0, 1.0, 0.0, 3.0]])  # scale 1, C = 3
    stats = reference.quantize(x, torch.zeros(1), "int4")
    assert stats.scales.tolist() == [[1.0]]
    assert stats.codes.tolist() == [[15 + 16 * 8, 1 + 16 * 11, 9 + 16 * 8]]
    assert torch.equal(reference.dequantize(stats, 5), x)


def test_int8_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]])
    assert reference.quantize(x, torch.zeros(1), "int8").codes.tolist() == [[127, 0, 2, -2, -127]]


def test_fp8_codes_decode_to_the_numbers_torch_gives():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.to(torch.float32)
    numbers = ~expected.isnan()
    assert numbers.sum() == 254
    for dtype in (torch.float32, torch.float64):
        decoded = codes_to_float(codes, 256, dtype)
        assert decoded.dtype == dtype and torch.equal(decoded[numbers].float(), expected[numbers])


def test_fp64_keys_give_fp64_statistics():
    stats = reference.page_stats(torch.randn(1, 1, 8, 4, dtype=torch.float64), page_size=4, stats_dtype="fp32")
    assert stats.codes.dtype == stats.spread.dtype == torch.float64


def test_keys_in_a_strided_view_give_the_same_statistics():
    k = torch.randn(2, 16, 3, 8).transpose(1, 2)
    assert_same_stats(reference.page_stats(k, page_size=4), reference.page_stats(k.contiguous(), page_size=4))
