"""Whether a model can be used the way it is evaluated: left to right."""

from moe.errors import ConfigError
from moe.model.attention_table import causality_of
from moe.model.spec import ModelSpec


def has_causal_form(spec: ModelSpec) -> bool:
    """Whether evaluation treats every token without a look at later ones."""
    row = spec.router.row
    routed = not spec.sparse_layers or row.causality != "C3" or row.causal_in_eval
    return routed and not _attends_ahead(spec)


def _attends_ahead(spec: ModelSpec) -> bool:
    return causality_of(spec.attention.name, dict(spec.attention.options)) == "C3"


def has_causal_gap(spec: ModelSpec) -> bool:
    """Whether training and evaluation route a language model in two forms, one of them causal."""
    sparse_language_model = spec.sparse_layers > 0 and not spec.classes
    two_forms = spec.router.row.causality == "C3" or spec.has_depth
    return sparse_language_model and two_forms and has_causal_form(spec)


def causality_record(spec: ModelSpec) -> dict[str, str | bool | None]:
    """The entry `causality` of an evaluation's record.

    Returns:
        `router`: its causality class, None for a dense model; `causal_form`: whether the measured
        loss is that of a model that can generate, None for a classifier.
    """
    router = spec.router.row.causality if spec.sparse_layers else None
    return {"router": router, "causal_form": None if spec.classes else has_causal_form(spec)}


def check_generation(spec: ModelSpec) -> None:
    """Refuses a model that cannot go on from its own tokens.

    Raises:
        ConfigError: a classifier, or a router without a causal form.
    """
    if spec.classes:
        raise ConfigError(
            "task.name='classify' predicts the class of a row and no token: it cannot generate. Train "
            "with task.name='language'."
        )
    if _attends_ahead(spec):
        raise ConfigError(
            f"attention.name={spec.attention.name!r} cannot generate with its options: it is noncausal (C3), "
            "and what a token sees depends on tokens that are not there yet. Choose attention.mode='causal', "
            "or another attention."
        )
    if not has_causal_form(spec):
        raise ConfigError(
            f"router.name={spec.router.name!r} cannot generate: it is noncausal (C3) and has no causal "
            "form, so a token's experts depend on tokens that are not there yet. Choose a router of "
            "class C0 or C1, or a C3 router with a causal form of evaluation."
        )
