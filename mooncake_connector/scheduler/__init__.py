"""The scheduler: a proxy in front of prefill and decode engines, its policy, and a simulator of both."""
