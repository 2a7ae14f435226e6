"""Classes of texts, pictures and recordings without a neural network.

Every method takes examples and classes of the train split and examples of another, and returns the
classes it gives the latter, [n] int.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import BernoulliNB, MultinomialNB

from moe.data.audio import FULL_SCALE, log_mel

STRENGTHS = (1.0, 10.0, 100.0)  # inverse weight decay, chosen on the valid split
WORD = r"(?u)\b\w+\b"  # scikit-learn's own pattern drops words of one letter


def majority(train_labels: np.ndarray, n: int) -> np.ndarray:
    """The most frequent class of train, of several the first, for each of n examples."""
    return np.full(n, np.bincount(train_labels).argmax())


def bernoulli_bayes(train: Sequence[str], labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Naive Bayes on which words occur, with one added occurrence (McCallum and Nigam 1998)."""
    counts = CountVectorizer(token_pattern=WORD, binary=True)
    return BernoulliNB().fit(counts.fit_transform(train), labels).predict(counts.transform(texts))


def multinomial_bayes(train: Sequence[str], labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Naive Bayes on how often words occur, with one added (McCallum and Nigam 1998)."""
    counts = CountVectorizer(token_pattern=WORD)
    model = MultinomialNB().fit(counts.fit_transform(train), labels)
    return model.predict(counts.transform(texts))


def tfidf_regression(
    train: tuple[Sequence[str], np.ndarray],
    valid: tuple[Sequence[str], np.ndarray],
    texts: Sequence[str],
) -> np.ndarray:
    """Logistic regression on log-scaled TF-IDF of words and pairs of words that occur twice."""
    features = TfidfVectorizer(
        token_pattern=WORD, ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype=np.float32
    )
    fitted = features.fit_transform(train[0])
    held_out = features.transform(valid[0]), valid[1]
    return regression((fitted, train[1]), held_out, features.transform(texts), tolerance=1e-6)


def regression(train: tuple, valid: tuple, features, *, tolerance: float = 1e-3) -> np.ndarray:
    """Logistic regression with the weight decay that is best on the valid split.

    Args:
        train: features [n F], dense or sparse, and classes [n].
        valid: the same of the valid split; without examples, the middle strength is taken.
        features: of the examples to class [m F].
        tolerance: greatest slope of the mean loss at which L-BFGS ends. Rare features have small
            slopes from the start, so words need a small one.
    """
    x, y = train
    strengths = STRENGTHS if len(valid[1]) else STRENGTHS[1:2]
    models = [LogisticRegression(C=c, max_iter=1000, tol=tolerance).fit(x, y) for c in strengths]
    if len(models) == 1:
        return models[0].predict(features)
    return max(models, key=lambda model: model.score(*valid)).predict(features)


def nearest_centroid(train: np.ndarray, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The class whose mean [F] is nearest in Euclidean distance."""
    classes = np.unique(labels)
    means = np.stack([train[labels == one].mean(0) for one in classes])  # [C F]
    # |x - m|^2 without |x|^2, which is the same for all classes
    return classes[(np.sum(means**2, 1) - 2 * features @ means.T).argmin(1)]


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures of one shape as float32 rows in 0..1 [n F]."""
    return np.stack([image.reshape(-1) for image in images]).astype(np.float32) / 255


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Takes off the mean of train and divides by its deviation, feature by feature."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    return [(x - mean) / deviation for x in (train, *others)]


def sound(pcm: np.ndarray, rate: int) -> np.ndarray:
    """Mean and deviation over time of each log-mel band: int16 samples [T] -> float32 [2 F]."""
    bands = log_mel(pcm.astype(np.float32) / FULL_SCALE, rate=rate, normalise=False)
    return np.concatenate([bands.mean(0), bands.std(0)])
