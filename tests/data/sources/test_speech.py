"""The sets of sound, prepared from packages of a few short recordings."""

from collections import Counter
import importlib
import io
import string
import wave

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from moe.data.audio import sample_rate
from moe.data.sources import asterisk, czech_speech, spoken_language, spoken_words
from moe.data.sources.builder import write_quietly
from moe.data.sources.held_out import split_by_text
from moe.data.sources.types import SPLITS
from moe.errors import DataError
from tests.data.tiny_archives import write

ROOT = "usr/share/asterisk/sounds/voice/"
FISH = "usr/share/games/fillets-ng/"


def recording(seed: int, samples: int = 800) -> np.ndarray:
    """Noise whose loudness changes every twentieth of a second, so that no two are alike."""
    draw = np.random.default_rng(seed)
    loudness = np.repeat(10 ** draw.uniform(1, 4, -(-samples // 400)), 400)[:samples]
    return (loudness * draw.uniform(-1, 1, samples)).astype(np.int16)


def wav(samples: np.ndarray, rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setframerate(rate)
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def ogg(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="OGG", subtype="VORBIS")
    return file.getvalue()


def build(kind, packages, folder):
    """Examples by split, read back without the builder, and the data set's info."""
    builder = kind(data_dir=folder / "data", file_format="array_record")
    builder.archives = {
        package: write(folder / f"{package}_1_all.deb", {f"./{k}": v for k, v in files.items()})
        for package, files in packages.items()
    }
    write_quietly(builder)
    read = tfds.builder_from_directory(builder.data_path)
    return {split: list(read.as_data_source(split)) for split in SPLITS}, read.info


# Spoken language.

PROMPTS = [f"prompt-{i}" for i in range(40)] + ["digits/1", "letters/a", "phonetic/a_p"]
SILENT = {
    "silence/1": recording(1),
    "is": np.zeros(0, np.int16),
    "no": np.full(500, 7, np.int16),
    "beep": recording(2),
}


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    packages = {}
    for n, voice in enumerate(asterisk.CORE):
        clips = {p: recording(1000 * n + i, 2800) for i, p in enumerate(PROMPTS)} | SILENT
        packages[voice.package.name] = {f"{ROOT}{p}.wav": wav(x) for p, x in clips.items()}
    return build(spoken_language.SpokenLanguage, packages, tmp_path_factory.mktemp("languages"))


def test_prompts_are_held_out_whole(languages):
    examples, info = languages
    assert sample_rate(info) == 8000
    prompts = {s: Counter(e["prompt"].decode() for e in part) for s, part in examples.items()}
    assert sum(prompts.values(), Counter()) == dict.fromkeys(PROMPTS, 5)
    for split, found in prompts.items():
        assert found
        assert set(found.values()) == {5}
        assert {split_by_text(prompt) for prompt in found} == {split}


def test_sound_label_and_domain_belong_together(languages):
    examples, info = languages
    for example in (e for part in examples.values() for e in part):
        prompt, language = example["prompt"].decode(), int(example["label"])
        expected = recording(1000 * language + PROMPTS.index(prompt), 2800)
        np.testing.assert_array_equal(example["audio"], expected)
        kind = prompt.split("/")[0] if "/" in prompt else "sentences"
        assert example["domain"].decode() == kind
    assert info.features["label"].names == ["en", "es", "fr", "it", "ru"]


def test_what_is_left_out_is_counted(languages):
    _, info = languages
    assert info.metadata["skipped"] == {
        "beeps, tones and the monkeys": 5,
        "empty or silent recordings": 15,
    }


def test_one_recording_under_two_names_is_on_one_side():
    def spread(split):
        return [p for p in PROMPTS if split_by_text(p) == split]

    first, second = sorted((spread("train")[0], spread("test")[0]))
    third = max(spread("valid"))
    en = {p: recording(i, 2800) for i, p in enumerate(PROMPTS)}
    en[second] = (0.97 * en[first]).astype(np.int16)
    fr = {p: recording(100 + i, 2800) for i, p in enumerate(PROMPTS)}
    fr[third] = np.append(fr[second], fr[second][:100])
    assert [set(pair) for pair in asterisk.copies(en)] == [{first, second}]
    clips, _ = spoken_language.split_clips({"en": en, "fr": fr})
    splits = {(clip.language, clip.prompt): clip.split for clip in clips}
    group = min(first, second, third)
    for language in ("en", "fr"):
        for prompt in (first, second, third):
            assert splits[language, prompt] == split_by_text(group)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            wav(recording(0), rate=16000),
            r"a\.wav has 16000 samples a second, channels: 1, bits: 16",
        ),
        (wav(recording(0), channels=2), r"channels: 2, bits: 16; prompts have 8000, 1 and 16"),
        (wav(recording(0), width=1), "bits: 8"),
        (wav(recording(0))[:500], r"a\.wav is cut off: 456 bytes of 1600"),
        (wav(recording(0))[:20], r"a\.wav is no WAV file"),
        (b"", r"a\.wav is no WAV file: it ends in its header"),
        (b"RIFF" + b"x" * 100, r"a\.wav is no WAV file"),
    ],
)
def test_damaged_wav_is_named(data, message):
    with pytest.raises(DataError, match=message):
        asterisk.read_prompts({f"{ROOT}a.wav": lambda: data}, "pack")


def test_package_without_prompts():
    with pytest.raises(DataError, match="The package pack has no WAV files"):
        asterisk.read_prompts({"usr/share/doc/pack/copyright": lambda: b""}, "pack")


# Spoken words.


def word_files(voice: str, seed: int) -> dict[str, bytes]:
    radio = "phonetic/ICAO" if voice == "it-menardi" else "phonetic"
    prompts = [f"digits/{d}" for d in string.digits]
    prompts += [f"letters/{c}" for c in string.ascii_lowercase]
    prompts += [f"{radio}/{c}_p" for c in string.ascii_lowercase]
    prompts += ["digits/10", "letters/zed"]
    return {f"{ROOT}{p}.wav": wav(recording(seed + i)) for i, p in enumerate(prompts)}


def test_words_of_a_voice_are_held_out(tmp_path):
    packages = {
        voice.package.name: word_files(voice.name, 100 * n)
        for n, voice in enumerate(spoken_words.VOICES)
    }
    examples, info = build(spoken_words.SpokenWords, packages, tmp_path)
    assert sample_rate(info) == 8000
    names = info.features["label"].names
    assert (len(names), names[0], names[-1]) == (62, "digits-0", "phonetic-z")
    assert [e["voice"] for e in examples["test"]] == [b"it-menardi"] * 62
    assert sorted(int(e["label"]) for e in examples["test"]) == list(range(62))
    heard = Counter(e["voice"].decode() for s in ("train", "valid") for e in examples[s])
    assert heard == {"en": 62, "es": 62, "fr": 62, "it": 36, "ru": 36}
    assert 10 < len(examples["valid"]) < 50
    voices = [voice.name for voice in spoken_words.VOICES]
    for example in (e for part in examples.values() for e in part):
        label = int(example["label"])
        expected = recording(100 * voices.index(example["voice"].decode()) + label)
        np.testing.assert_array_equal(example["audio"], expected)
        assert names[label].startswith(example["domain"].decode())


def test_missing_or_silent_word_is_named():
    voice = spoken_words.VOICES[0]
    clips = {f"digits/{d}": recording(int(d)) for d in string.digits}
    with pytest.raises(
        DataError, match=r"asterisk-core-sounds-en-wav has no recording 'letters/a'"
    ):
        list(spoken_words.words_of(voice, clips))
    with pytest.raises(DataError, match=r"no recording 'digits/3' with speech"):
        list(spoken_words.words_of(voice, clips | {"digits/3": np.zeros(9, np.int16)}))


# Czech.


def script(**lines: str) -> bytes:
    entries = (
        f'dialogId("{name}", "{font}", "English {name}")\ndialogStr(\n"{text}")\n\n'
        for name, (font, text) in lines.items()
    )
    return "".join(entries).encode()


SCRIPTS = {
    f"{FISH}script/{level}/dialogs_cs.lua": script(
        one=("font_small", f"Úvod {word}, že?"),
        two=("font_big", "Vždy totéž..."),
        three=("font_crab", f'Říká: \\"{word}!\\"'),
        four=("font_big", "Kolik? 12!"),
        five=("", ""),
    )
    for level, word in ((f"level{c}", c * 3) for c in string.ascii_lowercase)
} | {f"{FISH}script/share/bore_dialogs_cs.lua": script(old=("font_small", "Starý vtip."))}


def fish_sounds() -> dict[str, bytes]:
    levels = [f"level{c}" for c in string.ascii_lowercase]
    names = ("one", "two", "three", "four", "five", "six")
    time = np.arange(6000) / 22050
    tone = ogg(0.5 * np.sin(2 * np.pi * 440 * time), 22050)
    files = {f"{FISH}sound/{level}/cs/{name}.ogg": tone for level in levels for name in names}
    both = np.stack([np.sin(2 * np.pi * 440 * np.arange(12000) / 44100), np.zeros(12000)], axis=1)
    files[f"{FISH}sound/share/jokes/cs/old.ogg"] = ogg(both, 44100)
    return files


def test_czech_utterances(tmp_path):
    packages = {"fillets-ng-data": SCRIPTS, "fillets-ng-data-cs": fish_sounds()}
    examples, info = build(czech_speech.CzechSpeech, packages, tmp_path)
    assert sample_rate(info) == 11025
    assert info.metadata["skipped"] == {
        "lines with figures, symbols or other letters": 26,
        "recordings without a line in the scripts": 52,
    }
    by_path = {e["path"].decode(): e for part in examples.values() for e in part}
    assert len(by_path) == 26 * 3 + 1
    first, joke = by_path["levela/one"], by_path["jokes/old"]
    assert first["text"].decode() == "úvod aaa že"
    assert first["original"].decode() == "Úvod aaa, že?"
    assert first["english"] == b"English one"
    assert [by_path[f"levela/{n}"]["domain"] for n in ("one", "two", "three")] == [
        b"small fish",
        b"big fish",
        b"others",
    ]
    assert by_path["levelb/three"]["original"].decode() == 'Říká: "bbb!"'
    assert joke["text"].decode() == "starý vtip"
    for example, amplitude in ((first, 16384), (joke, 16384)):  # half of it, or one of two channels
        assert example["audio"].shape == (3000,)
        middle = example["audio"][500:2500].astype(np.float64)
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(2000)))
        assert abs(spectrum.argmax() * 11025 / 2000 - 440) < 6
        assert abs(np.abs(middle).max() / amplitude - 1) < 0.1


def test_levels_and_equal_words_are_on_one_side(tmp_path):
    sounds = dict.fromkeys(fish_sounds(), lambda: b"")
    lines = czech_speech.read_scripts({name: lambda d=d: d for name, d in SCRIPTS.items()})
    found, _ = czech_speech.utterances(lines, sounds)
    assert found == czech_speech.utterances(lines, dict(reversed(sounds.items())))[0]
    of_level = {}
    for one in found:
        level, name = one.path.split("/")
        if name != "two":
            assert of_level.setdefault(level, one.split) == one.split
    repeated = {one.split for one in found if one.text == "vždy totéž"}
    assert repeated == {of_level["levela"]}
    counts = Counter(one.split for one in found)
    assert set(counts) == set(SPLITS)


def test_shares_of_levels():
    sizes = {f"level {i}": 1 + i % 7 for i in range(80)}
    splits = czech_speech.split_levels(sizes)
    total = sum(sizes.values())
    shares = Counter()
    for level, split in splits.items():
        shares[split] += sizes[level] / total
    for split in ("valid", "test"):
        assert 0.08 < shares[split] < 0.13


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("Ale jo, třebá... Teď!", "ale jo třebá teď"),
        ("Kdo\N{RIGHT SINGLE QUOTATION MARK}s to - řekl?!", "kdo s to řekl"),
        ("A%1.", None),
        ("Klávesa F3.", None),
        ("Подожди.", None),
        ("...", None),
    ],
)
def test_a_line_as_it_is_said(line, text):
    assert czech_speech.spoken(line) == text


def test_missing_decoder_is_explained(monkeypatch):
    czech_speech.check_decoder()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"soundfile.*pip install.*\[data\]"):
        czech_speech.check_decoder()


def test_damaged_dialogue_is_named():
    with pytest.raises(DataError, match=r"a\.ogg is no sound that can be decoded"):
        czech_speech.read_ogg(b"OggS" + b"x" * 50, "a.ogg")
    with pytest.raises(DataError, match=r"a\.ogg is empty or silent"):
        czech_speech.read_ogg(ogg(np.zeros(2000), 22050), "a.ogg")
    path = f"{FISH}script/start/dialogs_cs.lua"
    with pytest.raises(DataError, match=r"dialogs_cs\.lua is not UTF-8 at byte 3"):
        czech_speech.read_scripts({path: lambda: b"abc\xff"})
    with pytest.raises(DataError, match="no Czech dialogue"):
        czech_speech.read_scripts({path: lambda: b"nothing"})
    with pytest.raises(DataError, match="no recordings of lines"):
        czech_speech.utterances({}, {})
