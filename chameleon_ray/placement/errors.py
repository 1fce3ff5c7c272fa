"""What can go wrong between us and Redis."""


class PlacementError(Exception):
    """Base of all errors of this package."""


class PlacementUnavailableError(PlacementError):
    """Redis did not answer (in time) or refused. Nothing is known to be written; callers answer 503."""


class CatalogConflictError(PlacementError):
    """A live adapter of this name exists already and replacing it was not asked for."""


class AdapterUnknownError(PlacementError):
    """No live adapter of this name exists."""
