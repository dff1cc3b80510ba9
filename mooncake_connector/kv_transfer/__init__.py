"""KV transfer: layouts, plans, transports and the push protocol. Imports no engine."""
