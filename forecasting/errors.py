"""The exception tree of perennial.

    PerennialError
    ├── ConfigError            a setting is missing, unknown or out of range
    ├── DataError              prices or requests that cannot be used
    │   ├── SourceError        a price source could not be read (network, file, unknown symbol)
    │   ├── BadPricesError     rows break the schema or the calendar; names every offending row
    │   ├── HistoryError       too few rows, or a date outside what is known
    │   └── DatasetError       a dataset version cannot be made, found, pushed or pulled
    ├── ModelError
    │   ├── ContractError      a model folder is incomplete, altered or of another contract version
    │   └── TrainingError      a fit or an export broke (diverged, not reproducible)
    ├── RegistryError          the model registry is away, or holds no such version or alias
    │   └── OvertakenError     another version went into production in the meantime
    ├── ServiceError           another service (Prefect, server, database) misbehaved
    └── ProblemError           (serving.problems) a request that is answered with a problem

Every message says what was expected, what came, and what to do next.
"""


class PerennialError(Exception):
    """Base of every error that perennial raises on purpose."""


class ConfigError(PerennialError):
    """A setting is missing, unknown or out of range."""


class DataError(PerennialError):
    """Prices or requests that cannot be used."""


class SourceError(DataError):
    """A price source could not be read."""


class BadPricesError(DataError):
    """Rows break the schema or the calendar."""


class HistoryError(DataError):
    """Too few rows, or a date outside what is known."""


class DatasetError(DataError):
    """A dataset version cannot be made, found, pushed or pulled."""


class ModelError(PerennialError):
    """A model folder or a fit is broken."""


class ContractError(ModelError):
    """A model folder is incomplete, altered or of another contract version."""


class TrainingError(ModelError):
    """A fit or an export broke."""


class RegistryError(PerennialError):
    """The model registry is away, or holds no such version or alias."""


class OvertakenError(RegistryError):
    """Another version went into production in the meantime."""


class ServiceError(PerennialError):
    """Another service did not answer as expected."""
