"""A builder of packages of the tests' own, in an importable module as TFDS wants it."""

import tensorflow_datasets as tfds

from moe.data.packages import Package
from moe.data.sources.builder import PackageBuilder, PackageConfig

PACKAGES = (Package("npm", "tiny-words", "1.0.0"),)
MORE = (*PACKAGES, Package("apt", "tiny-more", "1.0"))
FILES = {"tiny-words": "tiny-words-1.0.0.tgz", "tiny-more": "tiny-more_1.0_all.deb"}


class TinyWords(PackageBuilder):
    """A word an example, of one package or of two."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (PackageConfig(name="one"), PackageConfig(name="two", packages=MORE))

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "valid", "test")}

    def _generate_examples(self, split):
        for package in PACKAGES if self.builder_config.name == "one" else MORE:
            words = self.members(package.name)[f"package/{split}.txt"]().decode().split()
            for word in words:
                yield f"{package.name} {word}", {"text": word, "label": int(word[0] == "b")}
