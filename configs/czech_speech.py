"""Speech: what was said, letter by letter (CTC)? A convolutional stem on log-mel frames and an encoder.

    python3 scripts/prepare_data.py czech_speech
    python3 train.py --config=configs/czech_speech.py --workdir=runs/czech_speech
    python3 eval.py --workdir=runs/czech_speech --split=test

1,702 Czech utterances of a game, held out by level.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a4b9375, 6 minutes on one of two busy cores, one seed): character error rate 0.471
(0.452 to 0.490), dense 0.470 (0.450 to 0.490), best simple method 0.886 one answer for all.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 800
    config.task.name = "ctc"
    config.model.update({"num_layers": 3, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32})
    config.model.update({"num_experts": 8, "expert_width": 128, "dropout": 0.1, "qk_norm": "head"})
    config.router.k = 2
    config.data.update({"name": "czech_speech", "batch_size": 16, "sequence_length": 160})
    config.data.update({"tokenizer": "characters", "too_long": "skip"})
    with config.ignore_type():
        config.evaluation.generalisation = {"noise_20dB": {"corrupt": "white_noise:20"}}
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
    config.evaluation.every = 200
    config.checkpoint.every = 200
    return twins.apply(config, arg, "czech_speech.py")
