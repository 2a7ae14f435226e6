"""Speech: which of five languages is spoken? A convolutional stem on log-mel frames, an encoder, pooled.

    python3 scripts/prepare_data.py spoken_language
    python3 train.py --config=configs/spoken_language.py --workdir=runs/spoken_language
    python3 eval.py --workdir=runs/spoken_language --split=test

Prompts of a telephone system, held out by prompt; mostly one speaker a language, so speakers are
told apart too.
After a colon: `dense`, the dense model of equal active FLOPs, or `router=NAME`.

Reached on test (commit a372cf2, 2 minutes on one of two busy cores, one seed): accuracy 0.962 (0.939 to
0.983), dense 0.976 (0.956 to 0.993), best simple method 0.959 logistic regression.
"""

from moe.config import ConfigDict, default_config, import_beside

twins = import_beside(__file__, "presets/twins.py")


def get_config(arg: str = "") -> ConfigDict:
    """The sparse model, or with `arg` one of its twins."""
    config = default_config()
    config.steps = 500
    config.task.name = "classify"
    config.model.update({"num_layers": 2, "width": 96, "heads": 4, "kv_heads": 4, "head_dim": 24})
    config.model.update({"num_experts": 8, "expert_width": 96, "dropout": 0.1})
    config.router.k = 2
    config.data.update({"name": "spoken_language", "batch_size": 32, "sequence_length": 100})
    with config.ignore_type():
        config.evaluation.generalisation = {
            "longer": {"sequence_length": 200},
            "noise_20dB": {"corrupt": "white_noise:20"},
        }
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50})
    config.evaluation.every = 100
    config.checkpoint.every = 100
    return twins.apply(config, arg, "spoken_language.py")
