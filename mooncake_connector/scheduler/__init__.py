"""The proxy in front of prefill and decode engines: who serves what, and how each is driven."""
