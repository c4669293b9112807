"""k-NN: votes by hand, scikit-learn as the judge, and chunks that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov2.evaluate import knn, knn_accuracy


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points around 5 directions of 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, math.inf])
def test_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    train, train_labels = clusters(300, seed=1)
    test, test_labels = clusters(200, seed=2)

    def weights(distances):
        return torch.exp((1 - torch.from_numpy(distances) ** 2 / 2) / temperature).numpy()

    judge = KNeighborsClassifier(k, weights=weights)
    judge.fit(torch.nn.functional.normalize(train, dim=1).double(), train_labels)
    expected = judge.score(torch.nn.functional.normalize(test, dim=1).double(), test_labels)
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature)
    assert accuracy == pytest.approx(expected)
    assert 0.4 < accuracy < 0.95  # hard enough to notice a wrong vote


def test_temperature_weighs_close_neighbours() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    query, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([0])  # cosines 1, 0.6, 0.6
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.07) == 1.0
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=math.inf) == 0.0


def test_length_of_a_feature_does_not_matter() -> None:
    train, train_labels = clusters(100, seed=1)
    test, test_labels = clusters(100, seed=2)
    scale = torch.linspace(0.01, 100, 100)[:, None]
    assert knn_accuracy(train * scale, train_labels, test / scale, test_labels) == knn_accuracy(
        train, train_labels, test, test_labels
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, train_labels = clusters(300, seed=1)
    test, test_labels = clusters(50, seed=2)
    whole_cosine, whole_index = knn.nearest(test, train, 20)
    accuracy = knn_accuracy(train, train_labels, test, test_labels)
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 7)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 11)
    cosine, index = knn.nearest(test, train, 20)
    torch.testing.assert_close(cosine, whole_cosine)
    assert torch.equal(index, whole_index)
    assert knn_accuracy(train, train_labels, test, test_labels) == accuracy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.zeros(4)}, r"train_features: expected floating point \[N, D\]"),
        (
            {"test_features": torch.zeros(2, 5)},
            r"test_features: expected \[B, 3\], the width of train_features, got \[2, 5\]",
        ),
        ({"train_labels": torch.zeros(3, dtype=torch.long)}, r"train_labels: expected integers \[4\]"),
        ({"test_labels": torch.zeros(2)}, r"test_labels: expected integers \[2\].*float32"),
        ({"k": 5}, "k: expected 1 to 4, the number of training features, got 5"),
        ({"k": 0}, "k: .* got 0"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "train_features": torch.rand(4, 3),
        "train_labels": torch.zeros(4, dtype=torch.long),
        "test_features": torch.rand(2, 3),
        "test_labels": torch.zeros(2, dtype=torch.long),
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments | change)
