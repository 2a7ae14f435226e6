"""Choosing among candidates by scores: words for a definition, names for a picture or a gap."""

from collections import Counter, defaultdict
from collections.abc import Sequence
import math
import re

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

BINS = 4  # of each colour in a histogram


def recall(scores: Sequence[np.ndarray], right: Sequence[Sequence[int]], k: int = 1) -> np.ndarray:
    """How likely a right candidate is among the first k when equal scores are put in random order.

    Args:
        scores: one array of candidates' scores an example, of any length.
        right: indices of the right candidates, one at least.
        k: candidates that may be named.

    Returns:
        Probabilities [n]; with k=1, one right candidate and all scores equal, one over their number.
    """
    return np.array([_found(one, list(own), k) for one, own in zip(scores, right, strict=True)])


def _found(scores: np.ndarray, right: list[int], k: int) -> float:
    """One less the probability that places left after better candidates all go to equal wrong ones."""
    best = scores[right].max()
    own = int(np.sum(scores[right] == best))
    wrong = np.delete(scores, right)
    equal, places = int(np.sum(wrong == best)), max(0, k - int(np.sum(wrong > best)))
    if places > equal:
        return 1.0
    return 1 - math.comb(equal, places) / math.comb(equal + own, places)


def wrong_words(
    right: Sequence[Sequence[str]], words: Sequence[str], ways: int, seed: int = 0
) -> list[list[str]]:
    """Draws `ways - 1` different wrong words for each example.

    Args:
        right: words that are right for each example.
        words: to draw from, each once.
        ways: candidates of an example, the right one included.
        seed: of the draw.

    Raises:
        ValueError: an example has fewer wrong words than that.
    """
    rng, drawn = np.random.default_rng(seed), []
    for own in right:
        if len(words) - len(set(own)) < ways - 1:
            raise ValueError(f"{len(words)} words are too few for {ways - 1} wrong ones.")
        found: list[str] = []
        while len(found) < ways - 1:
            word = words[int(rng.integers(len(words)))]
            if word not in own and word not in found:
                found.append(word)
        drawn.append(found)
    return drawn


def overlap(
    train: Sequence[tuple[str, str]], asked: Sequence[str], candidates: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """Cosine of TF-IDF between a definition and all train definitions of each candidate word.

    Args:
        train: pairs of a definition and its word.
        asked: definitions.
        candidates: words that each of them may define; one that train lacks scores 0.

    Returns:
        Scores of the candidates of each definition.
    """
    by_word = defaultdict(list)
    for definition, word in train:
        by_word[word].append(definition)
    row = {word: i for i, word in enumerate(by_word)}
    features = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    known = features.fit_transform([" ".join(found) for found in by_word.values()])
    given = features.transform(asked)
    scores = []
    for i, words in enumerate(candidates):
        found = [row.get(word, -1) for word in words]
        cosine = (known[np.maximum(found, 0)] @ given[i].T).toarray()[:, 0]
        scores.append(np.where(np.array(found) < 0, 0.0, cosine))
    return scores


def name_scores(source: str, candidates: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of the names that may be missing in the last line of a text (Hill et al. 2016, table 2).

    Args:
        source: sentences, a line each; the last one has the gap.
        candidates: names of the lines before it.

    Returns:
        For each method the scores [C]: `chance`; `most frequent` in the text; `most frequent, not
        in the question`, where a name of the last line has none; `last mentioned`.
    """
    *context, question = (re.findall(r"\w+", line) for line in source.splitlines())
    words = [word for line in context for word in line]
    counts = np.array([words.count(name) for name in candidates])
    last = [
        max((i for i, word in enumerate(words) if word == name), default=-1) for name in candidates
    ]
    asked = np.array([name in question for name in candidates])
    return {
        "chance": np.zeros(len(candidates)),
        "most frequent": counts,
        "most frequent, not in the question": np.where(asked, -1, counts),
        "last mentioned": np.array(last),
    }


def histogram(images: Sequence[np.ndarray]) -> np.ndarray:
    """Shares of coarse colours: uint8 pictures [H W 3] -> [n BINS^3], rows of sum 1."""
    rows = []
    for image in images:
        coarse = (image.reshape(-1, 3) // (256 // BINS)).astype(np.int64)
        number = coarse @ (BINS**2, BINS, 1)
        rows.append(np.bincount(number, minlength=BINS**3) / len(number))
    return np.stack(rows)


def nearest(train: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Index of the row of train [n F] with the least sum of absolute differences [m]."""
    return np.array([np.abs(train - one).sum(1).argmin() for one in asked], np.int64)


def name_likeness(guesses: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Cosine of TF-IDF of runs of 1 to 4 characters between guessed and true names [m n]."""
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4))
    known = features.fit_transform(names)
    return (features.transform(guesses) @ known.T).toarray()


def most_frequent(values: Sequence[str]) -> str:
    """The value that occurs most often, of several the first."""
    return Counter(values).most_common(1)[0][0]
