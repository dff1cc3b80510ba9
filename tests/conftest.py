"""Fixtures that several layers share."""

pytest_plugins = ["tests.engine.fixtures"]
