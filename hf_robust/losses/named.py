# SPDX-License-Identifier: Apache-2.0
"""Terms of the loss by name, from a list of them or from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, close_matches
from .term import Term, check_term


def terms_of(given: Sequence[Term] | Mapping[str, Any] | None, known: Mapping[str, type[Term]]) -> dict[str, Term]:
    """Returns terms by name, in the order given.

    Args:
        given: terms, or settings by the names of terms, as `{"similarity": {"weight": 10.0}}`; None for none.
        known: the terms that a name can stand for.

    Raises:
        ConfigError: a name or setting is unknown, a setting is out of range, something is no term, or two terms have
            one name.

    Example:
        >>> terms_of({"similarity": {"weight": 10.0}}, {"similarity": SimilarityLoss})
        {'similarity': SimilarityLoss(weight=10.0, distance='cosine', towers='vision', schedule='constant')}
    """
    if isinstance(given, Mapping):
        return {name: _made(name, settings, known) for name, settings in given.items()}
    if given is not None and not isinstance(given, Sequence | str):
        raise _no_terms(given)
    found: dict[str, Term] = {}
    for term in given or ():
        if not isinstance(term, Term):
            raise _no_terms(term)
        name: Any = getattr(term, "name", None)
        check_term(name, term)
        if name in found:
            remedy = "Give one of them another `name`."
            raise ConfigError("a loss is there twice", where="losses", got=name, remedy=remedy)
        found[name] = term
    return found


def _no_terms(got: Any) -> ConfigError:
    allowed = "a list of `Term`s, or settings by name: {'similarity': {'weight': 10.0}}"
    return ConfigError("these are no losses", where="losses", got=got, allowed=allowed)


def _made(name: str, settings: Any, known: Mapping[str, type[Term]]) -> Term:
    if name not in known:
        remedy = close_matches(str(name), list(known))
        raise ConfigError("no such loss", where="losses", got=name, remedy=remedy)
    if not isinstance(settings, Mapping | None):
        where, allowed = f"losses, {name}", "a mapping of settings, as {weight: 10.0}"
        raise ConfigError("these are no settings of a loss", where=where, got=settings, allowed=allowed)
    return known[name].from_settings(settings or {})
