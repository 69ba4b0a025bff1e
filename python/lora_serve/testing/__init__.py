"""Tools for tests: an executor that checks every page, models and adapters made on the spot."""
