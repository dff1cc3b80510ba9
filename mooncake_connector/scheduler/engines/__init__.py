"""The engines behind the proxy: how each kind is driven, which are up, and what they hold; `vllm` today."""
