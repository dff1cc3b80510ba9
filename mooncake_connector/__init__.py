"""Prefill-decode disaggregation for LLM serving: KV connector, transfer engine, scheduler and diagnosis."""

__version__ = "0.1.0"
