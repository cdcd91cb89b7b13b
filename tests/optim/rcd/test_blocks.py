import pytest
import torch

from hf_circuit_sparsity.modeling.csr import CSR
from hf_circuit_sparsity.optim.rcd.blocks import Block, block_size, draw_block
from hf_circuit_sparsity.optim.rcd.partial_gradients import gradient_at

SHAPE = (12, 9)


def draw(dim, fraction, selection="uniform", number=0, seed=0, matrix=None, power=1.0, floor=0.1):
    matrix = torch.zeros(SHAPE) if matrix is None else matrix
    generator = torch.Generator().manual_seed(seed)
    settings = {"selection": selection, "magnitude_power": power, "magnitude_floor": floor}
    return draw_block(CSR.from_dense(matrix), dim, fraction, settings, number, generator)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_index_take_rows_and_locate_agree(dim):
    matrix = torch.arange(108.0).view(SHAPE)
    block = draw(dim, 1 / 3)
    assert block.numel == len(block.index()) == 36
    assert torch.equal(block.take(matrix), block.index().float())
    asked = torch.randperm(108, generator=torch.Generator().manual_seed(1))[:50]
    inside, place = block.locate(asked)
    assert torch.equal(block.index()[place], asked[inside])
    assert not torch.isin(asked[~inside], block.index()).any()
    assert inside.any()
    assert torch.equal(block.index_at(torch.arange(36)), block.index())
    for row_dim, row in enumerate((block.index() // 9, block.index() % 9)):
        chosen = torch.arange(SHAPE[row_dim]) % 2 == 0
        assert torch.equal(block.take_rows(chosen, row_dim), chosen[row])
    vector = Block((7, 1), None, torch.tensor([1, 4]))
    assert vector.take(torch.arange(7.0)).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("dim", [0, 1, None])
def test_cyclic_blocks_visit_everything_equally_often(dim):
    visits = torch.zeros(108)
    for number in range(12):
        visits[draw(dim, 1 / 3 if dim != 0 else 1 / 4, "cyclic", number).index()] += 1
    assert visits.unique().tolist() == [4.0 if dim != 0 else 3.0]


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.7, 1.0])
def test_uniform_entries_are_distinct_and_spread_evenly(fraction):
    visits, draws = torch.zeros(108), 400
    for seed in range(draws):
        ids = draw(None, fraction, seed=seed).ids
        assert len(ids.unique()) == len(ids) == block_size(108, fraction)
        visits[ids] += 1
    mean = draws * block_size(108, fraction) / 108
    assert (visits - mean).abs().max() <= 5 * max(mean, 1) ** 0.5


@pytest.mark.parametrize("dim", [0, 1, None])
def test_magnitude_follows_the_stated_probabilities(dim):
    matrix = torch.zeros(SHAPE)
    matrix[2, 3], matrix[7, 5] = 3.0, -1.0
    size = {0: 12, 1: 9, None: 108}[dim]
    heavy, light = {0: (2, 7), 1: (3, 5), None: (2 * 9 + 3, 7 * 9 + 5)}[dim]
    draws, floor = 3000, 0.2
    hits = torch.zeros(size)
    for seed in range(draws):  # one at a time, so that drawing without replacement plays no part
        block = draw(dim, 1 / size, "magnitude", seed=seed, matrix=matrix, floor=floor, power=2.0)
        hits[block.ids] += 1
    for place, share in ((heavy, 0.9), (light, 0.1)):
        assert hits[place] / draws == pytest.approx((1 - floor) * share + floor / size, abs=0.03)


@pytest.mark.parametrize("dim", [0, 1])
def test_magnitude_takes_more_rows_than_torch_takes_categories(dim):
    rows = (1 << 24) + 5  # of a vocabulary, for example
    shape = (rows, 3) if dim == 0 else (3, rows)
    position = 7 * 3 + 1 if dim == 0 else rows + 7
    nonzeros = CSR.from_positions(torch.tensor([position]), shape, torch.ones(1))
    settings = {"selection": "magnitude", "magnitude_power": 1.0, "magnitude_floor": 0.5}
    block = draw_block(nonzeros, dim, 1e-5, settings, 0, torch.Generator().manual_seed(0))
    assert len(block.ids.unique()) == block_size(rows, 1e-5)
    assert 7 in block.ids


def test_magnitude_fills_its_block_where_nonzeros_are_few():
    matrix = torch.zeros(SHAPE)
    matrix[0, 0] = 1.0
    for dim in (0, 1, None):
        block = draw(dim, 0.2, "magnitude", matrix=matrix)
        assert len(block.ids.unique()) == block_size({0: 12, 1: 9, None: 108}[dim], 0.2)
    assert len(draw(None, 0.2, "magnitude").ids) == 22  # nothing is active


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
def test_sampled_product_is_the_dense_one_at_the_coordinates(density):
    g = torch.Generator().manual_seed(0)
    active = (torch.rand(40 * 30, generator=g) < density).nonzero().flatten()
    left = torch.randn(17, 40, generator=g)
    right = torch.randn(17, 30, generator=g)
    pattern = CSR.from_positions(active, (40, 30))
    expected = (left.T @ right).flatten()[active]
    torch.testing.assert_close(gradient_at(pattern, left, right), expected)
    half = gradient_at(pattern, left.bfloat16(), right.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.1)
    assert len(gradient_at(CSR.from_positions(active[:0], (40, 30)), left, right)) == 0
