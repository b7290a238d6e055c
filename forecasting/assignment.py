"""Which forecaster answers for which symbol."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from forecasting.registry import CONTRACT_TAG, PRODUCTION, SIGNATURE_TAG, Registry

LONGEST_NAME = 40
"""Of several symbols, before a forecaster is named by their number and a hash."""


@dataclass(frozen=True)
class Held:
    """A version, as the registry describes it."""

    forecaster: str
    version: int
    symbols: tuple[str, ...]
    contract_sha256: str
    signature: str


def in_production(registry: Registry) -> list[Held]:
    """Every version that holds `production`. One call, and one more a forecaster.

    Raises:
        RegistryError: the registry is away.
    """
    found = []
    for forecaster, aliases in registry.served_versions().items():
        if PRODUCTION in aliases:
            found.append(version_of(registry, forecaster, aliases[PRODUCTION]))
    return found


def version_of(registry: Registry, forecaster: str, version: int) -> Held:
    """Any version, as the registry describes it.

    Raises:
        RegistryError: no such version, or the registry is away.
    """
    tags = registry.version(forecaster, version).tags
    symbols = tuple(filter(None, tags.get("symbols", "").split(",")))
    digest, signature = tags.get(CONTRACT_TAG, ""), tags.get(SIGNATURE_TAG, "")
    return Held(forecaster, version, symbols, digest, signature)


def assign(symbols: Sequence[str], held: Sequence[Held]) -> list[tuple[Held, list[str]]]:
    """The version that answers for each symbol, by the server's rule.

    Of two it is that with fewer symbols, then the first by name.

    Returns:
        Each version that is needed with its symbols; symbols that none serves are left out.
    """
    worst_first = sorted(held, key=lambda each: (len(each.symbols), each.forecaster), reverse=True)
    by_symbol = {symbol: each.forecaster for each in worst_first for symbol in each.symbols}
    chosen: dict[str, list[str]] = {}
    for symbol in symbols:
        if symbol in by_symbol:
            chosen.setdefault(by_symbol[symbol], []).append(symbol)
    return [(each, chosen[each.forecaster]) for each in held if each.forecaster in chosen]


def forecaster_name(symbols: Sequence[str]) -> str:
    """Registered model of one symbol, or of several: the same in whatever order they come.

    Many are told apart by a hash of them all.
    """
    names = sorted(symbol.lower() for symbol in symbols)
    told = "-".join(names)
    if len(told) > LONGEST_NAME:
        every = hashlib.sha256(",".join(names).encode()).hexdigest()[:8]
        told = f"{names[0]}-and-{len(names) - 1}-more-{every}"
    return f"perennial-{told}"


def who_serves(registry: Registry, symbol: str) -> tuple[str, tuple[str, ...]]:
    """The forecaster in production that answers for a symbol, by the server's rule.

    Returns:
        Its name and all of its symbols; the symbol's own forecaster where none is in production.

    Raises:
        RegistryError: the registry is away.
    """
    own = forecaster_name([symbol])
    if registry.alias(own, PRODUCTION) is None:
        for held, _ in assign([symbol], in_production(registry)):
            return held.forecaster, held.symbols
    return own, (symbol,)
