"""Discrete-event simulator: engines that only cost time, around the very conductor that the proxy runs."""
