"""Translation: English verses into Spanish, a prefix language model over byte pairs.

    python3 scripts/prepare_data.py verses_en_es
    python3 train.py --config=configs/verses.py --workdir=runs/verses
    python3 eval.py --workdir=runs/verses --split=test

30,905 verse pairs of the King James and Reina-Valera bibles, held out by chapter. English and German or Chinese
interface texts are read by `--config.data.name=interface_en_de` or `interface_en_zh`. After a colon: `dense`,
the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a89fb13, 26 minutes on one of two busy cores, one seed): BLEU 11.9 (11.3 to 12.4),
best simple method 19.8 IBM Model 1 with bigrams; chrF 31.2 (30.7 to 31.6), best simple method 46.0 IBM Model
1.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 1300
    config.task.name = "seq2seq"
    config.model.update({"num_layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32})
    config.model.update({"num_experts": 8, "expert_width": 192})
    config.router.k = 2
    config.data.update({"name": "verses_en_es", "batch_size": 64, "sequence_length": 120})
    with config.ignore_type():
        config.data.update({"tokenizer": "bpe", "vocab_size": 2048})
        config.evaluation.generalisation = {"typos": {"corrupt": "typos:0.05"}}
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100})
    config.evaluation.update({"every": 650, "decode": "greedy", "decode_length": 80})
    config.checkpoint.every = 650
    return twins.apply(config, arg, "verses.py")
