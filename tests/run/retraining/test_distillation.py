import errno
import os

import pytest
import torch

from optimum_fista.run.retraining.distillation import LargestLogits, TeacherCache, divergence, locked_cache

POSITIONS, VOCABULARY = 300, 40


def example():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(POSITIONS, VOCABULARY, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


def test_without_a_share_labels_of_no_probability_count_for_nothing():
    student, teacher, labels = example()
    with torch.no_grad():
        student[:, 0] = -torch.inf
    ids = torch.arange(1, VOCABULARY).expand(POSITIONS, -1)
    largest = LargestLogits(torch.cat((teacher[:, 1:], torch.full((POSITIONS, 1), -torch.inf)), 1), ids)
    loss = divergence(student, largest, labels, 0.0)
    torch.testing.assert_close(loss, divergence(student[:, 1:], teacher[:, 1:], 0 * labels, 0.0))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_divergence_and_its_gradient_are_those_of_pytorch(share):
    student, teacher, labels = example()
    divergence(student, teacher, labels, share).mul(2).backward()
    again = student.detach().clone().requires_grad_()
    log_q, log_p = again.log_softmax(-1), teacher.log_softmax(-1)
    expected = (1 - share) * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    expected = expected + share * torch.nn.functional.nll_loss(log_q, labels)
    expected.mul(2).backward()
    torch.testing.assert_close(divergence(student, teacher, labels, share), expected)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_the_rest_counts_as_one_token(k):
    student, teacher, labels = example()
    largest = LargestLogits.of(teacher, k)
    divergence(student, largest, labels).backward()
    again = student.detach().clone().requires_grad_()
    p, q = teacher.softmax(-1), again.softmax(-1)
    ids = p.topk(k).indices
    known = torch.zeros_like(p, dtype=torch.bool).scatter_(1, ids, True)
    parts = [torch.cat((x.gather(1, ids), (x * ~known).sum(1, keepdim=True)), 1) for x in (p, q)]
    if k == VOCABULARY:
        parts = [x[:, :-1] for x in parts]
    expected = (parts[0] * (parts[0].log() - parts[1].log())).sum() / POSITIONS
    expected.backward()
    torch.testing.assert_close(divergence(student, largest, labels), expected, rtol=3e-3, atol=1e-4)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-2, atol=2e-5)


def largest(windows, first):
    return [LargestLogits.of(torch.nn.functional.one_hot(windows[first], 16) * 5.0, 2)]


def test_a_cache_that_was_interrupted_is_filled_further(tmp_path):
    windows = torch.arange(12).view(4, 3)
    asked = []

    def predict(first):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(first)
        return largest(windows, first)

    with locked_cache(tmp_path / "cache"):
        cache = TeacherCache(tmp_path / "cache", 2, windows, {"teacher": "t"})
        with pytest.raises(KeyboardInterrupt):
            cache.fill(predict, lambda: None)
        asked.clear()
        cache.fill(predict, lambda: None)
    assert asked == [2, 3]
    found = TeacherCache(tmp_path / "cache", 2, windows, {"teacher": "t"}).read(1, 3)
    with pytest.raises(ValueError, match=r"holds other predictions \(k was 2, is 3\): delete it, or pass another"):
        TeacherCache(tmp_path / "cache", 3, windows, {"teacher": "t"})
    assert found.ids[:, 0].tolist() == [3, 4, 6, 7]
    torch.testing.assert_close(found.log_probs.exp().sum(1).float(), torch.ones(4), rtol=2e-3, atol=0)


def full_cache(folder):
    with locked_cache(folder):
        windows = torch.arange(12).view(4, 3)
        cache = TeacherCache(folder, 2, windows, {})
        cache.fill(lambda first: largest(windows, first), lambda: None)
    return cache


def test_one_run_at_a_time_fills_a_cache(tmp_path):
    with locked_cache(tmp_path / "cache"):
        said = rf"teacher_cache '.*cache' is being written by process {os.getpid()} on .*: wait until it has ended, or"
        with pytest.raises(BlockingIOError, match=said):
            full_cache(tmp_path / "cache")
    full_cache(tmp_path / "cache")
    assert not (tmp_path / "cache" / "lock").exists()


@pytest.mark.parametrize("file", ["log_probs.npy", "ids.npy"])
def test_a_cache_that_is_cut_off_is_made_anew_and_who_reads_it_still_can(file, tmp_path, caplog):
    first = full_cache(tmp_path)
    expected = first.read(0, 4)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    assert TeacherCache(tmp_path, 2, torch.arange(12).view(4, 3), {}).finished == 0
    assert "is damaged and not used: the teacher predicts anew" in caplog.text
    found = first.read(0, 4)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_files_of_somebody_else_are_not_taken_and_a_full_disk_is_said(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ids.npy").write_bytes(b"my numbers")
    windows = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(FileExistsError, match="holds something else"), locked_cache(tmp_path / "mine"):
        pass
    assert [file.read_bytes() for file in (tmp_path / "mine").iterdir()] == [b"my numbers"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with locked_cache(tmp_path / "cache"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(OSError, match=r"No space left on device: .*log_probs\.npy"):
                TeacherCache(tmp_path / "cache", 4, windows, {})
        assert TeacherCache(tmp_path / "cache", 4, windows, {}).finished == 0
