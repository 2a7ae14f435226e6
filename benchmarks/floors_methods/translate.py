"""Translation by a table of words: IBM Model 1, one word for each word, in the source's order.

Brown, Della Pietra, Della Pietra and Mercer, "The Mathematics of Statistical Machine Translation"
(1993), section 4.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
import math
import re
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

NULL = (
    ""  # the empty source word, which gives birth to target words that no word of the source does
)
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]")
_NO_SPACE_BEFORE = re.compile(r"\s+(?=[.,;:!?)\]}\u3001-\u303f\uff01-\uff5e])")
_BETWEEN_CHINESE = re.compile(
    r"(?<=[\u3000-\u9fff\uff01-\uff5e])\s+|\s+(?=[\u3000-\u9fff\uff01-\uff5e])"
)


class Table(NamedTuple):
    """The best target words of each source word."""

    best: dict[str, tuple[tuple[str, float], ...]]  # (target word, probability), falling


def split_words(text: str) -> list[str]:
    """Words and marks; every Chinese character is a word."""
    return _WORD.findall(text)


def join_words(words: Sequence[str]) -> str:
    """Words as a text: no space before closing marks or beside Chinese characters."""
    return _BETWEEN_CHINESE.sub("", _NO_SPACE_BEFORE.sub("", " ".join(words)))


def model1(
    sources: Sequence[Sequence[str]],
    targets: Sequence[Sequence[str]],
    *,
    iterations: int = 10,
    keep: int = 5,
) -> Table:
    """Trains t(target | source) by expectation maximisation from a uniform start.

    Expectation, for each target word f of a pair whose source words, NULL among them, are e:
    c(f | e) = t(f | e) / sum over e' of t(f | e'). Maximisation: t(f | e) is c(f | e) summed over
    all pairs, divided by its sum over f.

    Args:
        sources: words of each source text.
        targets: words of each target text.
        iterations: of both steps.
        keep: target words to keep for each source word.
    """
    source_ids, source_words = _number([[NULL, *words] for words in sources])
    target_ids, target_words = _number(targets)
    link, group = _links(source_ids, target_ids, len(target_words))
    keys, link = np.unique(link, return_inverse=True)  # kinds of links [J]; its number by link [I]
    source = keys // len(target_words)
    chance = np.full(len(keys), 1 / max(1, len(target_words)))
    for _ in range(iterations):
        share = chance[link]
        share /= np.bincount(group, share)[group]
        counts = np.bincount(link, share, minlength=len(keys))
        chance = counts / np.bincount(source, counts)[source]
    return _table(source, keys % len(target_words), chance, source_words, target_words, keep)


def _number(texts: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], list[str]]:
    """Numbers words in order of appearance."""
    numbers: dict[str, int] = {}
    ids = [np.array([numbers.setdefault(w, len(numbers)) for w in t], np.int64) for t in texts]
    return ids, list(numbers)


def _links(sources: list[np.ndarray], targets: list[np.ndarray], size: int) -> tuple:
    """Every source word of a pair with every target word of it.

    Returns:
        source * size + target [I], and the number of the target position among those of all pairs
        [I] int32.
    """
    links, groups, start = [], [], 0
    for source, target in zip(sources, targets, strict=True):
        links.append((source[None] * size + target[:, None]).ravel())
        groups.append(np.repeat(np.arange(start, start + len(target), dtype=np.int32), len(source)))
        start += len(target)
    return np.concatenate(links), np.concatenate(groups)


def _table(source, target, chance, source_words, target_words, keep) -> Table:
    best = defaultdict(list)
    for j in np.lexsort((target, -chance, source)):
        found = best[source_words[source[j]]]
        if len(found) < keep:
            found.append((target_words[target[j]], float(chance[j])))
    return Table({word: tuple(found) for word, found in best.items()})


class Bigrams(NamedTuple):
    """How often a target word follows another; None stands for both ends of a text."""

    pairs: Counter
    singles: Counter
    total: int


def bigrams(texts: Sequence[Sequence[str]]) -> Bigrams:
    """Counts the pairs of neighbours."""
    pairs = Counter(
        pair for words in texts for pair in zip([None, *words], [*words, None], strict=True)
    )
    singles = Counter()
    for (_, second), count in pairs.items():
        singles[second] += count
    return Bigrams(pairs, singles, singles.total())


def log_chance(model: Bigrams, first: str | None, second: str | None) -> float:
    """Log of 0.9 p(second | first) + 0.1 p(second), with one added to the latter's count.

    `first` is counted as a second word, None as well: each text has one end and one start.
    """
    follows = model.pairs[first, second] / max(1, model.singles[first])
    alone = (model.singles[second] + 1) / (model.total + len(model.singles) + 1)
    return math.log(0.9 * follows + 0.1 * alone)


def translate(words: Sequence[str], table: Table, model: Bigrams | None = None) -> list[str]:
    """One target word for each source word, in its order.

    Without `model` the most probable one; with it the sequence with the greatest product of
    t(f | e) and p(f | f before) (Viterbi). A word that is not in the table stays as it is.
    """
    options = [_options(word, table) for word in words]
    if model is None:
        return [found[0][0] for found in options]
    paths: dict[str | None, tuple[float, list[str]]] = {None: (0.0, [])}
    for found in [*options, ((None, 1.0),)]:
        paths = {word: _extended(paths, word, chance, model) for word, chance in found}
    return paths[None][1][:-1]


def _extended(paths: dict, word, chance: float, model: Bigrams) -> tuple[float, list]:
    score, best = max(
        ((score + log_chance(model, before, word), before) for before, (score, _) in paths.items()),
        key=lambda pair: pair[0],
    )
    return score + math.log(chance), [*paths[best][1], word]


def _options(word: str, table: Table) -> tuple[tuple[str, float], ...]:
    """Rows of the word, else of its other case, else the word itself."""
    for form in (word, word.lower(), word.capitalize()):
        found = tuple((f, chance) for f, chance in table.best.get(form, ()) if chance > 0)
        if found:
            return found
    return ((word, 1.0),)


def memory(train: Sequence[str], answers: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The answer to the most similar train text: cosine of TF-IDF of words and pairs of words."""
    features = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), dtype=np.float32)
    known, asked = features.fit_transform(train), features.transform(texts)
    found: list[int] = []
    for start in range(0, asked.shape[0], 256):
        found.extend((asked[start : start + 256] @ known.T).toarray().argmax(1))
    return [answers[i] for i in found]
