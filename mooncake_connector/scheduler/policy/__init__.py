"""Who serves what, when, and who is turned away: pure policy, run by the proxy and by the simulator alike."""
