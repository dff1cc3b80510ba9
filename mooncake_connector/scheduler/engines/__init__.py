"""How to drive one kind of engine; `vllm` today."""
