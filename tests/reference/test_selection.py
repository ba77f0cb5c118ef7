"""Selection (Eq. 4): sink and recent pages always, ties to the lower id, exactly K pages, nothing outside the row."""

import pytest
import torch

from tests.numerics import assert_same_pages
from tests.reference import naive
from unique_attention import reference


def select(scores, num_kept=6, sink_pages=1, recent_pages=2, **kwargs):
    return reference.select_pages(
        scores, num_kept=num_kept, sink_pages=sink_pages, recent_pages=recent_pages, page_size=4, **kwargs
    )


@pytest.mark.parametrize("levels", [3, 10_000])  # three different scores: ties everywhere
@pytest.mark.parametrize(("num_kept", "sink_pages", "recent_pages"), [(6, 1, 2), (9, 0, 1), (4, 2, 2), (12, 3, 1)])
def test_select_pages_equals_sorting(levels, num_kept, sink_pages, recent_pages):
    scores = torch.randint(0, levels, (4, 2, 20)).float() - levels / 2
    lens, starts = torch.tensor([80, 61, 30, 17]), torch.tensor([0, 9, 0, 8])
    got = select(scores, num_kept, sink_pages, recent_pages, seq_lens=lens, seq_starts=starts)
    for b in range(4):
        first, stop = int(starts[b]) // 4, -(-int(lens[b]) // 4)
        for h in range(2):
            want = naive.select(scores[b, h].tolist(), first, stop, num_kept, sink_pages, recent_pages)
            assert got[b, h].tolist() == want + [-1] * (num_kept - len(want))


def test_ties_go_to_the_lower_page():
    assert select(torch.zeros(1, 1, 12))[0, 0].tolist() == [0, 1, 2, 3, 10, 11]


def test_sink_and_recent_pages_are_kept_however_low():
    scores = torch.zeros(1, 1, 12)
    scores[..., [0, 10, 11]] = -1e30
    assert {0, 10, 11} <= set(select(scores)[0, 0].tolist())


def test_exactly_sink_scored_and_recent_pages():
    scores = torch.arange(12.0).expand(1, 1, 12)
    assert select(scores, num_kept=5, sink_pages=2, recent_pages=1)[0, 0].tolist() == [0, 1, 9, 10, 11]


def test_rows_with_few_pages_keep_all_of_them_up_to_the_boundary():
    scores = torch.randn(3, 1, 12)
    got = select(scores, seq_lens=torch.tensor([20, 24, 25]))  # 5, 6 and 7 pages, K = 6
    assert got[0, 0].tolist() == [0, 1, 2, 3, 4, -1]
    assert got[1, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert got[2, 0].min() >= 0 and set(got[2, 0].tolist()) < set(range(7))


def test_left_padding_moves_the_sink():
    scores = torch.zeros(1, 1, 12)
    scores[..., :5] = 100.0
    assert select(scores, seq_starts=torch.tensor([22]))[0, 0].tolist() == [5, 6, 7, 8, 10, 11]


def test_an_empty_row_keeps_nothing():
    got = select(torch.randn(2, 2, 12), seq_lens=torch.tensor([0, 40]))
    assert (got[0] == -1).all() and (got[1] >= 0).all()


def test_nan_and_infinite_scores_do_not_break_the_count():
    scores = torch.zeros(1, 1, 12)
    scores[..., [2, 3]], scores[..., 4], scores[..., 5] = float("nan"), float("inf"), float("-inf")
    assert select(scores, num_kept=8)[0, 0].tolist() == [0, 1, 4, 6, 7, 8, 10, 11]
    assert select(scores, num_kept=12)[0, 0].tolist() == list(range(12))


def test_more_pages_kept_than_exist():
    assert select(torch.randn(1, 1, 4), num_kept=6)[0, 0].tolist() == [0, 1, 2, 3, -1, -1]


def test_each_kv_head_has_its_own_pages():
    scores = torch.stack([torch.arange(12.0), -torch.arange(12.0)])[None]
    got = select(scores)
    assert got.dtype == torch.int32 and got.shape == (1, 2, 6)
    assert got[0].tolist() == [[0, 7, 8, 9, 10, 11], [0, 1, 2, 3, 10, 11]]


def test_int32_and_strided_lengths_are_taken():
    scores = torch.randn(2, 1, 12)
    lens = torch.tensor([[48, 0], [31, 0]], dtype=torch.int32)[:, 0]
    assert torch.equal(select(scores, seq_lens=lens), select(scores, seq_lens=torch.tensor([48, 31])))


def test_budget_below_sink_and_recent_is_refused():
    with pytest.raises(ValueError, match=r"num_kept >= sink_pages \+ recent_pages = 3, got 2"):
        select(torch.randn(1, 1, 12), num_kept=2)


def test_comparison_of_page_sets_allows_ties_only():
    scores = torch.tensor([[[0.0, 1.0, 1.0, 2.0]]])
    a, b = torch.tensor([[[1, 3]]], dtype=torch.int32), torch.tensor([[[2, 3]]], dtype=torch.int32)
    assert_same_pages(a, b, scores)
    scores[0, 0, 2] = 1.1
    assert_same_pages(a, b, scores, band=0.2)
    with pytest.raises(AssertionError, match=r"pages \[1, 2\] differ"):
        assert_same_pages(a, b, scores, band=0.05)
    for wrong in ([3, 1], [1, 1], [-1, 3]):
        with pytest.raises(AssertionError, match="not ascending"):
            assert_same_pages(torch.tensor([[wrong]], dtype=torch.int32), b, scores, band=9)
    with pytest.raises(AssertionError, match="1 pages, expected 2"):
        assert_same_pages(torch.tensor([[[3, -1]]], dtype=torch.int32), b, scores, band=9)
