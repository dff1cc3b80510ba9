"""The engine tests' fixtures, for faults done to real engines."""

from tests.engine.conftest import _session_cluster, cluster, clusters, http

__all__ = ["_session_cluster", "cluster", "clusters", "http"]
