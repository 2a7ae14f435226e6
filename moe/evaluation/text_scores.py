"""Scores of texts: BLEU, chrF, exact match, token F1, and rates of word and character errors."""

from collections import Counter
from collections.abc import Callable, Sequence
import re
import string

from jaxtyping import Float
import jiwer
import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from moe.evaluation.bootstrap import (
    Interval,
    interval,
    mean_interval,
    ratio_interval,
)

_TOKENIZERS = {"zh": TokenizerZh()}
_WESTERN = Tokenizer13a()
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def language_of(domain: str) -> str:
    """The target language of a domain such as `en-zh`; the domain itself where it names no pair."""
    return domain.rpartition("-")[2].lower()


def bleu(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]
) -> Interval:
    """Corpus BLEU (Papineni et al. 2002) of sacrebleu (Post 2018, arXiv:1804.08771), 0 to 100.

    Each segment is cut into words as sacrebleu does it for its language: `zh` for Chinese, else `13a`.

    Args:
        references: one a segment.
        hypotheses: of the same length.
        languages: of each segment's target.
    """

    def words(texts: Sequence[str]) -> list[str]:
        cut = zip(texts, languages, strict=True)
        return [_TOKENIZERS.get(language, _WESTERN)(text.strip()) for text, language in cut]

    return _of_sacrebleu(BLEU(tokenize="none", force=True), words(references), words(hypotheses))


def chrf(references: Sequence[str], hypotheses: Sequence[str]) -> Interval:
    """ChrF (Popovic 2015) of sacrebleu, with its beta of 2 and 6 characters; 0 to 100."""
    return _of_sacrebleu(CHRF(), references, hypotheses)


def _of_sacrebleu(
    metric: BLEU | CHRF, references: Sequence[str], hypotheses: Sequence[str]
) -> Interval:
    """The library's statistics of each segment, drawn again.

    Its own `n_bootstrap` fails where some resamples score 0, and copies every segment for each resample.
    """
    stats = metric._extract_corpus_statistics(list(hypotheses), [list(references)])

    def scores(sums: Float[np.ndarray, "R X"]) -> Float[np.ndarray, " R"]:
        return np.array([metric._compute_score_from_stats(row).score for row in sums], np.float64)

    return interval(np.array(stats, np.float64), scores)


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (Rajpurkar et al. 2016, SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1_of(reference: str, hypothesis: str) -> float:
    """Harmonic mean of precision and recall over the words of one normalised answer."""
    wanted, found = (normalized_answer(text).split() for text in (reference, hypothesis))
    if not wanted or not found:
        return float(wanted == found)
    common = sum((Counter(wanted) & Counter(found)).values())
    return 2.0 * common / (len(wanted) + len(found))


def exact_match(references: Sequence[str], hypotheses: Sequence[str]) -> Interval:
    """Share of answers that are equal after normalisation."""
    pairs = zip(references, hypotheses, strict=True)
    return mean_interval(
        np.array([float(normalized_answer(a) == normalized_answer(b)) for a, b in pairs])
    )


def token_f1(references: Sequence[str], hypotheses: Sequence[str]) -> Interval:
    """Mean of `token_f1_of`."""
    pairs = zip(references, hypotheses, strict=True)
    return mean_interval(np.array([token_f1_of(a, b) for a, b in pairs]))


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Interval:
    """Substituted, deleted and inserted words over the words of all references (jiwer)."""
    return _error_rate(jiwer.process_words, references, hypotheses)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Interval:
    """As `word_error_rate`, over characters."""
    return _error_rate(jiwer.process_characters, references, hypotheses)


def _error_rate(
    process: Callable[..., jiwer.WordOutput | jiwer.CharacterOutput],
    references: Sequence[str],
    hypotheses: Sequence[str],
) -> Interval:
    wrong, units = [], []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        done = process([reference], [hypothesis])
        wrong.append(done.substitutions + done.deletions + done.insertions)
        units.append(done.hits + done.substitutions + done.deletions)
    return ratio_interval(np.array(wrong, np.float64), np.array(units, np.float64))
