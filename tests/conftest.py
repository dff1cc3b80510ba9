"""Fixtures and settings that several layers share."""

from hypothesis import settings

pytest_plugins = ["tests.engine.fixtures"]

# Machines that run these tests do other things as well: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
