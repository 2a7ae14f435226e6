"""A TFDS builder of the tests' own, in an importable module as TFDS wants it."""

import numpy as np
import tensorflow_datasets as tfds

REVIEWS = [f"review {i}: {'good' if i % 2 else 'bad'} é" for i in range(100)]


SPLITS_OF = {
    "train": ["train"],
    "train_test": ["train", "test"],
    "train_validation": ["train", "validation"],
    "train_validation_test": ["train", "validation", "test"],
    "test": ["test"],
    "broken": ["train"],  # and its texts are no UTF-8
}


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """One config for each set of splits."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in SPLITS_OF)

    def _info(self):
        features = {
            "review": tfds.features.Text(),
            "domain": tfds.features.ClassLabel(names=["bad", "good"]),
            "number": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        splits = SPLITS_OF[self.builder_config.name]
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
        for i, review in enumerate(REVIEWS):
            text = f"{split} {review}".encode()
            if self.builder_config.name == "broken":
                text = b"x\xff" + text
            yield i, {"review": text, "domain": i % 2, "number": i}
