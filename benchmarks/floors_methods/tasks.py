"""What is measured on each data set: its methods on its own splits."""

from collections import defaultdict
from collections.abc import Callable, Sequence
import re

import numpy as np

from benchmarks.floors_methods import choose, classify, compress, translate
from benchmarks.floors_methods.reading import Columns, Data
from benchmarks.floors_methods.result import Floor, accuracy, exact
from moe.evaluation import text_scores
from moe.evaluation.bootstrap import ratio_interval

WAYS = 4  # candidate words of a definition
FIRST = 5  # names that may be named for a picture
LENGTHS = (4, 6)  # bytes of the longest n-gram: orders 3 and 5
Method = Callable[[], np.ndarray]  # gives the classes of a split

MOST_BYTES = 12 << 20  # of a domain's train split that compressors and n-grams know


def test_splits(data: Data) -> list[str]:
    """`test` and its variants."""
    return sorted(split for split in data.splits if split.startswith("test"))


def _labels(columns: Columns) -> np.ndarray:
    return np.array(columns["label"], np.int64)


def _judged(data: Data, split: str, methods: dict[str, Method]) -> list[Floor]:
    right = _labels(data.columns(split))
    return [accuracy(data.name, split, name, run() == right) for name, run in methods.items()]


def classify_texts(data: Data) -> list[Floor]:
    """Majority, naive Bayes of both kinds, and logistic regression on TF-IDF."""
    train, valid, test = (data.columns(split) for split in ("train", "valid", "test"))
    known, held_out = ((one["text"], _labels(one)) for one in (train, valid))
    regression = {
        "TF-IDF logistic regression": lambda: classify.tfidf_regression(
            known, held_out, test["text"]
        )
    }
    return [*count_words(data), *_judged(data, "test", regression)]


def count_words(data: Data) -> list[Floor]:
    """Majority, and naive Bayes of both kinds."""
    train, floors = data.columns("train"), []
    for split in test_splits(data):
        asked = data.columns(split)["text"]
        floors += _judged(data, split, _word_methods(train["text"], _labels(train), asked))
    return floors


def _word_methods(train: list[str], labels: np.ndarray, asked: list[str]) -> dict[str, Method]:
    return {
        "majority": lambda: classify.majority(labels, len(asked)),
        "Bernoulli naive Bayes": lambda: classify.bernoulli_bayes(train, labels, asked),
        "multinomial naive Bayes": lambda: classify.multinomial_bayes(train, labels, asked),
    }


def classify_pictures(data: Data) -> list[Floor]:
    """Nearest centroid and logistic regression on pixels."""
    columns = [data.columns(split) for split in ("train", "valid", "test")]
    train, valid, test = (classify.pixels(one["image"]) for one in columns)
    known, held_out = ((x, _labels(one)) for x, one in zip((train, valid), columns, strict=False))
    return _judged(
        data,
        "test",
        {
            "nearest centroid": lambda: classify.nearest_centroid(*known, test),
            "logistic regression": lambda: classify.regression(known, held_out, test),
        },
    )


def classify_sounds(data: Data) -> list[Floor]:
    """Majority, and logistic regression on what the bands of a recording are on average."""
    columns = [data.columns(split) for split in ("train", "valid", *test_splits(data))]
    rate = data.rate("audio")
    features = (np.stack([classify.sound(pcm, rate) for pcm in one["audio"]]) for one in columns)
    train, valid, *tests = classify.standardise(*features)
    known, held_out = ((x, _labels(one)) for x, one in zip((train, valid), columns, strict=False))
    floors = []
    for split, test in zip(test_splits(data), tests, strict=True):
        floors += _judged(data, split, _sound_methods(known, held_out, test))
    return floors


def _sound_methods(known: tuple, held_out: tuple, asked: np.ndarray) -> dict[str, Method]:
    return {
        "majority": lambda: classify.majority(known[1], len(asked)),
        "logistic regression": lambda: classify.regression(known, held_out, asked),
    }


def translations(data: Data) -> list[Floor]:
    """Tables of words by IBM Model 1, and the translation of the most similar train text."""
    train, test = data.columns("train"), data.columns("test")
    words = [translate.split_words(text) for text in test["source"]]
    pairs = [[translate.split_words(text) for text in train[end]] for end in ("source", "target")]
    table, model = translate.model1(*pairs), translate.bigrams(pairs[1])
    answers = {
        "IBM Model 1": [translate.translate(one, table) for one in words],
        "IBM Model 1, bigrams": [translate.translate(one, table, model) for one in words],
    }
    told = {name: [translate.join_words(one) for one in found] for name, found in answers.items()}
    told["nearest train text"] = translate.memory(train["source"], train["target"], test["source"])
    languages = [text_scores.language_of(domain) for domain in test["domain"]]
    floors = []
    for name, found in told.items():
        bleu = text_scores.bleu(test["target"], found, languages)
        floors.append(Floor(data.name, "test", name, "BLEU", bleu))
        chrf = text_scores.chrf(test["target"], found)
        floors.append(Floor(data.name, "test", name, "chrF", chrf))
    return floors


def definitions(data: Data) -> list[Floor]:
    """The word whose train definitions share most with the definition; wrong words are of the split."""
    train = data.columns("train")
    known = list(zip(train["source"], train["target"], strict=True))
    floors = []
    for split in test_splits(data):
        asked, answers = data.columns(split)["source"], data.columns(split)["target"]
        right = defaultdict(set)
        for definition, word in zip(asked, answers, strict=True):
            right[definition].add(word)
        wrong = choose.wrong_words([sorted(right[d]) for d in asked], sorted(set(answers)), WAYS)
        candidates = [[answer, *others] for answer, others in zip(answers, wrong, strict=True)]
        first = [[0]] * len(asked)
        scores = {
            "chance": [np.zeros(WAYS)] * len(asked),
            "TF-IDF overlap": choose.overlap(known, asked, candidates),
        }
        for name, found in scores.items():
            right_share = choose.recall(found, first)
            floors.append(accuracy(data.name, split, f"{name}, {WAYS} ways", right_share))
    return floors


def missing_names(data: Data) -> list[Floor]:
    """Names by how often and how late the text mentions them."""
    floors = []
    for split in test_splits(data):
        columns = data.columns(split)
        candidates = [names.split("|") for names in columns["candidates"]]
        pairs = zip(columns["target"], candidates, strict=True)
        right = [[names.index(answer)] for answer, names in pairs]
        scores = [
            choose.name_scores(*one) for one in zip(columns["source"], candidates, strict=True)
        ]
        for name in scores[0]:
            hits = choose.recall([one[name] for one in scores], right)
            floors.append(accuracy(data.name, split, name, hits))
    return floors


def numbers(data: Data) -> list[Floor]:
    """Any number of six digits that the text holds: always right where it holds but one."""
    floors = []
    for split in test_splits(data):
        columns = data.columns(split)
        found = [sorted(set(re.findall(r"\b\d{6}\b", text))) for text in columns["source"]]
        pairs = zip(columns["target"], found, strict=True)
        right = [[known.index(answer)] for answer, known in pairs]
        hits = choose.recall([np.zeros(len(known)) for known in found], right)
        floors.append(accuracy(data.name, split, "any number of the text", hits))
    return floors


def transcripts(data: Data) -> list[Floor]:
    """The empty text, and the most frequent transcript of train."""
    usual, floors = choose.most_frequent(data.columns("train")["text"]), []
    for split in test_splits(data):
        texts = data.columns(split)["text"]
        for name, answer in (("empty", ""), (f"always {usual!r}", usual)):
            rate = text_scores.character_error_rate(texts, [answer] * len(texts))
            floors.append(Floor(data.name, split, name, "character error rate", rate))
    return floors


def picture_names(data: Data) -> list[Floor]:
    """Names like that of the train picture with the most similar colours, in all languages and each.

    Candidates are all names of the split, each once. Every name of a picture is right.
    """
    train, test = data.columns("train"), data.columns("test")
    floors = []
    for language in (None, *sorted(set(test["domain"]))):
        known, asked = (_in_language(columns, language) for columns in (train, test))
        names, right = _right_names(asked)
        rows = choose.nearest(choose.histogram(known["image"]), choose.histogram(asked["image"]))
        guesses = [known["text"][row] for row in rows]
        scores = {
            "chance": [np.zeros(len(names))] * len(guesses),
            "name of nearest colours": list(choose.name_likeness(guesses, names)),
        }
        for name, found in scores.items():
            told = f"{name}, {language or 'all languages'}"
            hits = choose.recall(found, right, FIRST)
            floors.append(
                accuracy(data.name, "test", told, hits)._replace(metric=f"recall@{FIRST}")
            )
    return floors


def _in_language(columns: Columns, language: str | None) -> Columns:
    keep = [i for i, domain in enumerate(columns["domain"]) if language in (None, domain)]
    return {key: [values[i] for i in keep] for key, values in columns.items()}


def _right_names(columns: Columns) -> tuple[list[str], list[list[int]]]:
    """All names, each once, and for each example the numbers of all names of its picture."""
    names = list(dict.fromkeys(columns["text"]))
    number = {name: i for i, name in enumerate(names)}
    own = defaultdict(set)
    keys = [image.tobytes() for image in columns["image"]]
    for key, name in zip(keys, columns["text"], strict=True):
        own[key].add(number[name])
    return names, [sorted(own[key]) for key in keys]


def language(data: Data) -> list[Floor]:
    """Compressors and byte n-grams by domain; each domain's n-grams know only its own train split."""
    train, test = (_by_domain(data.columns(split)) for split in ("train", "test"))
    floors = []
    for domain, texts in sorted(test.items()):
        known, whole = leading(train.get(domain, [])), b"\n".join(texts)
        rates = {
            f"{name} -9": exact(compress.compressed_bits(whole, run), len(texts))
            for name, run in compress.COMPRESSORS.items()
        }
        before = b"\n".join(known)
        after = compress.compressed_bits(whole, compress.COMPRESSORS["xz"], before)
        rates["xz -9 after train"] = exact(after, len(texts))
        sizes = np.array([len(text) for text in texts], np.float64)
        for length in LENGTHS:
            orders = compress.kneser_ney(known, length)
            bits = compress.ngram_bits(orders, texts)
            rates[f"Kneser-Ney, order {length - 1}"] = ratio_interval(bits, sizes)
        name = data.name if domain == data.name else f"{data.name}: {domain}"
        floors += [Floor(name, "test", how, "bits/byte", rate) for how, rate in rates.items()]
    return floors


def _by_domain(columns: Columns) -> dict[str, list[bytes]]:
    found = defaultdict(list)
    for text, domain in zip(columns["text"], columns["domain"], strict=True):
        found[str(domain)].append(text.encode())
    return found


def leading(texts: Sequence[bytes]) -> list[bytes]:
    """Texts until MOST_BYTES are reached."""
    sizes = np.cumsum([len(text) for text in texts])
    return list(texts[: max(1, int(np.searchsorted(sizes, MOST_BYTES, "right")))])


Task = Callable[[Data], list[Floor]]

TASKS: dict[str, Task] = {
    "imdb": classify_texts,
    "rotten_tomatoes": classify_texts,
    "bbc": classify_texts,
    "fashion_mnist": classify_pictures,
    "mnist_digits": classify_pictures,
    "spoken_language": classify_sounds,
    "spoken_words": classify_sounds,
    "definitions": definitions,
    "verses_en_es": translations,
    "interface_en_de": translations,
    "interface_en_zh": translations,
    "czech_speech": transcripts,
    "emoji": picture_names,
    "name_cloze": missing_names,
    **dict.fromkeys(("listops", "listops_medium", "listops_lra"), count_words),
    **dict.fromkeys(("needle", "needle_496", "needle_1008", "needle_4080"), numbers),
    "needle_1008_of_4": numbers,
}
