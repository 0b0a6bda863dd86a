import socket

import pytest
import torch
from torch import distributed, multiprocessing

from distillzoo import DataSpec, build_distiller
from distillzoo.adapters import memory
from distillzoo.adapters.memory import EmbeddingBank, NegativeSampler, gather_ranks, rank_positions
from distillzoo.errors import OptionError
from distillzoo.streams import Stream
from tests.methods.oracles import TinyNet, tiny_batch

STREAM = Stream.named(0, "test")
UNEVEN = torch.tensor([0] * 30 + [1] * 5 + [2] * 15 + [4] * 10)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]


def draw(sampler, labels, index, step=0):
    return sampler.draw(STREAM, step, labels=torch.as_tensor(labels), index=torch.as_tensor(index))


def test_negatives_are_never_of_the_same_class_and_uniform_over_the_others():
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=20)
    index = torch.arange(60)
    counts = torch.zeros(60, 60)
    for step in range(500):
        drawn = draw(sampler, UNEVEN, index, step)
        assert drawn.shape == (60, 20)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))
    same = UNEVEN.unsqueeze(0) == UNEVEN.unsqueeze(1)
    assert counts[same].sum() == 0
    for label in UNEVEN.unique():
        others = counts[label == UNEVEN][:, label != UNEVEN].sum(0)
        expected = others.sum() / len(others)
        # chi-square over the others: mean n - 1, standard deviation sqrt(2 (n - 1))
        excess = ((others - expected) ** 2 / expected).sum() - (len(others) - 1)
        assert abs(excess) < 5 * (2 * len(others)) ** 0.5


def test_draws_are_a_function_of_step_and_sample_alone():
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=20)
    index = torch.arange(60)
    whole = draw(sampler, UNEVEN, index, 3)
    torch.testing.assert_close(draw(sampler, UNEVEN, index, torch.tensor(3)), whole, rtol=0, atol=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:7]
    torch.testing.assert_close(draw(sampler, UNEVEN[order], index[order], 3), whole[order], rtol=0, atol=0)
    assert not torch.equal(draw(sampler, UNEVEN, index, 4), whole)


def test_draws_in_parts_are_the_draws_at_once(monkeypatch):
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=20)
    whole = draw(sampler, UNEVEN, torch.arange(60))
    monkeypatch.setattr(memory, "_CHUNK_CPU", 45)
    assert torch.equal(draw(sampler, UNEVEN, torch.arange(60)), whole)


@pytest.mark.parametrize("count", [30, 31, 16384])
def test_too_few_negatives_are_all_taken_once(count):
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=count)
    assert (sampler.requested, sampler.count) == (count, 30)
    for step in range(3):
        drawn = draw(sampler, UNEVEN, torch.arange(60), step)
        assert all(len(row.unique()) == 30 for row in drawn)
        assert not (UNEVEN[drawn] == UNEVEN.unsqueeze(1)).any()
    biggest = draw(sampler, [0], [int((UNEVEN == 0).nonzero()[0])])[0]
    assert torch.equal(biggest.sort().values, (UNEVEN != 0).nonzero().flatten())


def test_distinct_negatives_of_a_small_class_are_uniform():
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=30)
    counts = torch.zeros(60)
    own = int((UNEVEN == 1).nonzero()[0])
    for step in range(2000):
        counts += torch.bincount(draw(sampler, [1], [own], step)[0], minlength=60)
    others = counts[UNEVEN != 1]
    assert others.sum() == 60000
    assert (others / 60000 * 55 - 1).abs().max() < 0.15


def test_same_class_draws():
    sampler = NegativeSampler(UNEVEN, num_classes=5, count=3)
    seen = set()
    for step in range(200):
        drawn = sampler.draw_same_class(STREAM, step, labels=UNEVEN, index=torch.arange(60))
        assert torch.equal(UNEVEN[drawn], UNEVEN)
        seen |= set(drawn.tolist())
    assert seen == set(range(60))


@pytest.mark.parametrize(
    ("targets", "count", "said"),
    [
        (torch.tensor([0, 1]), 0, "got 0"),
        (torch.tensor([0, 1]), True, "got True"),
        (torch.tensor([0, 5]), 4, "from 0 to 5"),
        (torch.tensor([-1, 1]), 4, "from -1 to 1"),
        (torch.tensor([], dtype=torch.int64), 4, "got 0"),
        (torch.tensor([2, 2, 2]), 4, "all 3 targets are of class 2"),
    ],
)
def test_bad_samplers_are_refused(targets, count, said):
    with pytest.raises(OptionError, match=said):
        NegativeSampler(targets, num_classes=5, count=count)


def literal_scores(bank, anchors, index):
    return torch.stack([torch.stack([bank.memory[i] @ anchor for i in row]) for row, anchor in zip(index, anchors, strict=True)])


@pytest.mark.parametrize("ratio", [0, 1000])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_scores_and_their_gradient(monkeypatch, ratio, chunk):
    monkeypatch.setattr(memory, "_PRODUCT_RATIO", ratio)
    monkeypatch.setattr(memory, "_CHUNK", chunk)
    torch.manual_seed(0)
    bank = EmbeddingBank(20, 6).double()
    anchors = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 20, (5, 9))
    weight = torch.randn(5, 9, dtype=torch.float64)
    scores = bank.scores(anchors, index)
    expected = literal_scores(bank, anchors, index)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad((scores * weight).sum(), anchors)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), anchors)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_product_and_gathered_scores_agree_in_float32(monkeypatch):
    torch.manual_seed(0)
    bank = EmbeddingBank(500, 128)
    anchors = torch.nn.functional.normalize(torch.randn(8, 128), dim=1)
    index = torch.randint(0, 500, (8, 100))
    product = bank.scores(anchors, index)
    monkeypatch.setattr(memory, "_PRODUCT_RATIO", 0)
    torch.testing.assert_close(product, bank.scores(anchors, index), rtol=0, atol=1e-6)


def test_rows_start_with_length_one_in_the_mean():
    torch.manual_seed(0)
    bank = EmbeddingBank(2000, 128)
    assert bank.memory.abs().max() <= 1 / (128 / 3) ** 0.5
    assert bank.memory.square().sum(1).mean() == pytest.approx(1.0, abs=0.01)
    assert list(bank.state_dict()) == ["memory"]


def test_update_moves_the_rows_and_no_others():
    torch.manual_seed(0)
    bank = EmbeddingBank(10, 4).double()
    before = bank.memory.clone()
    embeddings = torch.randn(3, 4, dtype=torch.float64)
    bank.update(torch.tensor([7, 2, 5]), embeddings, 0.25)
    for row, embedding in zip([7, 2, 5], embeddings, strict=True):
        moved = 0.25 * before[row] + 0.75 * embedding
        torch.testing.assert_close(bank.memory[row], moved / moved.norm(), rtol=0, atol=1e-12)
    rest = [0, 1, 3, 4, 6, 8, 9]
    assert torch.equal(bank.memory[rest], before[rest])


@pytest.mark.parametrize("backwards", [False, True])
def test_of_a_repeated_index_the_last_one_counts(monkeypatch, backwards):
    copy_rows = torch.Tensor.index_copy_
    if backwards:  # a device may write repeated rows in any order
        monkeypatch.setattr(torch.Tensor, "index_copy_", lambda x, dim, index, rows: copy_rows(x, dim, index.flip(0), rows.flip(0)))
    torch.manual_seed(0)
    bank, other = EmbeddingBank(6, 4), EmbeddingBank(6, 4)
    other.load_state_dict(bank.state_dict())
    embeddings = torch.randn(5, 4)
    bank.update(torch.tensor([3, 1, 3, 0, 3]), embeddings, 0.5)
    other.update(torch.tensor([1, 0, 3]), embeddings[[1, 3, 4]], 0.5)
    assert torch.equal(bank.memory, other.memory)


def test_opposite_embeddings_leave_a_finite_row():
    bank = EmbeddingBank(2, 4)
    bank.update(torch.tensor([0]), -bank.memory[:1].clone(), 0.5)
    assert torch.isfinite(bank.memory).all()


def test_one_process_gathers_what_it_has():
    tensor = torch.arange(3)
    assert gather_ranks(tensor) is tensor
    assert rank_positions(3, tensor.device).tolist() == [0, 1, 2]


def contrasted(part):
    """What CRD keeps after a step on a part of a batch, by networks without batch norm, which a part would change."""
    torch.manual_seed(0)
    student, teacher = TinyNet(4), TinyNet(8)
    for block in student.blocks:
        block[1] = torch.nn.Identity()
    targets = torch.arange(20) % 5
    data = DataSpec(5, (16, 16), targets=targets)
    distiller = build_distiller("crd", student, teacher, data=data, negatives=6, dim=4, seed=1)
    index = torch.tensor([1, 2, 3, 1, 6, 7])
    distiller(tiny_batch(6)[0][part], targets[index[part]], index=index[part])
    distiller.after_step()
    kept = distiller.student_bank.memory, distiller.teacher_bank.memory, distiller.log_normalizers
    return torch.cat([tensor.flatten() for tensor in kept])


def _two_processes(rank, port, results):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    bank = EmbeddingBank(8, 4)
    embeddings = torch.arange(24.0).view(6, 4)
    index = torch.tensor([1, 2, 3, 1, 6, 7])
    part = slice(3 * rank, 3 * rank + 3)
    bank.update(gather_ranks(index[part]), gather_ranks(embeddings[part].requires_grad_()), 0.5)
    results[rank] = bank.memory.tolist(), rank_positions(3, index.device).tolist(), contrasted(part).tolist()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_move_their_banks_alike():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_two_processes, (port, results), nprocs=2)
        torch.manual_seed(0)
        bank = EmbeddingBank(8, 4)
        bank.update(torch.tensor([1, 2, 3, 1, 6, 7]), torch.arange(24.0).view(6, 4), 0.5)
        assert results[0][0] == results[1][0] == bank.memory.tolist()
        assert [results[rank][1] for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
        whole = contrasted(slice(None))
        for rank in range(2):
            torch.testing.assert_close(torch.tensor(results[rank][2]), whole)
